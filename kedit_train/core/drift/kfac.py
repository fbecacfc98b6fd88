"""The two Kronecker factors of a linear map's curvature, on texts, with labels drawn from the model itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kedit_train.core.drift.linear_layers import LinearMap
from kedit_train.core.drift.second_moments import (
    Batch,
    Current,
    Moment,
    empty_moment,
    gathered,
    read_input,
    share,
    text_batches,
)
from kedit_train.core.output_head import OutputHead, evaluation_mode
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError
from kedit_train.functional.chunked_loss import chunk_length, chunked


def curvature_factors(
    run: EditRun,
    maps: Mapping[str, LinearMap],
    rows: Sequence[Sequence[int]],
    *,
    batch_size: int,
    seed: int,
    unedited: bool = True,
) -> tuple[dict[str, Moment], dict[str, Moment]]:
    """Gather the Kronecker factors of the Gauss-Newton matrix of every map: K-FAC with labels drawn from the model.

    Labels of the texts themselves would give the empirical Fisher, which is another matrix. Each token's label is drawn
    with a number of its own, so that neither the size of batches nor the number of processes changes which.

    Args:
        rows: token windows, the same on every process.
        unedited: on the model before the edit, else as it is now.

    Returns:
        (inputs, gradients): E[a aᵀ] of what each map reads and E[g gᵀ] of the gradient at its output of the
        cross-entropy summed over tokens.

    Raises:
        EditError: a module was never called, saw other tokens than the batch has, or is the output head.
    """
    head = run.head()
    inputs, gradients, outputs = {}, {}, []
    for name, one in maps.items():
        if any(module in head.module.modules() for module in one.modules):
            raise EditError(
                f"{name} is the output head, whose factor would be vocabulary by vocabulary; leave it out of the scope"
            )
        out, into = one.as_matrix(run.scope[name]).shape
        inputs[name], gradients[name] = empty_moment(run.scope[name], into), empty_moment(run.scope[name], out)
    generator = torch.Generator().manual_seed(seed)
    drawn = [(list(row), torch.rand(len(row), generator=generator, dtype=torch.float64)) for row in rows]
    drawn = sorted(share(drawn), key=lambda pair: len(pair[0]))
    device = next(run.model.parameters()).device
    current = Current()
    before = run.unedited() if unedited else nullcontext()

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            inputs[name].add(current.rows(read_input(args, kwargs).detach(), name))
            outputs.append((name, output))

        return hook

    hooks = [m.register_forward_hook(watch(n), with_kwargs=True) for n, one in maps.items() for m in one.modules]
    try:
        with before, evaluation_mode(run.model), run.host.forward_context(), torch.enable_grad():
            for start in range(0, len(drawn), batch_size):
                part = drawn[start : start + batch_size]
                current.batch = next(text_batches([row for row, _ in part], len(part), device))
                uniform = torch.cat([numbers for _, numbers in part]).to(device, torch.float32)
                loss = _sampled_loss(head, current.batch, uniform)
                found = torch.autograd.grad(loss, [output for _, output in outputs], allow_unused=True)
                for (name, _), gradient in zip(outputs, found, strict=True):
                    if gradient is not None:
                        gradients[name].add(current.rows(gradient, name))
                outputs.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return gathered(inputs), gathered(gradients)


def _sampled_loss(head: OutputHead, batch: Batch, uniform: Tensor) -> Tensor:
    assert isinstance(batch.inputs, Mapping)
    hidden = head.hidden(**batch.inputs)[batch.inputs["attention_mask"].bool()]

    def score(states: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
        logits = head.project(states)
        with torch.no_grad():
            cumulative = logits.float().softmax(-1).cumsum(-1)
            labels = torch.searchsorted(cumulative, numbers.unsqueeze(-1) * cumulative[:, -1:], right=True).squeeze(-1)
        return (F.cross_entropy(logits, labels.clamp(max=logits.shape[-1] - 1), reduction="none"),)

    chunk = chunk_length(head.config.vocab_size)
    (losses,) = chunked(score, hidden, uniform, chunk=chunk, parameters=head.trained)
    return losses.sum()
