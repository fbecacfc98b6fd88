"""Batches of encoded edits: padding on both sides gives the losses of one edit at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from kedit_train.data import EditDataset
from kedit_train.data.tokenization import Encoded, collate, context_length, position_ids
from kedit_train.errors import EditError


def test_collate_equals_batches_written_by_hand() -> None:
    encoded = [Encoded([5, 6, 7, 2], 2), Encoded([5, 2, 2], 1)]
    right = collate(encoded, pad_id=2)
    assert {key: value.tolist() for key, value in right.items()} == {
        "input_ids": [[5, 6, 7, 2], [5, 2, 2, 2]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]],
        "labels": [[-100, -100, 7, 2], [-100, 2, 2, -100]],
    }
    left = collate(encoded, pad_id=2, padding_side="left")
    assert {key: value.tolist() for key, value in left.items()} == {
        "input_ids": [[5, 6, 7, 2], [2, 5, 2, 2]],
        "attention_mask": [[1, 1, 1, 1], [0, 1, 1, 1]],
        "labels": [[-100, -100, 7, 2], [-100, -100, 2, 2]],
    }
    assert {value.dtype for value in left.values()} == {torch.int64}
    assert position_ids(left["attention_mask"]).tolist() == [[0, 1, 2, 3], [0, 0, 1, 2]]
    with pytest.raises(EditError, match=r"padding_side must be .*, got 'middle'"):
        collate(encoded, pad_id=0, padding_side="middle")
    with pytest.raises(EditError, match="a batch must contain at least one encoded edit"):
        collate([], pad_id=0)


def losses(model: Any, batch: dict[str, torch.Tensor], **extra: torch.Tensor) -> torch.Tensor:
    """Return the summed cross-entropy of the labelled tokens of each row, [batch]."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], **extra).logits
    labels = batch["labels"][:, 1:]
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none").sum(-1)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pad", ["pad", "eos"])
def test_a_batch_equals_one_at_a_time_on_a_real_model(factlm: Path, side: str, pad: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(factlm)
    model = AutoModelForCausalLM.from_pretrained(factlm, dtype=torch.float32).eval()
    edits = EditDataset.load(factlm / "records.json").sample(24, seed=2)
    encoded = edits.encode(tokenizer, max_length=context_length(model.config))
    assert len({len(one.input_ids) for one in encoded}) > 3
    pad_id = tokenizer.pad_token_id if pad == "pad" else tokenizer.eos_token_id
    batch = collate(encoded, pad_id=pad_id, padding_side=side)
    for row, edit in enumerate(edits):
        scored = batch["labels"][row][batch["labels"][row] != -100].tolist()
        assert scored == [*tokenizer(" " + edit.target, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    alone = torch.cat([losses(model, collate([one], pad_id=pad_id)) for one in encoded])
    together = losses(model, batch)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    weight = model.model.layers[3].mlp.down_proj.weight
    one_by_one, at_once = (torch.autograd.grad(part.sum(), weight)[0] for part in (alone, together))
    assert (one_by_one - at_once).norm() < 1e-5 * one_by_one.norm()


def test_left_padding_with_absolute_positions() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()
    encoded = [Encoded([5, 6, 7, 8, 9, 2], 3), Encoded([5, 9, 2], 1)]
    alone = torch.cat([losses(model, collate([one], pad_id=2)) for one in encoded])
    batch = collate(encoded, pad_id=2, padding_side="left")
    placed = losses(model, batch, position_ids=position_ids(batch["attention_mask"]))
    torch.testing.assert_close(placed, alone, rtol=1e-5, atol=1e-5)
    assert context_length(model.config) == 16
