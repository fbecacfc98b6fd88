"""PolyakStep: choose the length of each optimizer step from the loss, so that no learning rate is needed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kedit_train.arguments import check_arguments, within
from kedit_train.callbacks.base import EditCallback
from kedit_train.core.checksums import first_not_finite
from kedit_train.core.drift.shards import mean, total
from kedit_train.core.fsdp import full_tensor, shard_like
from kedit_train.core.requirements import Requirement
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError, warn
from kedit_train.functional.adam import AdamAverages
from kedit_train.functional.precision import wide

# The longest step, as a fraction of the norm of the weights in scope.
_LONGEST = 0.1
# A warning is issued if the average loss has not fallen by one percent in this number of steps.
_STALLED = 20


class PolyakStep(EditCallback):
    """Replace each optimizer step by a step of Adam whose length follows from the loss.

    After each optimizer step, the change that the optimizer made is discarded. Instead, the callback takes a step in
    the direction of Adam. The gradient predicts how much a step of a given length reduces the loss. The callback
    chooses the length for which the predicted reduction is ``step_size`` times the loss (Polyak's step size, with
    running averages of loss and gradient). A step is never longer than a tenth of the norm of the weights in scope. The
    optimizer, its learning rate and a learning rate schedule have no effect on the weights in scope.

    Other callbacks act as usual. A penalty such as ``KLLocality`` is part of the gradient. The constraints of
    ``NullSpace``, ``LowCurvature``, ``GradientMask`` and ``NormBall`` are applied after the step. ``NullSpace``,
    ``LowCurvature`` and ``GradientMask`` also project the gradient before the step, so the predicted reduction takes
    their constraints into account. ``NormBall`` does not change the gradient. If ``NormBall`` shortens a step, the loss
    falls by less than predicted.

    If an edit cannot be learned, the loss stops falling, but every step still moves the weights and changes other
    answers. A warning is issued if the average loss has not fallen by one percent in 20 steps.

    Args:
        step_size: how much each step should reduce the training loss, as a fraction of the loss, in (0, 1]. The
            reduction is predicted from the gradient. A smaller value needs more steps and preserves more behavior.
            Default 0.1.

    Raises:
        EditError: ``step_size`` is not in (0, 1]; no callback computes the loss; or another callback also replaces the
            optimizer step.

    References:
        MoMo: Momentum Models for Adaptive Learning Rates, arXiv 2305.07583, for Polyak's step size with momentum.
        Adam: A Method for Stochastic Optimization, arXiv 1412.6980.

    Example:
        >>> import torch
        >>> from kedit_train import EditDataset, editing, world
        >>> from kedit_train.callbacks import ParameterScope, PolyakStep, TokenLoss
        >>> model, tokenizer = world.load()
        >>> edit = EditDataset.load("world", limit=1)[0]
        >>> batch = tokenizer(f"{edit.prompt} {edit.target}", return_tensors="pt")
        >>> callbacks = [ParameterScope(0.7, modules="mlp.down_proj"), TokenLoss("cross_entropy"), PolyakStep(0.2)]
        >>> losses = []
        >>> with editing(model, callbacks, tokenizer=tokenizer) as run:
        ...     optimizer = torch.optim.SGD(run.parameters(), lr=1.0)
        ...     for _ in range(2):
        ...         run.before_step()
        ...         losses.append(model(**batch, labels=batch["input_ids"]).loss)
        ...         losses[-1].backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> bool(losses[1] < losses[0])
        True
    """

    # PolyakStep comes before all constraints, because it replaces the step that the constraints are applied to.
    order = 30
    constrains = True
    duplicate_hint: str | None = "the second one would replace the step of the first, so keep only one"

    def __init__(self, step_size: float = 0.1) -> None:
        check_arguments(self, step_size=(step_size, within("(0, 1]")))
        self.step_size = step_size
        self._gradients: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._averages = AdamAverages()
        self._norm = 0.0
        # The lowest average loss so far, and the number of steps since then.
        self._lowest, self._since = math.inf, 0

    def provides(self) -> set[str]:
        return {"optimizer_step"}

    def conflicts(self) -> Sequence[Requirement]:
        message = (
            "another callback also replaces the optimizer step; keep only one of PolyakStep, SecondOrderLocality and "
            "SubjectValues."
        )
        return [Requirement(("optimizer_step",), message)]

    def requires(self) -> Sequence[Requirement]:
        message = (
            "this callback computes the length of each step from the training loss, which no callback of this run "
            'measures; add TokenLoss("cross_entropy").'
        )
        return [Requirement(("edit/tokens/loss_now",), message)]

    def attach(self, run: EditRun) -> None:
        self._gradients, self._before, self._averages = {}, {}, self.new_averages()
        self._lowest, self._since = math.inf, 0
        # After gradient clipping, the gradient would no longer predict how much a step reduces the loss.
        clipping = run.host.disable_clipping()
        if clipping is not None:
            name, value = clipping
            warn(
                f"{name}={value:g} is ignored during this training, because this callback chooses the length of each "
                f"step itself; set {name}=0 to avoid this warning."
            )
        self._norm = total(wide(run.reference[name]).square() for name in run.scope) ** 0.5
        if self._norm == 0.0:
            raise EditError(
                "all parameters in scope are 0. A step is never longer than a tenth of their norm, so no step would "
                "change a parameter; add parameters that are not 0 to the scope."
            )

    def new_averages(self) -> AdamAverages:
        """Return empty running averages, which compute the direction of a step. A subclass may use other averages."""
        return AdamAverages()

    def coordinates(self, name: str, gradient: Tensor) -> Tensor:
        """Return the gradient from which Adam computes its direction. A subclass may transform the gradient."""
        return gradient

    def change(self, name: str, direction: Tensor) -> Tensor:
        """Return the direction along which the parameter moves. A subclass may transform Adam's direction."""
        return direction

    @torch.no_grad()
    def before_optimizer_step(self, run: EditRun) -> None:
        if run.steps.is_shared:
            raise EditError(
                "all parameters in scope must belong to one optimizer, got several optimizers in one step; use a "
                "single optimizer, because this callback replaces the optimizer step."
            )
        self._before = {name: parameter.detach().clone() for name, parameter in run.scope.items()}
        given = {name: p.grad for name, p in run.scope.items() if p.grad is not None}
        scale = run.steps.gradient_scale
        self._gradients = {name: self.coordinates(name, wide(gradient) / scale) for name, gradient in given.items()}
        # If a NaN or an infinite square entered the running averages, no later step would change a weight.
        if not have_finite_squares(self._gradients.values()):
            unscaled = {name: wide(gradient) / scale for name, gradient in given.items()}
            raise EditError(self.describe_overflow(unscaled, run.step + 1))

    def describe_overflow(self, gradients: Mapping[str, Tensor], step: int) -> str:
        """Return the error message for gradients whose squares are not all finite."""
        return (
            f"the gradients of step {step} contain NaN or infinite values, or values whose squares are infinite; check "
            "the loss of this batch, or use a lower step_size."
        )

    def constrain(self, weights: dict[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        run = self.run
        # If another callback skipped this step, the gradients were deleted after this callback had read them.
        gradients = {n: g for n, g in self._gradients.items() if run.scope[n].grad is not None}
        before, self._gradients, self._before = self._before, {}, {}
        changed = dict(weights)
        changed.update(before)
        if not gradients:
            return changed
        loss_now = run.scores["edit/tokens/loss_now"]
        if not math.isfinite(loss_now):
            raise EditError(f"the loss of step {run.step} is {loss_now}; check the loss of this batch.")
        averages = self._averages
        for values in (averages.means, averages.squares):
            # Averages from a checkpoint are complete, so each process takes its own shard.
            values.update({name: shard_like(values[name], g) for name, g in gradients.items() if name in values})
        loss, means, adam = averages.update(gradients, loss_now, mean=mean)
        self._warn_if_stalled(loss)
        slope = total(means[name] * u for name, u in adam.items())
        directions = {name: self.change(name, u) for name, u in adam.items()}
        norm = total(direction.square() for direction in directions.values()) ** 0.5
        if not (slope > 0.0 and norm > 0.0):
            return changed
        length = min(self.step_size * abs(loss) / slope, _LONGEST * self._norm / norm)
        for name, direction in directions.items():
            changed[name] = (wide(before[name]) - direction * length).to(before[name].dtype)
        return changed

    def _warn_if_stalled(self, loss: float) -> None:
        if loss < 0.99 * self._lowest:
            self._lowest, self._since = loss, 0
            return
        self._since += 1
        if self._since == _STALLED:
            warn(
                f"the average training loss has not fallen by 1 % in the last {_STALLED} steps (now {loss:.3g}), but "
                "every step still moves the weights; an edit may be impossible to learn in this scope. Find this edit "
                "with EditMetrics(every_n_steps=) and remove or reword it, or stop the training here."
            )

    def state(self) -> dict[str, Any]:
        averages = self._averages
        means, squares = (
            {name: full_tensor(value) for name, value in values.items()}
            for values in (averages.means, averages.squares)
        )
        return {"means": means, "squares": squares, "loss": averages.loss, "steps": averages.steps}

    def load_state(self, state: dict[str, Any]) -> None:
        # Tensors that were read from a file can have unaligned addresses. The alignment changes the last bits of matrix
        # products, so the tensors are copied.
        means, squares = (
            {name: tensor.to(self.run.scope[name].device, copy=True) for name, tensor in state[key].items()}
            for key in ("means", "squares")
        )
        averages = self.new_averages()
        averages.means, averages.squares = means, squares
        averages.loss, averages.steps = float(state["loss"]), int(state["steps"])
        self._averages = averages

    def detach(self, run: EditRun) -> None:
        run.host.restore_clipping()
        self._gradients, self._before, self._averages = {}, {}, AdamAverages()

    def __repr__(self) -> str:
        return f"PolyakStep({self.step_size})"


def have_finite_squares(gradients: Iterable[Tensor]) -> bool:
    """Return whether the square of every entry is finite."""
    return first_not_finite(gradient.square() for gradient in gradients) is None
