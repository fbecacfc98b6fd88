"""Compute the keys of a gate, and the distances that determine their radii.

A key is the hidden state of the last token of a prompt. A held text is a text on which the predictions of the model
should not change. ``GatedAdapter`` computes the radius of a key from the distance to the nearest hidden state of the
held texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.core.gate.adapted_layers import AdaptedLayers
from kedit_train.core.gate.trained_prompts import trained_prompts
from kedit_train.core.locality.token_sequences import pad_sequences
from kedit_train.core.output_head import evaluation_mode
from kedit_train.core.run import EditRun
from kedit_train.core.training_format import training_format
from kedit_train.data.prompts import encode_in_format, prompt_ids
from kedit_train.data.tokenization import context_length
from kedit_train.edit import Edit
from kedit_train.errors import EditError
from kedit_train.functional.key_distance import key_distances


class _InputSeen(Exception):
    """Raised to stop a forward pass as soon as the input of one block is known."""


def encode_prompts_of(run: EditRun, edits: Sequence[Edit], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of the prompts of the edits.

    Each prompt is tokenized twice: as for generation and as in a training example. If the results differ, both are
    returned. Other forms of a prompt in the training dataset, for example with a system prompt, are returned as well.
    """
    tokenizer = run.tokenizer(tokenizer)
    chosen = training_format(run, tokenizer, edits) or "plain"
    length = context_length(getattr(run.model, "config", None))
    found: dict[tuple[int, ...], None] = {}
    for edit in edits:
        trained = encode_in_format(tokenizer, edit.prompt, edit.target, chosen, append_eos=False, max_length=length)
        found[tuple(trained.input_ids[: trained.target_start])] = None
        # The two results differ if the training example of a thinking model contains an empty block of thoughts.
        found[tuple(prompt_ids(tokenizer, edit.prompt, chosen))] = None
    for ids in trained_prompts(run.host, tokenizer, edits):
        found[tuple(ids)] = None
    return [list(ids) for ids in found]


def prompt_keys(run: EditRun, adapted: AdaptedLayers, layer: int, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Return the hidden states of the last tokens of prompts, [prompts, hidden] in fp32.

    Args:
        run: the run.
        adapted: the adapted layers of its model.
        layer: index of the decoder block whose inputs are read.
        prompts: one list of token ids per prompt.
    """
    keys: list[Tensor] = [torch.empty(0)] * len(prompts)
    for chosen, states in _states(run, adapted, layer, prompts, batch_size=16):
        for index, own in zip(chosen, states, strict=True):
            keys[index] = own[-1].float()
    return torch.stack(keys)


def nearest_distances(
    run: EditRun,
    adapted: AdaptedLayers,
    layer: int,
    keys: Tensor,
    prompts: Sequence[Sequence[int]],
    held: Sequence[Sequence[int]],
    *,
    batch_size: int,
) -> Tensor:
    """Return the distance of each key to the nearest hidden state of the held texts, [keys] in fp32.

    If a held text begins with one of the prompts, the last token of this prompt is ignored. Its hidden state is a key,
    so the distance would be 0.

    Args:
        run: the run.
        adapted: the adapted layers of its model.
        layer: index of the decoder block whose inputs are compared.
        keys: [keys, hidden].
        prompts: one list of token ids per prompt.
        held: the held texts (texts on which the predictions should not change), one list of token ids per text.
        batch_size: number of sequences per forward pass.
    """
    asked = {tuple(prompt) for prompt in prompts}
    lengths = {len(prompt) for prompt in asked}
    nearest = torch.full((len(keys),), torch.inf, device=keys.device)
    for chosen, states in _states(run, adapted, layer, held, batch_size=batch_size):
        for index, own in zip(chosen, states, strict=True):
            ids = held[index]
            is_prompt = [n in lengths and tuple(ids[:n]) in asked for n in range(1, len(ids) + 1)]
            rest = own[~torch.tensor(is_prompt, device=own.device)]
            if len(rest):
                nearest = torch.minimum(nearest, key_distances(rest, keys).amin(dim=0))
    return nearest


def begin_with(texts: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]]) -> int:
    """Return the number of texts that begin with one of the prompts. Texts and prompts are lists of token ids."""
    asked = {tuple(prompt) for prompt in prompts}
    lengths = {len(prompt) for prompt in asked}
    return sum(any(tuple(text[:n]) in asked for n in lengths if n <= len(text)) for text in texts)


@torch.no_grad()
def _states(
    run: EditRun, adapted: AdaptedLayers, layer: int, sequences: Sequence[Sequence[int]], *, batch_size: int
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Compute the inputs of a decoder block, [tokens, hidden] per sequence.

    Each item is one batch: the indices of its sequences, and their tensors.
    """
    seen: list[Tensor] = []

    def see(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise _InputSeen

    device = next(run.model.parameters()).device
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask = pad_sequences([sequences[i] for i in chosen])
        handle = adapted.blocks[layer].register_forward_pre_hook(see, with_kwargs=True)
        try:
            with evaluation_mode(run.model), run.host.forward_context(), suppress(_InputSeen):
                adapted.backbone(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        finally:
            handle.remove()
        if not seen:
            raise EditError(f"block {layer} is not called by {type(adapted.backbone).__name__}; use another layer.")
        states = seen.pop()
        yield chosen, [own[: len(sequences[i])] for own, i in zip(states, chosen, strict=True)]
