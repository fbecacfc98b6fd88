"""Gradients and Fisher information of a language model's scope on edits or texts, taken before the edit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from kedit_train.core.output_head import evaluation_mode
from kedit_train.core.run import EditRun
from kedit_train.data.tokenization import Encoded
from kedit_train.errors import EditError

# logits [T, V] and the tokens of the text [T] -> labels [T]
Labels = Callable[[Tensor, Tensor], Tensor]


def mean_gradient(run: EditRun, rows: Sequence[Encoded]) -> dict[str, Tensor]:
    """Gradient of the cross-entropy of the targets, a mean over target tokens, at the model before the edit.

    Args:
        run: its scope is what the gradient is taken for.
        rows: edits as tokens; nothing but their targets is scored.

    Returns:
        Name -> signed gradient in the parameter's shape, fp32 (fp64 stays).
    """
    return _mean(run, rows, lambda logits, own: own, lambda gradient: gradient)


def diagonal_fisher(run: EditRun, rows: Sequence[Encoded], *, seed: int = 0) -> dict[str, Tensor]:
    """The diagonal of the Fisher information a token, at the model before the edit.

    ``F_i = E_c E_{y ~ p(.|c)} (d log p(y|c) / d w_i)^2`` over the contexts c in front of the targets, as in EWC
    (Overcoming catastrophic forgetting in neural networks, arXiv 1612.00796). The labels are drawn from the model: with
    the text's own it would be the "empirical" Fisher, which is none (arXiv 1905.12558). Gradients are squared row by
    row, never after a sum over a batch. Within a row, labels of different positions are drawn independently and each
    score has mean zero, so that the square of their sum is an unbiased estimate of the sum of squares.

    Args:
        run: its scope is what the information is about.
        rows: contexts as tokens; labels are drawn at the positions of ``input_ids[target_start:]``.
        seed: of the labels.

    Returns:
        Name -> information in the parameter's shape, non-negative, fp32 (fp64 stays).
    """
    generators: dict[torch.device, torch.Generator] = {}

    def draw(logits: Tensor, own: Tensor) -> Tensor:
        # One generator for all rows, on the device of the logits; the global one, which orders data, is left alone.
        if logits.device not in generators:
            generators[logits.device] = torch.Generator(logits.device).manual_seed(seed)
        probabilities = logits.softmax(-1)
        return torch.multinomial(probabilities, 1, generator=generators[logits.device]).squeeze(-1)

    return _mean(run, rows, draw, torch.square)


def contexts(rows: Sequence[Sequence[int]]) -> list[Encoded]:
    """Windows of tokens as rows for :func:`diagonal_fisher`: every token in the context of those before it."""
    # A window of one token has no token in front of it that would be a context.
    found = [Encoded(list(row), 1) for row in rows if len(row) > 1]
    if not found:
        raise EditError("no text has two tokens, so none has a context to answer in; give longer texts")
    return found


def _mean(run: EditRun, rows: Sequence[Encoded], labels: Labels, take: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Mean over tokens of what ``take`` makes of each row's own gradient; rows are unpadded, dropout is off."""
    head, parameters = run.head(), list(run.scope.values())
    if any(hasattr(p, "device_mesh") for p in parameters):
        raise EditError(
            "gradients of single texts cannot be taken where parameters are sharded (FSDP2, tensor "
            "parallelism); take what they are needed for in one process first"
        )
    wide = [torch.promote_types(p.dtype, torch.float32) for p in parameters]
    totals = [torch.zeros(p.shape, dtype=dtype, device=p.device) for p, dtype in zip(parameters, wide, strict=True)]
    device = next(run.model.parameters()).device
    # None: no bar outside of a terminal.
    quiet = not run.host.is_main or len(rows) < 64
    with run.unedited(), evaluation_mode(run.model), torch.enable_grad(), run.host.forward_context():
        for row in tqdm(rows, desc="gradients before the edit", leave=False, disable=quiet or None):
            ids = torch.tensor([row.input_ids], device=device)
            hidden = head.hidden(input_ids=ids[:, :-1], attention_mask=torch.ones_like(ids[:, :-1]))
            logits = head.project(hidden[0, row.target_start - 1 :])
            with torch.no_grad():
                chosen = labels(logits, ids[0, row.target_start :].to(logits.device))
            loss = torch.nn.functional.cross_entropy(logits, chosen, reduction="sum")
            # Not backward(): that would touch .grad and everything that hooks into it (DDP's reduction, masks).
            # A parameter that a row does not reach (an expert it is not routed to) has no gradient.
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for total, gradient in zip(totals, gradients, strict=True):
                if gradient is not None:
                    total += take(gradient.to(total.dtype))
    tokens = sum(len(row.input_ids) - row.target_start for row in rows)
    return {name: total.div_(tokens) for name, total in zip(run.scope, totals, strict=True)}
