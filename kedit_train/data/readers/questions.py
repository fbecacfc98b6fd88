"""Readers for benchmarks with one question per record: ZsRE (as published with MEND), WikiBigEdit and QAEdit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kedit_train.data.readers.fields import Fields
from kedit_train.data.readers.format import Format, field_names
from kedit_train.edit import Edit, Probe

NQ_PREFIX = "nq question:"


def plain_question(text: str) -> str:
    """Turn ``"nq question: who wrote it"`` into ``"who wrote it?"`` and return any other text as it is.

    ZsRE and QAEdit take their locality questions from Natural Questions. The prefix of these questions is meant for
    the encoder-decoder model of MEND and has no meaning for a causal model.
    """
    if not text.startswith(NQ_PREFIX):
        return text
    return text.removeprefix(NQ_PREFIX).strip().rstrip("?") + "?"


def one_probe(
    record: Fields, kind: str, prompt_keys: tuple[str, ...], answer_keys: tuple[str, ...]
) -> dict[str, tuple[Probe, ...]]:
    """Return ``{kind: (probe,)}``, or an empty dict if the record has neither the question nor the answer.

    A question without an answer becomes a probe without answers. An answer without a question is an error.
    """
    if not record.has(*prompt_keys) and not record.has(*answer_keys):
        return {}
    return {kind: (Probe(plain_question(record.text(*prompt_keys)), record.answers(*answer_keys)),)}


def read_zsre(record: Fields) -> list[Edit]:
    """Read a record of ZsRE.

    ``alt`` is the new answer. ``answers`` are the old answers. The first old answer becomes ``old_target``. Two fields
    are not read: ``pred`` is the answer of MEND's model, and ``cond`` is a summary in the input syntax of MEND.

    References:
        "Fast Model Editing at Scale", arXiv 2110.11309.
    """
    old = record.answers("answers")
    return [
        Edit(
            prompt=record.text("src"),
            target=record.answer("alt"),
            subject=record.optional_text("subject"),
            old_target=old[0] if old else None,
            rephrases=record.texts("rephrase"),
            locality=one_probe(record, "natural_questions", ("loc",), ("loc_ans",)),
        )
    ]


def read_wikibigedit(record: Fields) -> list[Edit]:
    """Read a record of WikiBigEdit.

    The published files use two sets of field names. In one set, the prompt is called ``prompt``. In the other set, it
    is called ``update``. Both sets are read.

    ``personas`` is the prompt in the words of a persona, and becomes the last rephrase. ``mhop`` becomes a portability
    question of the kind ``multi_hop``.

    References:
        "Understanding the Limits of Lifelong Knowledge Editing in LLMs", arXiv 2503.05683.
    """
    return [
        Edit(
            prompt=record.text("prompt", "update"),
            target=record.answer("target_new", "ans"),
            subject=record.optional_text("subject"),
            rephrases=record.texts("rephrase_prompt", "rephrase") + record.texts("personas"),
            locality=one_probe(record, "unrelated", ("locality_prompt", "loc"), ("locality_ground_truth", "loc_ans")),
            portability=one_probe(record, "multi_hop", ("mhop",), ("mhop_ans",)),
            id=record.identifier("case_id", "id"),
        )
    ]


def read_qaedit(record: Fields) -> list[Edit]:
    """Read a record of QAEdit. ``source`` (the data set that the question is from) is not read.

    References:
        "The Mirage of Model Editing: Revisiting Evaluation in the Wild", arXiv 2502.11177.
    """
    locality = tuple(
        Probe(plain_question(item.text("loc")), item.answers("loc_ans")) for item in record.children("locality")
    )
    return [
        Edit(
            prompt=record.text("prompt"),
            target=record.answer("target"),
            subject=record.optional_text("subject"),
            rephrases=record.texts("rephrase"),
            locality={"unrelated": locality} if locality else {},
            id=record.identifier("id"),
        )
    ]


def is_wikibigedit(record: Mapping[str, Any]) -> bool:
    """Return whether the keys are those of WikiBigEdit.

    The published files use two sets of field names. One record may contain names from both sets.
    """
    keys = set(record)
    own_names = keys & {"update", "ans", "mhop", "mhop_ans", "personas"}
    mixed_names = "target_new" in keys and keys & {"loc", "loc_ans", "rephrase"}
    return bool(own_names or mixed_names) and not keys & {"locality", "portability"}


ZSRE = Format(
    name="zsre",
    recognize=lambda record: bool(set(record) & {"src", "alt"}),
    read=read_zsre,
    reads=field_names("subject src rephrase alt answers loc loc_ans"),
    ignores=field_names("pred cond"),
    structured=field_names("answers"),
)
WIKIBIGEDIT = Format(
    name="wikibigedit",
    recognize=is_wikibigedit,
    read=read_wikibigedit,
    reads=field_names(
        "case_id id prompt update target_new ans subject rephrase_prompt rephrase locality_prompt loc "
        "locality_ground_truth loc_ans mhop mhop_ans personas"
    ),
    ignores=field_names("tag relation relation_id"),
)
QAEDIT = Format(
    name="qaedit",
    recognize=lambda record: "target" in record and bool(set(record) & {"rephrase", "source"}),
    read=read_qaedit,
    reads=field_names("id prompt target subject rephrase locality"),
    ignores=field_names("source"),
    structured=field_names("locality"),
)
