"""A loss head on a model, a batch of texts and its gradients, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kedit_train.core import EditRun, Host
from kedit_train.core.tokens.loss_head import LossHead
from kedit_train.functional import overtone

PAD = 0
# The padding token is also the end-of-text token: at the end of a text it is supervised, as padding it is not.
TEXTS = [([5, 7, 11], [13, PAD]), ([2, 4], [8, 16, 32, 60, PAD]), ([9, 8, 7, 6, 5, 4], [3, PAD])]


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(logits, labels, reduction="none"), torch.ones_like(labels, dtype=torch.bool)


def smoothed(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return overtone(logits, labels, epsilon=2.0)


@contextmanager
def loss_head(model: Any, objective: Any = cross_entropy, reduction: Any = "token", **options: Any) -> Iterator[Any]:
    run = EditRun(model, Host(object()))
    head = LossHead(run.head(), shares=options.pop("shares", lambda: 1))
    head.use(objective, reduction=reduction, **options)
    try:
        yield head
    finally:
        head.remove()
        run.close()


def batch(texts: list[tuple[list[int], list[int]]], side: str = "right") -> dict[str, Tensor]:
    width = max(len(p) + len(t) for p, t in texts)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, target in texts:
        pad = width - len(prompt) - len(target)
        for key, row, fill in (
            ("input_ids", prompt + target, PAD),
            ("attention_mask", [1] * len(prompt + target), 0),
            ("labels", [-100] * len(prompt) + target, -100),
        ):
            rows[key].append([fill] * pad + row if side == "left" else row + [fill] * pad)
    found = {key: torch.tensor(row) for key, row in rows.items()}
    # GPT-2 counts positions from the start of the row unless it gets position ids, as it does in generation.
    found["position_ids"] = (found["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return found


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, grads, strict=True) if g is not None}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], rel: float) -> None:
    assert got.keys() == want.keys()
    size = torch.stack([g.norm() for g in want.values()]).norm()
    for name in want:
        assert (got[name] - want[name]).norm() <= rel * max(want[name].norm(), 1e-3 * size), name
