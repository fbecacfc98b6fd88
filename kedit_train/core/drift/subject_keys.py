"""Compute the inputs of linear layers at the last token of the subject of each edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from kedit_train.edit import Edit
from kedit_train.errors import EditError
from kedit_train.functional.precision import wide


def subject_keys(
    run: EditRun, layers: Mapping[str, LinearLayer], edits: Sequence[Edit], tokenizer: Any, *, batch_size: int
) -> dict[str, Tensor]:
    """Run the model before the edit on the prompts, and return one input of each layer per edit.

    The input is that at the last token of the subject. If a prompt does not contain its subject, or if the subject is a
    single token at the start of the text (an attention sink), it is the input at the last token of the prompt. The
    prompts have the format of the training examples. Every process of a distributed run computes all keys.

    Args:
        run: the current run.
        layers: name -> linear layer.
        edits: n edits.
        tokenizer: the tokenizer of the model.
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
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
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
                ids, mask = pad_sequences([rows[index] for index in order[start : start + batch_size]])
                chosen = positions.find(ids, mask.bool()) & mask.bool()
                last = (chosen * torch.arange(1, ids.shape[1] + 1)).argmax(dim=1).to(device)
                inputs.clear()
                model(input_ids=ids.to(device), attention_mask=mask.to(device))
                for name, keys in found.items():
                    keys.append(_at(name, inputs.get(name), last, ids.shape))
    finally:
        for handle in hooks:
            handle.remove()
    back = torch.tensor(order, device=device).argsort()
    return {name: torch.cat(keys)[back] for name, keys in found.items()}


def _at(name: str, values: Tensor | None, positions: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the vector of each row at its position, [rows, d_in]."""
    if values is None or values.shape[:-1].numel() != shape[0] * shape[1]:
        raise EditError(
            f"{name} must receive one vector per token of the prompts, got "
            f"{'no input' if values is None else list(values.shape)} for token ids {list(shape)}; choose other weights "
            "for the scope."
        )
    vectors = values.reshape(*shape, -1)
    return wide(vectors[torch.arange(len(positions), device=positions.device), positions])
