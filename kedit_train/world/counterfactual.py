"""Counterfactual edits for the bundled model, and texts and prompts that these edits do not affect."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from random import Random

from kedit_train.arguments import cut
from kedit_train.edit import Edit, Probe, scored_prompts
from kedit_train.errors import EditError
from kedit_train.world import facts, grammar
from kedit_train.world.facts import Fact, Key, World, pick, shuffled
from kedit_train.world.templates import BY_NAME, RELATIONS, TWO_HOP

# For each type, the largest fraction of subjects that may be edited. New answers need unedited companies and cities.
MOST_EDITED = {"person": 1.0, "company": 0.5, "city": 0.5}
EDITS = 24  # training on this many edits takes half a minute
STATEMENTS_ASKED, QUESTIONS_ASKED = 3, 2
NEIGHBOURS, UNRELATED, INBOUND = 2, 2, 2
SAME_WORDING_SHARE, PROSE_SHARE = 0.5, 0.25


@cache
def world() -> World:
    """Return the invented facts that the bundled model was trained on."""
    return facts.build()


def edits(n: int = EDITS, seed: int = 0) -> list[Edit]:
    """Return counterfactual edits of the bundled model, about different subjects and with mixed relations.

    Each edit has:

    * ``prompt``: an incomplete sentence that the bundled model was trained to complete with the old answer.
    * ``rephrases``: three other incomplete sentences and two questions about the same fact.
    * ``locality``: prompts about facts that the edits do not change.

      * ``same_subject``: prompts about other facts of the edited subject.
      * ``neighbour``: prompts about other subjects, in the wording of ``prompt``. The right answer is the old answer
        of the edit.
      * ``unrelated``: prompts about other relations of other subjects.

    * ``portability``: prompts whose answers change with the edit.

      * ``held_out_wording``: prompts about the edited fact, in wordings that no training document contains.
      * ``two_hop``: prompts about a fact that follows from the edited fact and a second fact. For example, the edit
        changes the birthplace of Ada, and the prompt asks for the river of the birthplace of Ada.
      * ``two_hop_last``: as ``two_hop``, but the edit changes the second fact, for example the river of the city in
        which Ada was born.

    The locality and portability prompts of an edit depend on all returned edits, so ``edits(2)`` differs from
    ``edits(4)[:2]``.

    Args:
        n: number of edits. Default: 24, the number of edits that ``EditDataset.load("world")`` loads.
        seed: seed of all random choices.

    Raises:
        EditError: there are too few subjects for ``n`` edits.

    Example:
        >>> edit = edits(1)[0]
        >>> len(edit.rephrases), sorted(edit.locality)
        (5, ['neighbour', 'same_subject', 'unrelated'])
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


def locality_texts(exclude: Sequence[Edit], n: int | None = 4096, seed: int = 0) -> list[str]:
    """Return texts for a locality penalty. The texts stay true after the edits.

    The texts are of three kinds:

    * Up to half of the texts state unedited facts in the wording of an edit's prompt. Side effects of edits appear
      first in such texts.
    * A quarter of the texts are prose from the training data. They state no facts.
    * The remaining texts state unedited facts in wordings drawn at random from the training documents.

    A fact is left out if an edit changes it, if it follows from a changed fact, or if an evaluation prompt of an edit
    asks about it. The texts contain no evaluation prompt of the edits and no special tokens.

    Args:
        exclude: the edits. With an empty list, no fact is left out, so the texts may contain evaluation prompts.
        n: number of texts. None returns as many texts as possible. The result may have slightly fewer texts than
            ``n``, because texts that contain an evaluation prompt in a longer sentence are removed at the end.
        seed: seed of the random choice.

    Raises:
        EditError: an edit is not about a fact of the bundled model, or too few facts are left.

    Example:
        >>> len(locality_texts(edits(4), n=8))
        8
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
    same_wording, prose = round(n * SAME_WORDING_SHARE) if exclude else 0, round(n * PROSE_SHARE)
    stated = shuffled(rng, close)[:same_wording]
    taken = set(stated)
    stated += [text for text in shuffled(rng, anything) if text not in taken][: n - prose - len(stated)]
    if len(stated) < n - prose:
        raise EditError(
            f"n={n} needs {n - prose} statements of unedited facts, but only {len(stated)} are left; lower n",
            "locality_texts",
        )
    drawn = shuffled(rng, [*stated, *grammar.paragraphs(prose, seed=1000 + seed, held_out=False)])
    # Leaks are left out after the draw and are not replaced, so that they do not change the other draws.
    leaks = _statements_with_prompts(left, exclude, wordings)
    return [text for text in drawn if text not in leaks]


def unaffected(texts: Sequence[str], edits: Sequence[Edit]) -> list[str]:
    """Remove the texts that new edits affect, and return the other texts.

    A text is removed if it states a fact that an edit changes, a fact that follows from a changed fact, or a fact that
    an evaluation prompt of an edit asks about.

    Args:
        texts: texts that :func:`locality_texts` returned for previous edits.
        edits: new edits.

    Raises:
        EditError: an edit is not about a fact of the bundled model.

    Example:
        >>> first, second = edits(2)
        >>> texts = locality_texts([first], n=64)
        >>> set(unaffected(texts, [second])) <= set(texts)
        True
    """
    known, involved = world(), _involved(edits)
    affected = {
        text
        for fact in (*known.facts.values(), *known.two_hop.values())
        if fact.key in involved
        for text in facts.documents(fact, (*BY_NAME[fact.relation].trained, *BY_NAME[fact.relation].held_out))
    }
    return [text for text in texts if text not in affected]


def other_prompts(exclude: Sequence[Edit], seed: int = 0) -> list[str]:
    """Return prompts for a replay buffer. They ask about facts that the edits do not change.

    There is one prompt per fact, in random order. No prompt asks about an edited subject, or about a fact that
    :func:`locality_texts` leaves out. If a fact has the relation of an edit, its prompt has the wording of this edit's
    prompt with a probability of one half. All other wordings are drawn at random from the training documents.

    Args:
        exclude: the edits.
        seed: seed of the order and of the wordings.

    Raises:
        EditError: an edit is not about a fact of the bundled model.

    Example:
        >>> prompts = other_prompts(edits(2))
        >>> len(prompts) == len(set(prompts))
        True
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
        close = own.get(fact.relation, []) if rng.random() < SAME_WORDING_SHARE else []
        prompts.append(pick(rng, close or BY_NAME[fact.relation].trained).format(s=fact.subject))
    return prompts


def _choose(rng: Random, known: World, n: int) -> list[tuple[Fact, str]]:
    """Choose ``n`` facts about different subjects, and a new object for each fact.

    The function takes one fact of each relation, in random order, and repeats this until it has ``n`` facts.
    ``MOST_EDITED`` limits the number of edited people, companies and cities.
    """
    waiting = {kind: shuffled(rng, known.pools[kind]) for kind in MOST_EDITED}
    spare = {kind: len(names) - int(len(names) * MOST_EDITED[kind]) for kind, names in waiting.items()}
    chosen: list[Fact] = []
    while len(chosen) < n:
        open_relations = [r for r in RELATIONS if len(waiting[r.subject]) > spare[r.subject]]
        if not open_relations:
            raise EditError(
                f"n must be at most {len(chosen)} (the number of subjects that can be edited), got {n}; lower n",
                "edits",
            )
        for relation in shuffled(rng, open_relations):
            if len(chosen) < n and len(waiting[relation.subject]) > spare[relation.subject]:
                chosen.append(known.facts[waiting[relation.subject].pop(), relation.name])
    edited = {fact.key for fact in chosen}
    return [(fact, _new_object(rng, known, fact, edited)) for fact in chosen]


def _new_object(rng: Random, known: World, fact: Fact, edited: set[Key]) -> str:
    """Choose a new object for a fact, of the same type as the old object.

    The new object also changes the answers of all two-hop facts that begin with this fact. For example, a new
    birthplace must have another river than the old birthplace, and no edit may change the river of the new birthplace.
    """
    second_hops = [two.via[1] for two in TWO_HOP if two.via[0] == fact.relation]
    for candidate in shuffled(rng, known.pools[BY_NAME[fact.relation].object]):
        if candidate != fact.object and all(
            (candidate, hop) not in edited
            and known.facts[candidate, hop].object != known.facts[fact.object, hop].object
            for hop in second_hops
        ):
            return candidate
    raise EditError(
        f"no new answer is left for the relation {fact.relation} of the subject {fact.subject}; lower n", "edits"
    )


def _edit(rng: Random, known: World, fact: Fact, target: str, name: str, subjects: set[str], asked: set[Key]) -> Edit:
    relation = BY_NAME[fact.relation]
    prompt, *others = shuffled(rng, relation.statements)
    questions = shuffled(rng, relation.questions)

    def probes(probed: Sequence[Fact], wording: str | None = None) -> tuple[Probe, ...]:
        asked.update(f.key for f in probed)
        return tuple(
            Probe((wording or pick(rng, BY_NAME[f.relation].trained)).format(s=f.subject), (f.object,)) for f in probed
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
        portability={kind: kept for kind, kept in portability.items() if kept},
        id=name,
    )


@cache
def _prompts() -> dict[str, Key]:
    """Return a dict from each prompt to the key of the fact that it asks about, for all facts and wordings."""
    known = world()
    return {
        wording.format(s=fact.subject): fact.key
        for fact in (*known.facts.values(), *known.two_hop.values())
        for wording in (*BY_NAME[fact.relation].trained, *BY_NAME[fact.relation].held_out)
    }


def _involved(exclude: Sequence[Edit]) -> set[Key]:
    """Return the keys of all facts that the edits change or test, and of all facts that follow from changed facts."""
    known, prompts = world(), _prompts()
    edited: set[Key] = set()
    involved: set[Key] = set()
    for edit in exclude:
        if edit.prompt not in prompts:
            raise EditError(
                f"edit {cut(repr(edit.id or edit.prompt))} is not about a fact of the bundled model, so the bundled "
                "texts and prompts cannot be used for it; pass your own texts or prompts"
            )
        edited.add(prompts[edit.prompt])
        involved.update(prompts[prompt] for prompt in scored_prompts(edit) if prompt in prompts)
    involved.update(key for key, hops in known.hops.items() if edited.intersection(hops))
    return edited | involved


def _statements_with_prompts(
    left: Sequence[Fact], exclude: Sequence[Edit], wordings: Mapping[str, Collection[str]]
) -> set[str]:
    """Return all statements of the facts in ``left`` that contain the prompt or an evaluation prompt of an edit.

    For example, the statement "The river of the birthplace of Ada is ..." contains the prompt "The birthplace of Ada
    is". Letter case is ignored.

    Args:
        left: facts that stay true after the edits.
        exclude: the edits.
        wordings: dict from relation to additional wordings. Each fact is stated in these wordings and in the wordings
            of the training documents.
    """
    # A statement contains a prompt only if both are about the same subject.
    prompts: dict[str, list[str]] = {}
    for prompt in (prompt for edit in exclude for prompt in (edit.prompt, *scored_prompts(edit))):
        if prompt in _prompts():
            prompts.setdefault(_prompts()[prompt][0], []).append(prompt.lower())
    return {
        text
        for fact in left
        if fact.subject in prompts
        for text in facts.documents(fact, (*BY_NAME[fact.relation].trained, *wordings.get(fact.relation, ())))
        if any(prompt in text.lower() for prompt in prompts[fact.subject])
    }
