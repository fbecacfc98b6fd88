"""Keys of token sequences: hashes that identify an example by its content, independent of its place in a batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from kedit_train.functional.labels import IGNORE_INDEX

# Arguments of a backbone that are read below or do not change its hidden states.
_KNOWN_ARGUMENTS = {"input_ids", "attention_mask", "position_ids", "use_cache", "return_dict", "num_items_in_batch"}
# Outputs that a model configuration can request for every call.
_EXTRA_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


def hash_content(*parts: bytes | Tensor) -> str:
    """Hash bytes and tensors with BLAKE2b, in the given order.

    Args:
        parts: bytes, or tensors of any shape and dtype. The shape and the dtype of a tensor are not part of the hash.

    Returns:
        16 bytes as 32 hexadecimal digits.
    """
    digest = blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        digest.update(part)
    return digest.hexdigest()


def hash_sequences(sequences: Iterable[Sequence[int]]) -> str:
    """Hash token sequences in the given order.

    Args:
        sequences: one list of token ids per sequence.

    Returns:
        16 bytes as 32 hexadecimal digits.
    """
    return hash_content(*(str(list(sequence)).encode() for sequence in sequences))


def real_tokens(attention_mask: Any, like: Tensor) -> Tensor:
    """Return a mask that is True at tokens and False at padding.

    Args:
        attention_mask: the ``attention_mask`` that the model was called with. It is ignored if it is not a tensor with
            the shape of ``like``.
        like: a tensor [B, S], for example the token ids.

    Returns:
        bool [B, S]; all True if ``attention_mask`` is ignored.
    """
    if isinstance(attention_mask, Tensor) and attention_mask.shape == like.shape:
        return attention_mask != 0
    return torch.ones_like(like, dtype=torch.bool)


def is_per_example(name: str, value: Tensor, examples: int) -> bool:
    """Return whether a tensor argument of a forward call has one entry per example of the batch.

    The position ids of some vision-language models have the shape [3, batch, length]. Their first dimension is not the
    batch, even if the batch has three examples.

    Args:
        name: the name of the argument.
        value: the argument.
        examples: number of examples in the batch.
    """
    return value.ndim > 0 and len(value) == examples and not (name == "position_ids" and value.ndim > 2)


def supervised_keys(input_ids: Tensor, labels: Tensor, real: Tensor, others: Sequence[Tensor] = ()) -> list[str]:
    """Return one key per example: a hash of the example's token ids and labels without padding.

    Args:
        input_ids: [B, S].
        labels: [B, S].
        real: bool [B, S], as returned by :func:`real_tokens`.
        others: tensors [B, ...] without padding that are also part of the keys, for example images.
    """
    examples = zip(input_ids.cpu(), labels.cpu(), real.cpu(), strict=True)
    return [
        hash_content(torch.stack([ids[where], targets[where]]), *(other[i] for other in others))
        for i, (ids, targets, where) in enumerate(examples)
    ]


def forward_keys(inputs: Mapping[str, Any], labels: Tensor) -> list[str]:
    """Return one key per example, under which the hidden states of its supervised tokens can be stored.

    The key is a hash of all inputs that can change these hidden states. It does not depend on the other examples of the
    batch. It depends on padding only in two cases:

    - If ``position_ids`` are not given, the model may count padding when it computes the positions. So the key
      depends on the amount of left padding.
    - If a supervised position is padding or directly follows padding, the key includes all padding of the example.

    Args:
        inputs: the arguments of the model's forward call by name. Each tensor must have one entry per example. Every
            other argument must be a plain value.
        labels: [B, S], -100 where a token is not supervised.
    """
    real = real_tokens(inputs.get("attention_mask"), labels).cpu()
    tensors = {name: value.cpu() for name, value in inputs.items() if isinstance(value, Tensor)}
    plain = str(sorted((name, value) for name, value in inputs.items() if name not in tensors))
    tensors["labels"] = labels.cpu()
    keys = []
    for i, where in enumerate(real):
        supervised = tensors["labels"][i, 1:] != IGNORE_INDEX
        if bool((supervised & ~(where[1:] & where[:-1])).any()):
            # A supervised token is predicted from padding, so its hidden state depends on the padding.
            where = torch.ones_like(where)
        parts: list[bytes | Tensor] = [plain.encode()]
        if "position_ids" not in inputs:
            parts.append(str(int(where.int().argmax())).encode())
        for name, value in sorted(tensors.items()):
            if value.shape[:2] == real.shape:
                value = value[i][where]
            elif len(real) > 1:
                value = value[i]
            parts += [f"\n{name} {value.dtype} {tuple(value.shape)} ".encode(), value]
        keys.append(hash_content(*parts))
    return keys


@dataclass(frozen=True)
class SequenceBatch:
    """The token sequences of one batch.

    Attributes:
        keys: one key per sequence.
        spans: the columns of the batch that contain the tokens of each sequence, without padding.
        shape: [B, S] of the batch.
    """

    keys: list[str]
    spans: list[slice]
    shape: torch.Size

    def without_padding(self, hidden: Tensor) -> Tensor:
        """Return the hidden states of a batch with zeros at padding.

        Batches from the cache also have zeros at padding. A mixture of experts needs the same values at padding in both
        cases, because its router also assigns padding to experts. The number of tokens that an expert receives can
        change the last bits of its results.
        """
        padding = torch.ones(hidden.shape[:2], dtype=torch.bool)
        for row, span in zip(padding, self.spans, strict=True):
            row[span] = False
        return hidden.masked_fill(padding.to(hidden.device).unsqueeze(-1), 0.0) if bool(padding.any()) else hidden


def read_sequences(
    inputs: Mapping[str, Any], labels: Tensor | None, *, ignores_padding: bool, config: Any, mode: bytes
) -> SequenceBatch | str:
    """Read the sequences of a batch and their keys from the arguments of a backbone call.

    The key of a sequence is a hash of its token ids, the position of its first token and ``mode``.

    Args:
        inputs: the arguments of the call by name, including ``input_ids`` [B, S] and without None values.
        labels: the labels [B, S] that the language model received, or None if the labels are unknown.
        ignores_padding: True if the hidden states of padding are not used. This value matters only if the labels are
            unknown.
        config: the configuration of the backbone.
        mode: bytes that describe all other settings that change the hidden states.

    Returns:
        The sequences, or a string with the reason why the sequences cannot be identified by their content.
    """
    ids, mask, positions = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == ids.shape):
        return f"attention_mask does not have the shape {tuple(ids.shape)} of input_ids"
    if positions is not None and not (positions.ndim == 2 and positions.shape[-1] == ids.shape[-1]):
        return f"position_ids do not have the shape {tuple(ids.shape)} of input_ids"
    ids = ids.detach().cpu().long()
    real = real_tokens(mask, ids).detach().cpu()
    if bool(((real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0] > 1).any()):
        return "attention_mask has a gap within a sequence"
    first_columns = real.int().argmax(1)
    if labels is None or labels.shape != ids.shape:
        if not ignores_padding and not bool(real.all()):
            return "the batch is padded and has no labels, so the loss may include padding"
    elif bool((~real[:, :-1] & (labels.detach().cpu()[:, 1:] != IGNORE_INDEX)).any()):
        # This is often the first token of a sequence with padding on the left.
        return "a supervised token is predicted from padding; set the label of each sequence's first token to -100"
    starts = first_columns
    if positions is not None:
        positions = positions.detach().cpu().expand(ids.shape)
        if bool(((positions.diff(dim=1) != 1) & real[:, 1:] & real[:, :-1]).any()):
            return "position_ids restart within a sequence, so the sequence contains several examples (packing)"
        starts = positions.gather(1, first_columns.unsqueeze(1)).squeeze(1)
    lengths = real.sum(1)
    if (longest := _length_independent_positions(config)) is not None and bool((starts + lengths > longest).any()):
        return f"beyond {longest} positions, the rotary embeddings of this model depend on the batch length"
    unsupported = [name for name in _EXTRA_OUTPUTS if inputs.get(name, getattr(config, name, False))]
    if inputs.get("use_cache"):
        unsupported.append("use_cache=True")
    # An unknown argument may change the hidden states.
    unsupported += [
        k for k, v in inputs.items() if k not in _KNOWN_ARGUMENTS and k not in _EXTRA_OUTPUTS and v is not False
    ]
    if unsupported:
        return f"the model was called with {unsupported[0]}, which needs every layer or may change the hidden states"
    # If position_ids are not given, the model may count padding on the left when it computes the positions. The key
    # therefore also depends on whether position_ids are given.
    mode += b"counted" if positions is None else b"given"
    bounds = zip(first_columns.tolist(), lengths.tolist(), strict=True)
    spans = [slice(column, column + length) for column, length in bounds]
    keys = [
        hash_content(mode, start.to_bytes(8, "little", signed=True), sequence[span])
        for start, sequence, span in zip(starts.tolist(), ids, spans, strict=True)
    ]
    return SequenceBatch(keys, spans, ids.shape)


def _length_independent_positions(config: Any) -> int | None:
    """Return the largest number of positions for which the rotary embeddings do not depend on the sequence length.

    With more positions, dynamic RoPE scaling and LongRoPE change the embeddings of all tokens. The result is None for
    a model without such scaling, because its rotary embeddings never depend on the batch length.
    """
    scaling = str(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or "")
    if "dynamic" not in scaling and "longrope" not in scaling:
        return None
    return getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
