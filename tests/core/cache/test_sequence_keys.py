"""Keys of sequences: equal for equal content, whatever the padding and the batch; different for different content."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kedit_train.core.cache.sequence_keys import (
    forward_keys,
    hash_content,
    is_per_example,
    read_sequences,
    real_tokens,
    supervised_keys,
)

SEQUENCES = [[3, 1, 4], [1, 5, 9, 2, 6], [3, 1, 4, 1]]


def batch(sequences: list[list[int]] = SEQUENCES, side: str = "right", width: int = 6, pad: int = 0) -> dict[str, Any]:
    """Pad sequences; every token but the first is supervised."""
    ids = torch.full((len(sequences), width), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for i, sequence in enumerate(sequences):
        start = 0 if side == "right" else width - len(sequence)
        ids[i, start : start + len(sequence)] = torch.tensor(sequence)
        mask[i, start : start + len(sequence)] = 1
        labels[i, start + 1 : start + len(sequence)] = torch.tensor(sequence[1:])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def read(inputs: dict[str, Any], *, labels: bool = True, mode: bytes = b"", config: Any = None, **more: Any) -> Any:
    inputs = {**inputs, **more}
    own = inputs.pop("labels", None)
    return read_sequences(inputs, own if labels else None, ignores_padding=False, config=config, mode=mode)


def supervised(inputs: dict[str, Tensor]) -> list[str]:
    real = real_tokens(inputs["attention_mask"], inputs["labels"])
    return supervised_keys(inputs["input_ids"], inputs["labels"], real)


def forward(inputs: dict[str, Tensor], **more: Any) -> list[str]:
    return forward_keys({k: v for k, v in {**inputs, **more}.items() if k != "labels"}, inputs["labels"])


def test_a_hash_covers_the_bytes_of_all_parts_in_order() -> None:
    values = torch.tensor([[1, 2], [3, 4]])
    as_bytes = values.numpy().tobytes()
    assert hash_content(values) == hash_content(as_bytes) == hash_content(as_bytes[:8], as_bytes[8:])
    assert hash_content(values.T) == hash_content(values.T.contiguous()) != hash_content(values)
    assert hash_content(b"a", values) != hash_content(values, b"a")
    assert len(hash_content(torch.zeros(0), torch.zeros(2, dtype=torch.bfloat16), torch.tensor([True]))) == 32


def test_without_a_mask_of_the_same_shape_every_token_is_real() -> None:
    labels = torch.zeros(2, 3, dtype=torch.long)
    for mask in (None, torch.zeros(2, 1, 3, 3), torch.zeros(2, 2), {"full_attention": labels}):
        assert bool(real_tokens(mask, labels).all())
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert torch.equal(real_tokens(mask, labels), mask.bool())


@pytest.mark.parametrize("keys", [supervised, forward, lambda inputs: read(inputs).keys])
def test_a_key_does_not_depend_on_the_rest_of_the_batch(keys: Any) -> None:
    whole = keys(batch())
    assert len(set(whole)) == 3
    assert keys(batch(SEQUENCES[::-1])) == whole[::-1]
    assert keys(batch(width=9)) == whole
    assert keys(batch(SEQUENCES[1:2])) == whole[1:2]
    # The pad token may be a token of the sequences (pad = eos).
    assert keys(batch(pad=4)) == whole


def test_labels_are_part_of_the_key_of_a_supervised_example() -> None:
    inputs = batch()
    other = {**inputs, "labels": inputs["labels"].masked_fill(inputs["labels"] == 9, -100)}
    for keys in (supervised, forward):
        assert [a == b for a, b in zip(keys(inputs), keys(other), strict=True)] == [True, False, True]
    assert read(inputs).keys == read(other).keys


def test_padding_on_the_left_counts_unless_positions_are_given() -> None:
    left, right = batch(side="left"), batch()
    assert supervised(left) == supervised(right)
    assert forward(left) != forward(right)
    positions = [{"position_ids": (b["attention_mask"].cumsum(1) - 1).clamp(min=0)} for b in (left, right)]
    assert forward(left, **positions[0]) == forward(right, **positions[1])
    assert read(left, **positions[0]).keys == read(right, **positions[1]).keys
    assert read(left).keys != read(right).keys


def test_padding_counts_where_a_supervised_token_is_predicted_from_it() -> None:
    first = {}
    for width in (6, 9):
        inputs = batch(side="left", width=width)
        columns = inputs["attention_mask"].argmax(1)
        inputs["labels"][torch.arange(3), columns] = 7
        first[width] = forward({**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)})
    assert not set(first[6]) & set(first[9])


def test_plain_arguments_are_part_of_the_key_of_a_forward_call() -> None:
    assert forward(batch(), logits_to_keep=1) != forward(batch())
    assert forward(batch(), a=1, b=2) == forward(batch(), b=2, a=1)


def test_the_mode_and_the_first_position_are_part_of_the_key_of_a_sequence() -> None:
    mask = batch()["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    base = read(batch(), position_ids=positions).keys
    assert not set(base) & set(read(batch(), position_ids=positions + 2).keys)
    assert not set(base) & set(read(batch(), position_ids=positions, mode=b"bf16").keys)
    assert not set(base) & set(read(batch()).keys)


def test_spans_are_the_columns_of_the_tokens() -> None:
    assert read(batch(side="left")).spans == [slice(3, 6), slice(1, 6), slice(2, 6)]
    assert read(batch()).spans == [slice(0, 3), slice(0, 5), slice(0, 4)]
    assert read(batch()).shape == (3, 6)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"attention_mask": torch.ones(3, 1, 6, 6)}, "attention_mask does not have the shape (3, 6) of input_ids"),
        ({"position_ids": torch.zeros(3, 3, 6)}, "position_ids do not have the shape (3, 6) of input_ids"),
        ({"attention_mask": torch.tensor([[1, 1, 0, 1, 0, 0]] * 3)}, "attention_mask has a gap within a sequence"),
        ({"labels": False}, "the batch is padded and has no labels, so the loss may include padding"),
        (
            {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]] * 3)},
            "position_ids restart within a sequence, so the sequence contains several examples (packing)",
        ),
        (
            {"config": SimpleNamespace(rope_scaling={"type": "dynamic"}, max_position_embeddings=4)},
            "beyond 4 positions, the rotary embeddings of this model depend on the batch length",
        ),
        (
            {"use_cache": True},
            "the model was called with use_cache=True, which needs every layer or may change the hidden states",
        ),
        (
            {"something_new": 1},
            "the model was called with something_new, which needs every layer or may change the hidden states",
        ),
    ],
)
def test_a_call_that_cannot_be_cached_gives_the_reason(given: dict[str, Any], reason: str) -> None:
    assert read(batch(), **given) == reason


def test_a_supervised_first_token_after_left_padding_gives_the_reason() -> None:
    inputs = batch(side="left")
    inputs["labels"][0, 3] = 3
    expected = "a supervised token is predicted from padding; set the label of each sequence's first token to -100"
    assert read(inputs) == expected


def test_images_are_part_of_the_key_of_an_example() -> None:
    inputs, images = batch(), torch.randn(3, 2, 4, 4)
    real = real_tokens(inputs["attention_mask"], inputs["labels"])
    keys = supervised_keys(inputs["input_ids"], inputs["labels"], real, [images])
    assert keys == supervised_keys(inputs["input_ids"], inputs["labels"], real, [images.clone()])
    images[1] += 1
    changed = supervised_keys(inputs["input_ids"], inputs["labels"], real, [images])
    assert [a == b for a, b in zip(keys, changed, strict=True)] == [True, False, True]


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("pixel_values", (3, 2, 4, 4), True),
        ("pixel_values", (12, 5), False),
        ("position_ids", (3, 6), True),
        # Positions in time, height and width of a batch of 3 examples.
        ("position_ids", (3, 3, 6), False),
        ("num_items_in_batch", (), False),
    ],
)
def test_whether_an_argument_has_one_entry_per_example(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert is_per_example(name, torch.zeros(shape), 3) is expected
