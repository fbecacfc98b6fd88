"""ROUGE-L against a reference from its formula, and the metric "overlap" of an evaluation."""

from __future__ import annotations

import random
from typing import Any

import pytest

from kedit_train.data import Edit
from kedit_train.evaluation import EvaluationOptions, evaluate
from kedit_train.evaluation.reporting.report_lines import score_lines
from kedit_train.evaluation.scoring.overlap import rouge_l


def by_formula(answer: list[str], reference: list[str]) -> float:
    """The F-measure 2PR / (P + R) of the longest common subsequence, found by trying all pairs of prefixes."""
    lengths = {(i, j): 0 for i in range(len(answer) + 1) for j in range(len(reference) + 1)}
    for i, a in enumerate(answer, start=1):
        for j, b in enumerate(reference, start=1):
            same = lengths[i - 1, j - 1] + 1
            lengths[i, j] = same if a == b else max(lengths[i - 1, j], lengths[i, j - 1])
    common = lengths[len(answer), len(reference)]
    precision, recall = common / len(answer), common / len(reference)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def test_it_equals_the_formula_on_random_texts() -> None:
    draw = random.Random(0)
    for _ in range(50):
        answer, reference = (draw.choices("abcdef", k=draw.randint(1, 12)) for _ in range(2))
        assert rouge_l(" ".join(answer), [" ".join(reference)]) == pytest.approx(
            by_formula(answer, reference), abs=1e-5
        )


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("The ferry, at NOON!", ["the ferry at noon"], 1.0),
        ("", ["the ferry"], 0.0),
        ("noon", ["the ferry", "at noon"], 2 / 3),
        ("Zürich ÜBER alles", ["zürich über"], 0.8),
        ("鐘は鳴る", ["鐘が鳴る"], 0.75),
    ],
)
def test_case_punctuation_scripts_and_several_references(answer: str, references: list[str], expected: float) -> None:
    assert rouge_l(answer, references) == pytest.approx(expected, abs=1e-5)


@pytest.mark.filterwarnings("ignore:.*ends each answer at the first line break")
def test_an_evaluation_compares_whole_texts_of_several_lines(scripted_model: Any) -> None:
    text = "Orla runs the ferry.\n\nIt sails at noon."
    edit = Edit("The ferry\n\n", text, rephrases=("On the ferry: ",))
    model, tokenizer = scripted_model({"The ferry\n\n": text, "On the ferry: ": "Orla runs the bell."})
    options = EvaluationOptions(metrics=["overlap"], protocol="exact", max_new_tokens=4)
    unedited = evaluate(*scripted_model({"The ferry\n\n": "Nothing", "On the ferry: ": ""}), [edit], options=options)
    report = evaluate(model, tokenizer, [edit], options=options, unedited=unedited)
    assert report.metrics["overlap"]["prompt"].value == 1.0
    # Three of four words, of a target of eight words.
    assert report.metrics["overlap"]["rephrase"].value == pytest.approx(2 * 3 / (4 + 8), abs=1e-5)
    assert unedited.metrics["overlap"]["prompt"].value == 0.0
    lines = {line.label: (line.unedited.value, line.edited.value) for line in score_lines(report)}
    assert lines["overlap with the target (ROUGE-L)"] == (0.0, 1.0)
    # The other scores still end an answer at the first line break, after four tokens.
    answers = {(r.question, r.kind): r.answer for r in report.answers}
    assert answers["reliability", "prompt"] == "Orla"
    assert answers["overlap", "prompt"] == text
    assert [r.before for r in report.answers if r.question == "overlap"] == ["Nothing", ""]


def test_without_the_metric_nothing_is_generated(scripted_model: Any) -> None:
    report = evaluate(*scripted_model({"p": "t"}), [Edit("p", "t")])
    assert report.metrics["overlap"]["prompt"].n == 0
    assert {result.question for result in report.answers} == {"reliability"}
