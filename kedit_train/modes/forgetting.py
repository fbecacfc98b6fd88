"""F-Learning: train on the old answers, subtract what that changed, then learn the new ones.

"Forgetting before Learning: Utilizing Parametric Arithmetic for Knowledge Updating in LLMs" (arXiv 2311.08011), with
guards that the paper leaves to the reader: only what the model really answers is forgotten, the subtraction ends where
the old answers are gone or other texts suffer, and all that was measured is told.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kedit_train.core.locality.texts import Texts
from kedit_train.data import Edit, EditDataset
from kedit_train.data.prompts import PromptFormat
from kedit_train.delta import EditDelta, TaskVector
from kedit_train.delta.weight_source import Weights, weights_of
from kedit_train.errors import EditError
from kedit_train.evaluation.forgetting import PUBLISHED, Guards, Measured, Reason, Scale, measure, old_answers
from kedit_train.modes.weight_backup import KeptWeights


@dataclass(frozen=True)
class Forgetting:
    """What :func:`forget` found.

    Args:
        delta: what to apply to forget; None where no coefficient is within the guards.
        coefficient: the one taken; 0 where none was.
        ended_by: ``forgotten`` (the bound is reached), ``perplexity`` (the next coefficient would have harmed the
            texts), ``coefficients`` (there were no more), ``unknown`` (the model gives none of the old answers).
        measured: in order, the model as it was first.
        forgot: the edits that took part, each with the old answer as its target, in the model's own words.
        left_out: edit (its id, or its number) -> why it took no part.
        length: of the trained difference, over that of the weights that it changes (Euclidean norms).
    """

    delta: EditDelta | None
    coefficient: float
    ended_by: Reason
    measured: tuple[Measured, ...]
    forgot: tuple[Edit, ...]
    left_out: Mapping[str, str]
    length: float


def forget(
    model: nn.Module,
    tokenizer: Any,
    edits: Sequence[Edit],
    train: Callable[[nn.Module, Sequence[Edit]], Any],
    coefficients: Sequence[float] = PUBLISHED,
    *,
    texts: Any,
    scale: Scale = "base",
    bound: float = 0.5,
    growth: float = 1.1,
    batch_size: int = 64,
    max_new_tokens: int = 32,
    prompt_format: PromptFormat = "plain",
) -> Forgetting:
    """Train on the old answers, and subtract as much of what that changed as it takes to forget them.

    ``theta' = theta - coefficient * (FT(theta, old) - theta)``, the coefficients in ascending order, until the old
    answers' mean probability is at most ``bound``, and not beyond the last one with which the perplexity on ``texts``
    is at most ``growth`` times as large. An edit takes part whose old answer the model gives by itself (greedy): its
    ``old_target``, or, where the data has none, whatever the model answers, unless that is the new answer already.

    The paper's coefficients (0.1 to 0.7) are multiples of the trained difference, whose length is that of the training:
    a model that gives the old answers anyway has next to no loss, so a loop that stops at a low loss stops after an
    epoch. On the embedded world (24 facts, one matrix) such a difference had 3.8 % of the weights' length, and 13 times
    as much had to be subtracted to bring the old answers' probability from 0.996 to 0.62; after 60 epochs it had 44 %,
    and 1.1 times as much did that. Both are half the weights' length. So a coefficient is by default a length: of the
    subtracted difference over that of the weights it changes. ``scale="trained"`` is the paper's.

    Args:
        model: given back as it was, bit for bit, with the random state. tokenizer: its own.
        edits: with the new answers as targets.
        train: ``train(model, edits)``, in place; a :class:`~kedit_train.modes.TrainLoop` or any callable. It is given
            the old answers as targets.
        coefficients: above 0.
        texts: for the perplexity: a list, or what ``KLLocality`` reads. Texts that state other facts in the edits'
            wordings notice harm long before prose does.
        scale: what a coefficient is a share of: the length of the weights (``base``) or the trained difference.
        bound: a probability. At 0.5 about half of the world's old answers are no longer given and its locality is above
            0.95; at 0.1 nearly none is given, and a quarter or more of the locality is lost.
        growth: of the perplexity, at least 1.
        batch_size: rows at a time, of the measurements; max_new_tokens: where an old answer is cut, and left out.
        prompt_format: how the old answers are asked for and measured; ``train`` has a format of its own.

    Warns:
        UserWarning: the old answers are as probable as before or more than ``bound`` allows; with what to change.

    Raises:
        EditError: an argument out of range, no edits or texts, a training that changes nothing or cannot be taken back.
    """
    guards = Guards(coefficients, scale, bound, growth)
    given = Texts.of(texts).load(edits, keep_leaks=True)
    asked: dict[str, Any] = {"batch_size": batch_size, "prompt_format": prompt_format}
    old, left_out = old_answers(model, tokenizer, edits, max_new_tokens=max_new_tokens, **asked)
    if not old:
        warnings.warn(f"forget: the model gives none of {len(edits)} old answers: nothing to forget", stacklevel=2)
        return Forgetting(None, 0.0, "unknown", (), (), left_out, 0.0)
    before = measure(model, tokenizer, old, given, 0.0, 0.0, **asked)
    vector, length = _trained(model, train, old)

    def subtracted(coefficient: float, factor: float) -> Measured:
        applied = (-factor * vector).apply(model)
        try:
            return measure(model, tokenizer, old, given, coefficient, factor, **asked)
        finally:
            applied.revert(model)

    found, taken, ended = guards.search(before, length, subtracted)
    best = found[taken]
    if ended != "forgotten":
        warnings.warn(guards.shortfall(found, taken, ended, length), stacklevel=2)
    about = {"forgetting": {"coefficient": best.coefficient, "factor": best.factor, "scale": scale, "ended_by": ended}}
    delta = (-best.factor * vector).delta(configuration=about) if taken else None
    return Forgetting(delta, best.coefficient, ended, tuple(found), tuple(old), left_out, length)


class ForgetThenLearn:
    """``train(model, edits)`` for :func:`~kedit_train.run_edits`: :func:`forget`, then learn the new answers.

    Where there is nothing to forget, or nothing within the guards, it learns only, and ``results`` says so. In a
    sequence each round forgets what the model of that moment answers, and its guard is that model's perplexity.
    So the rounds' harm adds up within the guard: on the embedded world, 12 edits one after the other, the locality was
    0.54 where learning alone left 0.86 (in one batch of 24, 0.91 and 0.93).

    Args:
        tokenizer: of the model.
        train_old, train_new: ``train(model, edits)``, of the old answers and of the edits.
        forgetting: further arguments of :func:`forget`: ``texts``, which is needed, ``coefficients``, ``scale``, ...

    Attributes:
        results: a :class:`Forgetting` for each call.
    """

    def __init__(
        self,
        tokenizer: Any,
        train_old: Callable[[nn.Module, Sequence[Edit]], Any],
        train_new: Callable[[nn.Module, Sequence[Edit]], Any],
        **forgetting: Any,
    ) -> None:
        if "texts" not in forgetting:
            raise EditError("ForgetThenLearn: what may not be harmed is not known: give texts=")
        self.tokenizer, self.train_old, self.train_new, self.forgetting = tokenizer, train_old, train_new, forgetting
        self.results: list[Forgetting] = []

    def __call__(self, model: nn.Module, edits: Sequence[Edit]) -> None:
        found = forget(model, self.tokenizer, edits, self.train_old, **self.forgetting)
        self.results.append(found)
        if found.delta is not None:
            found.delta.apply(model)
        self.train_new(model, edits)

    def __repr__(self) -> str:
        told = {name: value for name, value in self.forgetting.items() if name != "texts"}
        return f"ForgetThenLearn(old={self.train_old!r}, new={self.train_new!r}, {told})"


def _trained(model: nn.Module, train: Callable[..., Any], old: Sequence[Edit]) -> tuple[TaskVector, float]:
    """What training on the old answers changes, and its length over that of the weights it changes."""
    kept, live = KeptWeights(model), weights_of(model)
    base = Weights({name: lambda name=name: kept.values[name] for name in live}, live.tied, about=live.about)
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        # What is learned afterwards sees the same batches as without forgetting.
        with torch.random.fork_rng(devices):
            returned = train(model, EditDataset(old, name="old answers"))
        if isinstance(returned, nn.Module) and returned is not model:
            raise EditError("forget: train(model, edits) returned another model; it has to change the given one")
        delta = EditDelta.between(base, model, edits=old)
    finally:
        kept.restore()
    if not len(delta):
        raise EditError("forget: train(model, edits) changed no weight, so there is nothing to subtract")
    vector = delta.vector()
    whole = math.sqrt(sum(float(kept.values[name].double().square().sum()) for name in vector.differences))
    return vector, vector.norm() / whole if whole else math.inf
