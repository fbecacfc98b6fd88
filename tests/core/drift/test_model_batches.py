"""Batches for statistics: texts with padding, or inputs of a model that reads no text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from core.drift.drift_runs import SEQUENCES, run_on
from torch import nn

from kedit_train.core.drift import model_batches
from kedit_train.core.drift.model_batches import (
    Batch,
    find_text_model,
    holds_model_inputs,
    model_input_batches,
    process_batches,
    text_batches,
)
from kedit_train.errors import EditError

CPU = torch.device("cpu")


def test_texts_are_sorted_by_length_and_padded_on_the_right():
    first, second = text_batches(SEQUENCES, 2, CPU)
    assert first.inputs["input_ids"].tolist() == [[60, 0], [2, 4]]
    assert first.mask is not None
    assert first.mask.tolist() == [[True, False], [True, True]]
    assert second.inputs["input_ids"].shape == (2, 6)


def test_a_batch_without_padding_has_no_mask():
    (batch,) = text_batches([[1, 2], [3, 4]], 2, CPU)
    assert batch.mask is None
    assert batch.real_tokens(torch.zeros(2, 2, 5), "w").shape == (4, 5)


def test_real_tokens_leave_padding_out_of_values_by_sequence_and_of_flat_values():
    batch = next(text_batches(SEQUENCES, 2, CPU))
    values = torch.arange(4.0).reshape(2, 2, 1)
    for shaped in (values, values.reshape(4, 1)):
        assert batch.real_tokens(shaped, "w").flatten().tolist() == [0.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ([torch.zeros(2)], True),
        ([(torch.zeros(2),)], True),
        ([{"input": torch.zeros(2)}], True),
        (["a text"], False),
        ([{"text": "a text"}], False),
        ("a path", False),
        ([], False),
        (3, False),
    ],
)
def test_model_inputs_are_told_from_texts(source: Any, expected: bool):
    assert holds_model_inputs(source) is expected


def test_model_inputs_become_positional_or_keyword_arguments():
    x, mask = torch.zeros(2, 3), torch.tensor([[1, 1], [1, 0]])
    batches = list(model_input_batches([x, (x, 1), {"input": x, "attention_mask": mask}], CPU))
    assert len(batches[0].inputs) == 1
    assert batches[1].inputs[1] == 1
    assert batches[2].mask is not None
    assert batches[2].mask.tolist() == [[True, True], [True, False]]
    assert torch.equal(Batch((x,)).call(nn.Identity()), x)


def test_the_module_that_reads_token_ids_is_found_in_a_wrapper(tiny):
    model = tiny("llama")
    assert find_text_model(run_on(nn.ModuleDict({"inner": model}), ["down_proj"])) is model
    with pytest.raises(EditError, match=r"Sequential has no module that reads token ids, .* the model's inputs"):
        find_text_model(run_on(nn.Sequential(nn.Linear(3, 3)), ["0"]))


@pytest.mark.parametrize("count", [1, 4, 5, 6, 7])
def test_every_process_gets_the_same_number_of_batches_and_each_item_is_counted_once(count: int, monkeypatch):
    sequences = [[number] * (1 + number % 3) for number in range(1, count + 1)]
    items = [torch.tensor([[number]]) for number in range(1, count + 1)]
    found: dict[str, list[list[Batch]]] = {"texts": [], "inputs": []}
    monkeypatch.setattr(model_batches, "world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(model_batches, "rank", lambda rank=rank: rank)
        found["texts"].append([batch.without_first() for batch in process_batches(sequences, 2, CPU)])
        found["inputs"].append(list(model_input_batches(items, CPU)))
    for processes in found.values():
        assert len({len(batches) for batches in processes}) == 1
    tokens = [
        int(token)
        for batches in found["texts"]
        for batch in batches
        for token in replace(batch, mask=batch.inputs["attention_mask"].bool()).real_tokens(
            batch.inputs["input_ids"].unsqueeze(-1), "weight"
        )
    ]
    assert sorted(tokens) == sorted(token for ids in sequences for token in ids)
    vectors = [batch.real_tokens(batch.inputs[0], "weight") for batches in found["inputs"] for batch in batches]
    assert sorted(int(value) for vector in vectors for value in vector) == list(range(1, count + 1))


def test_a_peft_wrapper_reads_the_texts_itself(tiny):
    """FSDP2 may shard the wrapper, and a call of the model inside would not gather the weights of the wrapper."""
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules=["down_proj"]))
    assert find_text_model(run_on(wrapped, ["lora_A.default"])) is wrapped
