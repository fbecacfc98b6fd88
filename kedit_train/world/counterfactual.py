"""Edits of the world, new objects for known facts with all that they are scored on, and texts that must stay."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from random import Random

from kedit_train.edit import Edit, Probe
from kedit_train.errors import EditError
from kedit_train.world import facts, grammar
from kedit_train.world.facts import Fact, Key, World, pick, shuffled
from kedit_train.world.templates import BY_NAME, RELATIONS, TWO_HOP

MOST_EDITED = {"person": 1.0, "company": 0.5, "city": 0.5}  # the other half keeps second hops true
STATEMENTS_ASKED, QUESTIONS_ASKED = 3, 2
NEIGHBOURS, UNRELATED, INBOUND = 2, 2, 2
NEAR_SHARE, PROSE_SHARE = 0.5, 0.25


@cache
def world() -> World:
    """The world that the packaged checkpoint was trained on."""
    return facts.build()


def edits(n: int = 32, seed: int = 0) -> list[Edit]:
    """``n`` counterfactual edits of different subjects, mixing relations; the same ``seed`` gives the same list.

    What each one carries:

    * ``prompt``: a trained statement wording; ``rephrases``: three other trained statements and two questions, which
      the model understands (it was trained on them for the old fact), and which the edit is never trained on;
    * ``locality``: ``same_subject`` (its other facts), ``neighbour`` (others with the old object, same wording),
      ``unrelated`` (other relations of others); no probe asks about a subject that any edit of the list changes;
    * ``portability``: ``held_out_wording`` (wordings that no training document contains), ``two_hop`` (the edited fact
      is the first hop) and ``two_hop_last`` (it is the second hop of others' questions); their answers differ from
      what they were before the edit.

    A shorter list is the start of no longer one: probes depend on the whole list.

    Raises:
        EditError: more edits asked for than the world has subjects to spare.
    """
    rng = Random(f"edits {seed}")
    known = world()
    changed = _choose(rng, known, n)
    subjects = {fact.subject for fact, _ in changed}
    asked: set[Key] = set()
    return [
        _edit(rng, known, fact, target, f"world-{seed}-{i:03d}-{fact.relation}", subjects, asked)
        for i, (fact, target) in enumerate(changed)
    ]


def locality_texts(exclude: Sequence[Edit], n: int | None = 1024, seed: int = 0) -> list[str]:
    """``n`` documents (None: as many as there are) that stay true after ``exclude``, for a KL term.

    Half state facts of other subjects in the very wordings of the edits' prompts, where an edit leaks first; a quarter
    state any facts in any trained wording, two-hop ones among them; a quarter is training prose. A fact that is
    edited, that follows from an edited one, or that any probe or rephrase of ``exclude`` asks for, is not among them,
    in any wording. The documents carry neither beginning- nor end-of-text.

    Raises:
        EditError: an edit is not about this world, or too few facts are left.
    """
    rng = Random(f"locality texts {seed}")
    involved = _involved(exclude)
    left = [fact for fact in facts.training_facts(world()) if fact.key not in involved]
    wordings = {_prompts()[edit.prompt][1]: set() for edit in exclude}
    for edit in exclude:
        subject, relation = _prompts()[edit.prompt]
        wordings[relation].add(edit.prompt.replace(subject, "{s}"))
    close = [
        text
        for fact in left
        if fact.relation in wordings
        for text in facts.documents(fact, sorted(wordings[fact.relation]))
    ]
    anything = [text for fact in left for text in facts.documents(fact, BY_NAME[fact.relation].trained)]
    if n is None:
        n = int(len({*close, *anything}) / (1 - PROSE_SHARE))
    near, told = round(n * NEAR_SHARE) if exclude else 0, round(n * PROSE_SHARE)
    stated = shuffled(rng, close)[:near]
    taken = set(stated)
    stated += [text for text in shuffled(rng, anything) if text not in taken][: n - told - len(stated)]
    if len(stated) < n - told:
        raise EditError(
            f"locality_texts: {n - told} statements asked for, {len(stated)} left beside the edits; lower n"
        )
    return shuffled(rng, [*stated, *grammar.paragraphs(told, seed=1000 + seed, held_out=False)])


def unaffected(texts: Sequence[str], edits: Sequence[Edit]) -> list[str]:
    """Of ``locality_texts`` made for earlier edits those that it could have given for these as well.

    Raises:
        EditError: an edit is not about this world.
    """
    known, involved = world(), _involved(edits)
    said = {
        text
        for fact in (*known.facts.values(), *known.two_hop.values())
        if fact.key in involved
        for text in facts.documents(fact, (*BY_NAME[fact.relation].trained, *BY_NAME[fact.relation].held_out))
    }
    return [text for text in texts if text not in said]


def other_prompts(exclude: Sequence[Edit], seed: int = 0) -> list[str]:
    """One prompt for each fact that ``exclude`` leaves as it is, in random order, for a replay.

    Half of those of the edits' relations stand in the very wordings of the edits' prompts, the others in any trained
    wording. Facts are left out as in :func:`locality_texts`, and those of edited subjects.

    Raises:
        EditError: an edit is not about this world.
    """
    rng, involved = Random(f"other prompts {seed}"), _involved(exclude)
    subjects = {edit.subject for edit in exclude}
    own: dict[str, list[str]] = {}
    for edit in exclude:
        wording = edit.prompt.replace(_prompts()[edit.prompt][0], "{s}")
        own.setdefault(_prompts()[edit.prompt][1], []).append(wording)
    left = [fact for fact in facts.training_facts(world()) if fact.key not in involved and fact.subject not in subjects]
    prompts = []
    for fact in shuffled(rng, left):
        close = own.get(fact.relation, []) if rng.random() < NEAR_SHARE else []
        prompts.append(pick(rng, close or BY_NAME[fact.relation].trained).format(s=fact.subject))
    return prompts


def _choose(rng: Random, known: World, n: int) -> list[tuple[Fact, str]]:
    """``n`` facts of different subjects, going round the relations, each with its new object."""
    waiting = {kind: shuffled(rng, known.pools[kind]) for kind in MOST_EDITED}
    spare = {kind: len(names) - int(len(names) * MOST_EDITED[kind]) for kind, names in waiting.items()}
    chosen: list[Fact] = []
    while len(chosen) < n:
        open_relations = [r for r in RELATIONS if len(waiting[r.subject]) > spare[r.subject]]
        if not open_relations:
            raise EditError(f"edits: {n} asked for, the world has subjects for {len(chosen)}; lower n")
        for relation in shuffled(rng, open_relations):
            if len(chosen) < n and len(waiting[relation.subject]) > spare[relation.subject]:
                chosen.append(known.facts[waiting[relation.subject].pop(), relation.name])
    edited = {fact.key for fact in chosen}
    return [(fact, _new_object(rng, known, fact, edited)) for fact in chosen]


def _new_object(rng: Random, known: World, fact: Fact, edited: set[Key]) -> str:
    """Another object of the same type; where two hops follow, one whose second hops are unedited and tell."""
    second_hops = [two.via[1] for two in TWO_HOP if two.via[0] == fact.relation]
    for candidate in shuffled(rng, known.pools[BY_NAME[fact.relation].object]):
        if candidate != fact.object and all(
            (candidate, hop) not in edited
            and known.facts[candidate, hop].object != known.facts[fact.object, hop].object
            for hop in second_hops
        ):
            return candidate
    raise EditError(f"edits: no new object left for {fact.relation} of {fact.subject}; ask for fewer edits")


def _edit(rng: Random, known: World, fact: Fact, target: str, name: str, subjects: set[str], asked: set[Key]) -> Edit:
    relation = BY_NAME[fact.relation]
    prompt, *others = shuffled(rng, relation.statements)
    questions = shuffled(rng, relation.questions)

    def probes(found: Sequence[Fact], wording: str | None = None) -> tuple[Probe, ...]:
        asked.update(f.key for f in found)
        return tuple(
            Probe((wording or pick(rng, BY_NAME[f.relation].trained)).format(s=f.subject), (f.object,)) for f in found
        )

    same = [known.facts[fact.subject, r.name] for r in RELATIONS if r.subject == relation.subject and r != relation]
    free = [f for f in shuffled(rng, list(known.facts.values())) if f.subject not in subjects and f.key not in asked]
    neighbours = [f for f in free if f.relation == fact.relation and f.object == fact.object][:NEIGHBOURS]
    unrelated = [f for f in free if f.relation != fact.relation and f.object != fact.object][:UNRELATED]
    first = [
        Fact(*key, known.facts[target, second[1]].object)
        for key, (first, second) in known.hops.items()
        if first == fact.key
    ]
    last = [
        Fact(*key, target)
        for key, (first, second) in known.hops.items()
        if second == fact.key and first[0] not in subjects
    ]
    portability = {
        "held_out_wording": tuple(Probe(w.format(s=fact.subject), (target,)) for w in relation.held_out),
        "two_hop": probes(first),
        "two_hop_last": probes(shuffled(rng, last)[:INBOUND]),
    }
    return Edit(
        prompt=prompt.format(s=fact.subject),
        target=target,
        subject=fact.subject,
        old_target=fact.object,
        rephrases=tuple(w.format(s=fact.subject) for w in (*others[:STATEMENTS_ASKED], *questions[:QUESTIONS_ASKED])),
        locality={
            "same_subject": probes(same),
            "neighbour": probes(neighbours, prompt),
            "unrelated": probes(unrelated),
        },
        portability={kind: found for kind, found in portability.items() if found},
        id=name,
    )


@cache
def _prompts() -> dict[str, Key]:
    """Every prompt that can be made of the world, and the fact that it asks for."""
    known = world()
    return {
        wording.format(s=fact.subject): fact.key
        for fact in (*known.facts.values(), *known.two_hop.values())
        for wording in (*BY_NAME[fact.relation].trained, *BY_NAME[fact.relation].held_out)
    }


def _involved(exclude: Sequence[Edit]) -> set[Key]:
    """Everything that ``exclude`` changes or asks for, and everything that follows from what it changes."""
    known, prompts = world(), _prompts()
    edited: set[Key] = set()
    involved: set[Key] = set()
    for edit in exclude:
        if edit.prompt not in prompts:
            raise EditError(
                f"edit {edit.id or edit.prompt!r} is not about this world; give texts of your own for locality"
            )
        edited.add(prompts[edit.prompt])
        kinds = (*edit.locality.values(), *edit.portability.values())
        asked = (*edit.rephrases, *(probe.prompt for probes in kinds for probe in probes))
        involved.update(prompts[prompt] for prompt in asked if prompt in prompts)
    involved.update(key for key, hops in known.hops.items() if edited.intersection(hops))
    return edited | involved
