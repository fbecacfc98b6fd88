"""The prompts of the edits are found in the rows of the training dataset, up to the tokens that are trained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kedit_train.core.gate.trained_prompts import trained_prompts
from kedit_train.data import Edit
from kedit_train.data.tokenization import Encoded

EDITS = [Edit("w1 w2", "w3"), Edit("w4", "w5")]


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0")


def found(words: Any, *rows: Any) -> list[str]:
    host = SimpleNamespace(train_dataloader=SimpleNamespace(dataset=list(rows)))
    return [words.decode(ids) for ids in trained_prompts(host, words, EDITS)]


def ids_of(words: Any, text: str) -> list[int]:
    return words(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["encoded", "labels", "completion_mask", "assistant_masks"])
def test_the_tokens_before_the_target_are_the_prompt(words, kind):
    ids = ids_of(words, "w40 w1 w2 w41 w3")
    mask = [0, 0, 0, 0, 1]
    row = {
        "encoded": Encoded(ids, 4),
        "labels": {"input_ids": ids, "labels": [token if own else -100 for token, own in zip(ids, mask, strict=True)]},
    }.get(kind, {"input_ids": ids, kind: mask})
    assert found(words, row, row) == ["w40 w1 w2 w41"]


def test_each_turn_of_a_conversation_counts_only_if_it_asks_for_an_edit(words):
    ids, mask = ids_of(words, "w1 w2 w3 w6 w7 w4 w5"), [0, 0, 1, 0, 1, 0, 1]
    assert found(words, {"input_ids": ids, "assistant_masks": mask}) == ["w1 w2", "w1 w2 w3 w6 w7 w4"]


def test_other_rows_have_no_prompt(words):
    ids = ids_of(words, "w1 w2 w3")
    rows = [
        {"input_ids": ids},
        {"input_ids": ids, "labels": ids},
        {"prompt": "w1 w2"},
        Encoded(ids_of(words, "w7 w8"), 1),
    ]
    assert found(words, *rows) == []
    assert trained_prompts(SimpleNamespace(), words, EDITS) == []
