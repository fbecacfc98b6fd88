"""Convert edits to token sequences, split sequences to the context length of a model, and pad sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kedit_train.core.run import EditRun
from kedit_train.data.tokenization import context_length, encode_edit
from kedit_train.edit import Edit


def tokenize_edits(run: EditRun, edits: Iterable[Edit], tokenizer: Any, max_length: int) -> list[list[int]]:
    """Convert each edit to the token ids of its prompt, its target and an end-of-text token.

    If the tokenizer has no end-of-text token, the sequence ends with the target.

    Args:
        run: the current run. The context length is read from its model.
        edits: the edits. An edit with more tokens than the maximum is split into several sequences.
        tokenizer: the tokenizer of the model.
        max_length: maximum number of tokens per sequence. If the context length of the model is smaller, the context
            length is the maximum.
    """
    append_eos = tokenizer.eos_token_id is not None
    encoded = [encode_edit(tokenizer, edit.prompt, edit.target, append_eos=append_eos).input_ids for edit in edits]
    return split_sequences(encoded, sequence_limit(run, max_length))


def split_sequences(sequences: Iterable[Sequence[int]], length: int) -> list[Any]:
    """Split sequences into parts of at most ``length`` tokens.

    No token is dropped, and no part contains tokens of two sequences.
    """
    return [sequence[i : i + length] for sequence in sequences for i in range(0, len(sequence), length)]


def sequence_limit(run: EditRun, max_length: int) -> int:
    """Return the smaller of ``max_length`` and the context length of the model."""
    return min(max_length, context_length(getattr(run.model, "config", None)) or max_length)


def pad_sequences(sequences: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Pad sequences on the right.

    Args:
        sequences: B lists of token ids. S is the length of the longest list.
        pad_id: token id at padded positions. It may also occur in the sequences, because the mask marks the padding.

    Returns:
        input_ids [B, S] and attention_mask [B, S], 1 at real tokens.
    """
    width = max(map(len, sequences))
    input_ids = torch.full((len(sequences), width), pad_id)
    attention_mask = torch.zeros((len(sequences), width), dtype=torch.long)
    for i, sequence in enumerate(sequences):
        input_ids[i, : len(sequence)] = torch.tensor(sequence)
        attention_mask[i, : len(sequence)] = 1
    return input_ids, attention_mask
