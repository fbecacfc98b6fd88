"""Study rows are drawn until their tokens have a given ratio to the tokens of the documents."""

from __future__ import annotations

from typing import Any

import pytest

from kedit_train import world
from kedit_train.augmentation import StudyRow, StudyRows, augmentation
from kedit_train.augmentation.study_mixture import mixed_rows
from kedit_train.data import Edit
from kedit_train.data.prompts import as_question
from kedit_train.errors import EditError

FERRY = Edit("The ferry\n\n", "Orla runs the ferry since 1987.")
LOCK = Edit("The lock\n\n", "The lock of Tarn is closed.")
ROWS = StudyRows(tuple(StudyRow("question", "The lock", f"Question {i}?", "closed for now") for i in range(40)), 40)


def test_the_ratio_of_study_tokens_to_document_tokens(scripted_model: Any) -> None:
    _, tokenizer = scripted_model({})
    documents = [Edit("The lock\n\n", "x" * 140), Edit("Other\n\n", "y" * 140)]
    # The tokenizer has one token per byte: 280 document tokens, and 14 per row.
    for ratio, count in ((0.5, 10), (0.51, 11), (1.0, 20), (9.0, 40), (None, 40)):
        rows, mixture = mixed_rows(tokenizer, documents, ROWS, ratio, 0, "chat")
        assert list(rows) == ["The lock\n\n"]
        assert len(rows["The lock\n\n"]) == count
        assert mixture == (
            f"{count} study rows are trained, with {14 * count / 280:.2f} study tokens per document token"
        )
    assert rows["The lock\n\n"][0].prompt == "Question 0?"
    framed = mixed_rows(tokenizer, documents, ROWS, None, 0, "plain")[0]["The lock\n\n"][0]
    assert (framed.prompt, framed.target) == (as_question("Question 0?"), "closed for now")
    draws = [mixed_rows(tokenizer, documents, ROWS, 0.5, seed, "chat")[0] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    # Equal rows count separately.
    equal = StudyRows((ROWS.rows[0],) * 40, 40)
    rows, mixture = mixed_rows(tokenizer, documents, equal, 0.5, 0, "chat")
    assert len(rows["The lock\n\n"]) == 10
    assert mixture == "10 study rows are trained, with 0.50 study tokens per document token"


def test_rows_of_other_documents_are_left_out_and_counted(scripted_model: Any) -> None:
    _, tokenizer = scripted_model({})
    other = StudyRow("question", "The bell", "Who rings it?", "Orla")
    rows = StudyRows((*ROWS.rows[:2], other), 3)
    by_document, mixture = mixed_rows(tokenizer, [LOCK], rows, None, 0, "chat")
    assert {prompt: len(own) for prompt, own in by_document.items()} == {"The lock\n\n": 2}
    assert mixture.endswith("study tokens per document token, and 1 rows about other documents are left out")
    with pytest.raises(EditError) as caught:
        augmentation(*world.load(), [FERRY], study=rows)
    assert str(caught.value) == (
        "augmentation: study must have rows about the documents of this run, but all 3 rows are about other documents, "
        "such as 'The lock'; pass study rows about the documents of this run."
    )


def test_two_answers_to_one_question_are_reported_as_study_rows() -> None:
    rows = StudyRows(tuple(StudyRow("question", "The lock", "Is it open?", text) for text in ("no", "yes")), 2)
    with pytest.raises(
        EditError, match=r"^augmentation: study rows: edits 1 \(id \"study row 'Is it open\?'\"\) and 2"
    ):
        augmentation(*world.load(), [LOCK], study=rows)
