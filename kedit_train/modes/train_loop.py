"""The plain loop that a mode trains with, where the caller brings none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from kedit_train.callbacks import ParameterScope, editing
from kedit_train.data import Edit, EditDataset
from kedit_train.data.prompts import PromptFormat, check_format
from kedit_train.data.tokenization import collate, context_length, pad_token_id
from kedit_train.errors import EditError
from kedit_train.evaluation.asking.batching import bar, device_of

# Where "Fine-tuning Done Right in Model Editing" (LocFT-BF, arXiv 2509.22072) calls an edit learned.
LEARNED = 1e-2


class TrainLoop:
    """``train(model, edits)``: shuffled batches of all the edits, epoch after epoch, inside of ``editing``.

    With one edit it is that edit to convergence. An epoch's mean loss below ``stop_loss`` ends it. The model stays in
    the mode (training or evaluation) that it is in.

    Args:
        tokenizer: of the model.
        callbacks: of ``kedit_train.callbacks``, in any order; by default one down-projection late in the model. Where
            the mode trains in rounds they begin anew in each: what they keep of "the unedited model" (the answers of a
            KL term) is then the model at the beginning of the round. ``KLLocality``, ``NullSpace`` and ``LowCurvature``
            go on where ``sequential=True``; ``NormBall`` and ``WeightAnchor`` measure from the weights before the first
            round, unless ``anchor="previous"``.
        epochs: the most passes over the edits.
        batch_size: edits a step.
        lr: the learning rate.
        optimizer: made anew for every call, as ``optimizer(parameters, lr=lr)``.
        stop_loss: 0 runs all the epochs.
        progress: a bar over the epochs in a terminal.
        prompt_format: in which form the edits are trained: as they stand ("plain"), through the tokenizer's template as
            a "chat", or framed as a "question".
        append_eos: end every target with end-of-text.
        extra: rows that are trained along with each call's edits: edits, or what gives them for a call's edits, as
            :func:`~kedit_train.augmentation.augmentation` does (made once, before the first call). They count in
            batches and in ``stop_loss`` like any other.

    Raises:
        EditError: an argument out of range, an edit that the model cannot read, a loss that is no number.
    """

    def __init__(
        self,
        tokenizer: Any,
        callbacks: Sequence[Any] | None = None,
        *,
        epochs: int = 25,
        batch_size: int = 100,
        lr: float = 5e-4,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        stop_loss: float = LEARNED,
        progress: bool = False,
        prompt_format: PromptFormat = "plain",
        append_eos: bool = True,
        extra: Sequence[Edit] | Callable[[Sequence[Edit]], Sequence[Edit]] = (),
    ) -> None:
        check_format(prompt_format, tokenizer)
        if epochs < 1 or batch_size < 1:
            raise EditError(f"TrainLoop: epochs={epochs}, batch_size={batch_size}: give at least 1 of each")
        if not 0.0 < lr < math.inf:
            raise EditError(f"TrainLoop: lr={lr}: give a learning rate above 0")
        self.tokenizer, self.epochs, self.batch_size = tokenizer, epochs, batch_size
        self.extra = extra
        self.callbacks = [ParameterScope(0.7, modules="mlp.down_proj")] if callbacks is None else list(callbacks)
        self.lr, self.optimizer, self.stop_loss = lr, optimizer, stop_loss
        self.progress, self.prompt_format, self.append_eos = progress, prompt_format, append_eos

    def __call__(self, model: nn.Module, edits: Sequence[Edit]) -> None:
        config = getattr(model, "config", None)
        longest = context_length(config) if config else None
        form: Any = {"prompt_format": self.prompt_format, "append_eos": self.append_eos}
        extra = self.extra(edits) if callable(self.extra) else self.extra
        rows = EditDataset([*edits, *extra]).encode(self.tokenizer, max_length=longest, **form)
        pad_id, device = pad_token_id(self.tokenizer), device_of(model)
        told: Any = {"tokenizer": self.tokenizer, "edits": edits, "epoch_steps": math.ceil(len(rows) / self.batch_size)}
        with editing(model, self.callbacks, **told) as edit, self._bar() as shown:
            optimizer = self.optimizer(edit.parameters(), lr=self.lr)
            for _ in range(self.epochs):
                losses = []
                for batch in torch.randperm(len(rows)).split(self.batch_size):
                    tensors = collate([rows[int(i)] for i in batch], pad_id=pad_id)
                    losses.append((self._step(model, edit, optimizer, tensors, device), len(batch)))
                    if edit.should_stop:
                        return
                shown.update()
                if _mean(losses) < self.stop_loss:
                    return

    def _bar(self) -> Any:
        return bar(self.epochs, "training", self.progress)

    def _step(self, model: Any, edit: Any, optimizer: Any, tensors: dict[str, torch.Tensor], device: Any) -> float:
        edit.before_step()
        loss = model(**{name: value.to(device) for name, value in tensors.items()}).loss
        value = float(loss.detach())
        if not math.isfinite(value):
            raise EditError(f"TrainLoop: the loss is {value}: lower lr={self.lr} or use a wider dtype")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value

    def __repr__(self) -> str:
        own = ", ".join(map(repr, self.callbacks))
        extra = f"{len(self.extra)} rows" if isinstance(self.extra, Sequence) else self.extra
        return (
            f"TrainLoop([{own}], epochs={self.epochs}, batch_size={self.batch_size}, lr={self.lr}, "
            f"optimizer={getattr(self.optimizer, '__name__', self.optimizer)}, stop_loss={self.stop_loss}"
            + (f", extra={extra})" if self.extra else ")")
        )


def _mean(losses: Iterable[tuple[float, int]]) -> float:
    """Of the batches' losses, each weighed by its edits."""
    losses = list(losses)
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
