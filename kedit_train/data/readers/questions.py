"""Benchmarks of one question a record: ZsRE as MEND publishes it, WikiBigEdit, QAEdit.

The locality questions of ZsRE and QAEdit come from Natural Questions and carry MEND's prefix ``nq question: `` and
no question mark. The prefix is an instruction to the encoder-decoder that MEND was made for and means nothing to a
causal model, so it is taken off and a question mark is put at the end; the words themselves stay as published.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kedit_train.data.readers.fields import Fields
from kedit_train.data.readers.format import Format, words
from kedit_train.edit import Edit, Probe

NQ_PREFIX = "nq question:"


def plain_question(text: str) -> str:
    """``"nq question: who wrote it"`` -> ``"who wrote it?"``; any other text as it is."""
    if not text.startswith(NQ_PREFIX):
        return text
    return text.removeprefix(NQ_PREFIX).strip().rstrip("?") + "?"


def one_probe(
    record: Fields, kind: str, prompt_keys: tuple[str, ...], answer_keys: tuple[str, ...]
) -> dict[str, tuple[Probe, ...]]:
    """``{kind: (probe,)}``, or nothing where the record has neither prompt nor answer.

    A prompt without an answer still asks "did it change?"; an answer without its prompt is an error.
    """
    if not record.has(*prompt_keys) and not record.has(*answer_keys):
        return {}
    return {kind: (Probe(plain_question(record.text(*prompt_keys)), record.answers(*answer_keys)),)}


def read_zsre(record: Fields) -> list[Edit]:
    """ "Fast Model Editing at Scale" (arXiv 2110.11309). The new answer is ``alt``; ``answers`` are the old truth.

    Of several old answers the first is kept. ``pred`` (what MEND's own model said) and ``cond`` (a summary in MEND's
    input syntax) are not read.
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
    """ "Understanding the Limits of Lifelong Knowledge Editing in LLMs" (arXiv 2503.05683), either set of names.

    ``personas`` asks the same question in somebody's voice: it joins the rephrases, after ``rephrase``. ``mhop`` is
    portability of kind ``multi_hop``.
    """
    return [
        Edit(
            prompt=record.text("prompt", "update"),
            target=record.answer("target_new", "ans"),
            subject=record.optional_text("subject"),
            rephrases=record.texts("rephrase_prompt", "rephrase") + record.texts("personas"),
            locality=one_probe(record, "unrelated", ("locality_prompt", "loc"), ("locality_ground_truth", "loc_ans")),
            portability=one_probe(record, "multi_hop", ("mhop",), ("mhop_ans",)),
            id=record.identity("case_id", "id"),
        )
    ]


def read_qaedit(record: Fields) -> list[Edit]:
    """ "The Mirage of Model Editing" (arXiv 2502.11177). ``source``, the data set of the question, is not read."""
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
            id=record.identity("id"),
        )
    ]


def is_wikibigedit(record: Mapping[str, Any]) -> bool:
    keys = set(record)
    own_names = keys & {"update", "ans", "mhop", "mhop_ans", "personas"}
    mixed_names = "target_new" in keys and keys & {"loc", "loc_ans", "rephrase"}
    return bool(own_names or mixed_names) and not keys & {"locality", "portability"}


ZSRE = Format(
    name="zsre",
    recognise=lambda record: bool(set(record) & {"src", "alt"}),
    read=read_zsre,
    reads=words("subject src rephrase alt answers loc loc_ans"),
    ignores=words("pred cond"),
    structured=words("answers"),
)
WIKIBIGEDIT = Format(
    name="wikibigedit",
    recognise=is_wikibigedit,
    read=read_wikibigedit,
    reads=words(
        "case_id id prompt update target_new ans subject rephrase_prompt rephrase locality_prompt loc "
        "locality_ground_truth loc_ans mhop mhop_ans personas"
    ),
    ignores=words("tag relation relation_id"),
)
QAEDIT = Format(
    name="qaedit",
    recognise=lambda record: "target" in record and bool(set(record) & {"rephrase", "source"}),
    read=read_qaedit,
    reads=words("id prompt target subject rephrase locality"),
    ignores=words("source"),
    structured=words("locality"),
)
