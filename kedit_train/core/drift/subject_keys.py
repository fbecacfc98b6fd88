"""Compute the inputs of linear layers at the last token of the subject of each edit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.core.drift.linear_layers import LinearLayer
from kedit_train.core.drift.model_batches import find_text_model
from kedit_train.core.drift.second_moments import layer_input
from kedit_train.core.fsdp import reshard
from kedit_train.core.locality.token_sequences import pad_sequences
from kedit_train.core.output_head import evaluation_mode
from kedit_train.core.run import EditRun
from kedit_train.core.scope.subject_positions import SubjectPositions
from kedit_train.core.training_format import training_format
from kedit_train.data.prompts import prompt_ids
from kedit_train.data.tokenization import shorten
from kedit_train.edit import Edit
from kedit_train.errors import EditError, warn
from kedit_train.functional.precision import wide

# If the distinctness of the input at the subject is below this threshold, a later token is used. The distinctness is at
# most 1 on average over the tokens of the texts. Measured on SmolLM2 (2026-11-28), it is 0.01 at an attention sink, and
# between 10 and 100 at most subjects.
_DISTINCT = 0.1


def subject_keys(
    run: EditRun,
    layers: Mapping[str, LinearLayer],
    edits: Sequence[Edit],
    tokenizer: Any,
    *,
    distinctness: Callable[[str, Tensor], Tensor],
    batch_size: int,
) -> dict[str, Tensor]:
    """Run the unedited model on the prompts, and return the input of each layer at one token per edit.

    This token is the last token of the subject, with two exceptions:

    - If the edit has no subject, or if the subject is only the first token of the prompt, the most distinct token of
      the prompt is used. The first token is ignored in this choice.
    - If the input at the subject is not distinct, the most distinct token after the subject is used. This happens for
      short subjects at the start of a text, because their hidden states hardly depend on the token (an attention sink).

    The prompts have the format of the training examples. Every process of a distributed run computes all keys.

    Args:
        run: the current run.
        layers: name -> linear layer.
        edits: n edits.
        tokenizer: the tokenizer of the model.
        distinctness: a function that receives the name of a layer and inputs [t, d_in]. It returns how much each input
            differs from the inputs on other texts, [t] (see
            :func:`~kedit_train.functional.dual_keys.distinctness`). The most distinct token is the token with the
            largest geometric mean of these values over all layers.
        batch_size: number of prompts per forward pass.

    Returns:
        name -> inputs, [n, d_in] in fp32, or in fp64 if the weight is fp64.

    Raises:
        EditError: a layer does not receive one vector per token of the prompts.
    """
    reshard(run.root)
    prompt_format = training_format(run, tokenizer, edits) or "plain"
    rows = [prompt_ids(tokenizer, edit.prompt, prompt_format) for edit in edits]
    positions, model = SubjectPositions(tokenizer, edits), find_text_model(run)
    device = next(run.model.parameters()).device
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    # For each edit: whether its subject was found, and the inputs from the last token of its subject to the end.
    named = [True] * len(rows)
    candidates: dict[str, list[Tensor]] = {name: [torch.empty(0)] * len(rows) for name in layers}
    inputs: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: Any, kwargs: Any) -> None:
            inputs[name] = layer_input(args, kwargs)

        return record

    hooks = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, layer in layers.items()
        for module in layer.modules
    ]
    try:
        with torch.no_grad(), run.reference_model(), evaluation_mode(run.model), run.host.forward_context():
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                ids, mask = pad_sequences([rows[index] for index in batch])
                chosen = positions.find(ids, mask.bool()) & mask.bool()
                inputs.clear()
                model(input_ids=ids.to(device), attention_mask=mask.to(device))
                tokens = {name: _per_token(name, inputs.get(name), ids.shape) for name in layers}
                for row, index in enumerate(batch):
                    length = len(rows[index])
                    # If the whole prompt is chosen, no subject was found after its first token.
                    named[index] = int(chosen[row].sum()) < length
                    first = int(chosen[row].nonzero().max()) if named[index] else min(1, length - 1)
                    for name, values in tokens.items():
                        candidates[name][index] = values[row, first:length].clone()
    finally:
        for handle in hooks:
            handle.remove()
    lengths = [len(keys) for keys in next(iter(candidates.values()))]
    scores = [distinctness(name, torch.cat(keys)).log() for name, keys in candidates.items()]
    mean = torch.stack(scores).mean(dim=0).split(lengths)
    best = [int(own.argmax()) for own in mean]
    picked = [0 if named[index] and own[0] > math.log(_DISTINCT) else best[index] for index, own in enumerate(mean)]
    moved = [edits[index].prompt for index, at in enumerate(picked) if named[index] and at]
    if moved:
        warn(
            f"in {len(moved)} of {len(edits)} prompts (the first: {shorten(moved[0])!r}), the subject is at the start "
            "of the text, where the hidden states hardly depend on the token (an attention sink). These edits are "
            "therefore trained at a later token, which can change more answers to other prompts; reword the prompts so "
            "that the subject comes later."
        )
    return {
        name: torch.stack([own[at] for own, at in zip(keys, picked, strict=True)]) for name, keys in candidates.items()
    }


def _per_token(name: str, values: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Return the inputs of a layer as [prompts, tokens, d_in], in fp32 or fp64."""
    if values is None or values.shape[:-1].numel() != shape[0] * shape[1]:
        raise EditError(
            f"{name} must receive one vector per token of the prompts, got "
            f"{'no input' if values is None else f'an input of shape {list(values.shape)}'} for token ids of shape "
            f"{list(shape)}; choose other weights for the scope."
        )
    return wide(values.reshape(*shape, -1))
