"""Readers for benchmarks that test the consequences of an edit: RippleEdits, UniEdit and HalluEditBench."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from kedit_train.data.readers.fields import Fields
from kedit_train.data.readers.format import Format, field_names
from kedit_train.data.tokenization import shorten
from kedit_train.edit import Edit, Probe

# The criteria of RippleEdits by kind of question. The files spell one criterion in two ways.
_RIPPLE_LOCALITY = ("Relation_Specificity", "Relation_Specifity", "Forgetfulness")
_RIPPLE_PORTABILITY = ("Logical_Generalization", "Subject_Aliasing", "Compositionality_I", "Compositionality_II")
# The words that end the prompt in a sentence of RippleEdits. The target follows.
_BEFORE_TARGET = re.compile(r"\s(?:is followed by|follows|is|are)\s")
_HOPS = range(2, 7)


def read_ripple_edits(record: Fields) -> list[Edit]:
    """Read a record of RippleEdits.

    A record contains the new fact as a sentence, such as "The gender of Ada is female.". The prompt ends after the last
    "is", "are", "follows" or "is followed by" of this sentence. The rest of the sentence is the target.

    A record may also contain the old fact as a sentence (``previous_fact``), such as "The gender of Ada is male.". In
    this case, both sentences must begin with the prompt. The rest of the old sentence becomes the old answer.

    The record names the subject only by a Wikidata identifier, so the edit has no subject.

    RippleEdits has test questions for six criteria. The names of the criteria become the kinds of the questions. The
    questions of ``Relation_Specificity`` and ``Forgetfulness`` become locality questions. The questions of the other
    four criteria become portability questions. ``test_condition`` and ``condition_queries`` are not read. They say
    which questions the unedited model must answer for a test to count.

    References:
        "Evaluating the Ripple Effects of Knowledge Editing in Language Models", arXiv 2307.12976.
    """
    fact = record.child("edit")
    sentence = fact.text("prompt").strip().removesuffix(".")
    previous = fact.child("previous_fact").text("prompt").strip().removesuffix(".") if fact.has("previous_fact") else ""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(sentence, previous, strict=False))
    shared = sum(1 for _ in same) if previous else len(sentence)
    ends = [match.end() for match in _BEFORE_TARGET.finditer(sentence) if match.end() <= shared]
    if not ends or not sentence[ends[-1] :].strip():
        raise fact.error("prompt", 'a sentence with the target after "is", "are" or "follows"', repr(shorten(sentence)))
    return [
        Edit(
            prompt=sentence[: ends[-1]].rstrip(),
            target=sentence[ends[-1] :].strip(),
            old_target=previous[ends[-1] :].strip() or None,
            locality=_ripple_probes(record, _RIPPLE_LOCALITY),
            portability=_ripple_probes(record, _RIPPLE_PORTABILITY),
        )
    ]


def _ripple_probes(record: Fields, kinds: tuple[str, ...]) -> dict[str, tuple[Probe, ...]]:
    """Return the test questions by kind. Questions without a prompt or without an answer are left out."""
    probes: dict[str, tuple[Probe, ...]] = {}
    for kind in kinds:
        queries = [query for test in record.children(kind) for query in test.children("test_queries")]
        pairs = [(query, _ripple_answers(query)) for query in queries if query.has("prompt")]
        made = tuple(dict.fromkeys(Probe(query.text("prompt"), answers) for query, answers in pairs if answers))
        if made:
            probes[kind] = made
    return probes


def _ripple_answers(query: Fields) -> tuple[str, ...]:
    answers: list[str] = []
    for answer in query.children("answers"):
        answers += [answer.answer("value")] if answer.has("value") else []
        aliases = answer.values.get("aliases") or ()
        answers += [alias.strip() for alias in aliases if isinstance(alias, str) and alias.strip()]
    return tuple(dict.fromkeys(answers))


def read_uniedit(record: Fields) -> list[Edit]:
    """Read a record of UniEdit. A file is a mapping from identifiers to records.

    The answers to the questions under ``generality`` differ from the target of the edit. Therefore, these questions
    become portability questions, not rephrases. Their kinds are the values of ``path_type``: "single" (reasoning along
    one chain of facts) and "double" (two chains that lead to one entity). The questions under ``locality`` become
    locality questions, and their kinds are the values of ``loc_type``. The chains of facts (``paths``, ``one_hops``)
    and the Wikidata entries are not read.

    References:
        "UniEdit: A Unified Knowledge Editing Benchmark for Large Language Models", arXiv 2505.12345.
    """
    edit = record.child("edit")
    return [
        Edit(
            prompt=edit.text("prompt"),
            target=edit.answer("target"),
            subject=edit.optional_text("subject"),
            locality=_uniedit_probes(record, "locality", "loc_type"),
            portability=_uniedit_probes(record, "generality", "path_type"),
            id=record.identifier("id"),
        )
    ]


def _uniedit_probes(record: Fields, key: str, kind: str) -> dict[str, tuple[Probe, ...]]:
    probes: dict[str, tuple[Probe, ...]] = {}
    if not record.has(key):
        return probes
    questions = record.child(key)
    for number in questions.values:
        question = questions.child(number)
        name = question.text(kind) if question.has(kind) else "other"
        probe = Probe(question.text("prompt"), question.answers("target"))
        probes[name] = (*probes.get(name, ()), probe)
    return probes


def read_hallueditbench(record: Fields) -> list[Edit]:
    """Read a row of HalluEditBench.

    ``question`` is the prompt and ``object`` is the target. ``paraphrased_question`` becomes the rephrase.
    ``locality_question`` becomes a locality question without an answer. The portability questions have these kinds:

    - ``yes`` and ``no``: the right answer is "Yes" or "No".
    - ``reversed``: the right answer is the subject of the edit.
    - ``2_hops`` to ``6_hops``: the question needs a chain of 2 to 6 facts.

    The multiple-choice questions are not read. The fields ``output_...`` and ``eval_...`` are about the answers of one
    model and are not read.

    References:
        "Can Knowledge Editing Really Correct Hallucinations?", arXiv 2410.16251.
    """
    subject = record.optional_text("subject")
    asked = [
        ("yes", "yes_question", ("Yes",)),
        ("no", "no_question", ("No",)),
        ("reversed", "reversed_relation_question", (subject,) if subject else ()),
        *((f"{n}_hops", f"question_{n}hop", record.answers(f"answer_{n}hop")) for n in _HOPS),
    ]
    locality = record.texts("locality_question")
    return [
        Edit(
            prompt=record.text("question"),
            target=record.answer("object"),
            subject=subject,
            rephrases=record.texts("paraphrased_question"),
            locality={"attribute": tuple(map(Probe, locality))} if locality else {},
            portability={kind: (Probe(record.text(key), right),) for kind, key, right in asked if record.has(key)},
        )
    ]


def _is_ripple_edits(record: Mapping[str, Any]) -> bool:
    return "edit" in record and bool(set(record) & {"example_type", *_RIPPLE_LOCALITY, *_RIPPLE_PORTABILITY})


RIPPLE_EDITS = Format(
    name="rippleedits",
    recognize=_is_ripple_edits,
    read=read_ripple_edits,
    reads=field_names("edit") | {*_RIPPLE_LOCALITY, *_RIPPLE_PORTABILITY},
    ignores=field_names("example_type"),
    structured=field_names("edit") | {*_RIPPLE_LOCALITY, *_RIPPLE_PORTABILITY},
)
UNIEDIT = Format(
    name="uniedit",
    recognize=lambda record: isinstance(record.get("edit"), Mapping) and not _is_ripple_edits(record),
    read=read_uniedit,
    reads=field_names("id edit generality locality"),
    structured=field_names("edit generality locality"),
)
HALLUEDITBENCH = Format(
    name="hallueditbench",
    recognize=lambda record: {"object", "question"} <= set(record),
    read=read_hallueditbench,
    reads=field_names(
        "subject object question paraphrased_question locality_question yes_question no_question "
        "reversed_relation_question " + " ".join(f"question_{n}hop answer_{n}hop" for n in _HOPS)
    ),
    ignores=field_names("topic relation multiple_choices multiple_choice_with_letters multiple_choice_labels"),
    ignored_prefixes=("output_", "eval_"),
)
