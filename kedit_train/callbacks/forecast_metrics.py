"""ForecastMetrics: measure the error of a forecaster on new data, and how much its other forecasts change."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from kedit_train.arguments import Rule, check_arguments, integer_from, one_of, optional
from kedit_train.callbacks.base import EditCallback
from kedit_train.core.locality.model_inputs import read_model_inputs
from kedit_train.core.locality.reference_outputs import SELECTION, ModelOutputs, ReferenceOutputs, Selection
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError
from kedit_train.functional.output_distance import quantile_loss, relative_change

_LEVELS = Rule(
    "a list of numbers in (0, 1)",
    lambda value: len(value) > 0 and all(0.0 < level < 1.0 for level in value),
)
_NAME = Rule("the name of a submodule", lambda value: isinstance(value, str))
# The name of the targets in a safetensors file.
_TARGETS = "targets"


class ForecastMetrics(EditCallback):
    """Measure the error on new data, and how much the outputs change on inputs where they should not change.

    The model may be any module, for example a forecaster. Every ``every_n_steps`` optimizer steps and after training,
    the model is called in evaluation mode on all inputs, and two metrics are logged. The error before training is the
    attribute ``unedited_error``.

    - ``edit/forecast/error``: the mean squared error or the mean quantile loss on the inputs ``new``.
    - ``edit/forecast/change``: how much the outputs on the inputs ``kept`` have changed. It is the norm of this change,
      divided by the norm of the outputs before the edit.

    The trainer's own evaluations contain both metrics, too. In ``transformers``, the metrics are then named
    ``eval_edit_forecast_error`` and ``eval_edit_forecast_change``.

    Args:
        new: the new inputs and their targets, as two lists or as a file. The lists are a pair (inputs, targets) with
            one item per forward pass. An item of the inputs is a tensor, a tuple of positional arguments or a mapping
            of keyword arguments, and its target is a tensor. A file is given as the path of a safetensors file. One of
            its tensors is named "targets". Every other tensor is named like an argument of ``forward``. All tensors
            have the shape [forward passes, windows, ...].
        kept: inputs on which the outputs should not change, as one list or as a file, without targets.
        every_n_steps: number of optimizer steps between two measurements. 0 measures before and after training only.
        error: "mse" is the mean squared error. Each output must have the shape of its target. "quantile" is the mean
            quantile loss. For a target of the shape [...], the output must have the shape [..., Q].
        quantiles: the Q quantile levels, in (0, 1), for ``error="quantile"``.
        output: which tensor of the model's output to use: a name, an index, or a function of the output. With None, the
            output must be a tensor.
        module: name of the submodule to call. None calls the module that the loop trains or, if this module
            contains a language model, only the language model.

    Attributes:
        unedited_error: the error before the edit. None before training.
        last_error: the last measured error. None before training.
        last_change: the last measured change. None before training.

    Raises:
        EditError: an argument is out of range, the numbers of inputs and targets differ, a target is empty or not
            finite, or an output does not have the shape that its target requires.

    References:
        A Multi-Horizon Quantile Recurrent Forecaster, arXiv 1711.11053, for the quantile loss.

    Example:
        >>> import torch
        >>> from kedit_train.callbacks import ForecastMetrics, editing
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> windows, targets = torch.ones(8, 4), torch.full((8, 1), 6.0)
        >>> metrics = ForecastMetrics(([windows], [targets]), kept=[-windows])
        >>> with editing(model, [metrics]) as edit:
        ...     optimizer = torch.optim.SGD(edit.parameters(), lr=0.125)
        ...     edit.before_step()
        ...     (model(windows) - targets).square().mean().backward()
        ...     optimizer.step()
        >>> metrics.unedited_error, metrics.last_error, metrics.last_change
        (4.0, 0.0, 0.5)
    """

    order = 60
    follows_steps = True
    duplicate_hint: str | None = "keep one ForecastMetrics and pass all inputs to it"

    def __init__(
        self,
        new: Any,
        *,
        kept: Any,
        every_n_steps: int = 20,
        error: Literal["mse", "quantile"] = "mse",
        quantiles: Sequence[float] | None = None,
        output: Selection = None,
        module: str | None = None,
    ) -> None:
        check_arguments(
            self,
            every_n_steps=(every_n_steps, integer_from(0)),
            error=(error, one_of(("mse", "quantile"))),
            quantiles=(quantiles, optional(_LEVELS) if error == "mse" else _LEVELS),
            output=(output, SELECTION),
            module=(module, optional(_NAME)),
        )
        self.new = new
        self.kept = kept
        self.every_n_steps = every_n_steps
        self.output = output
        self.module = module
        self.error: Literal["mse", "quantile"] = error
        self.quantiles: list[float] | None = None if quantiles is None else list(quantiles)
        self.unedited_error: float | None = None
        self.last_error: float | None = None
        self.last_change: float | None = None

    def provides(self) -> set[str]:
        return {"edit/forecast/error", "edit/forecast/change"} if self.every_n_steps else set()

    def prepare(self, run: EditRun) -> None:
        self._kept_items = read_model_inputs(self.kept, "kept")
        self._new_items, self._targets = self._read_new()
        for index, target in enumerate(self._targets):
            if not target.numel() or not bool(target.isfinite().all()):
                what = (
                    "contain only finite numbers"
                    if target.numel()
                    else f"not be empty, got shape {tuple(target.shape)}"
                )
                raise EditError(f"the target for new[0][{index}] must {what}; remove this item from new.")

    def attach(self, run: EditRun) -> None:
        self._new = ModelOutputs(run, self._new_items, self.output, self.module, "new")
        self._kept = ReferenceOutputs(ModelOutputs(run, self._kept_items, self.output, self.module, "kept"))
        self._kept.start()
        self._measured_step, self.last_change = -1, None
        if not run.host.resumed:
            with run.reference_model():
                self.unedited_error = self.last_error = self._error()

    def after_step(self, run: EditRun) -> None:
        if self.every_n_steps and run.step % self.every_n_steps == 0:
            run.host.log(self._measure(run))

    def evaluation_metrics(self, run: EditRun) -> dict[str, float]:
        return self._measure(run)

    def finish(self, run: EditRun) -> None:
        # At the end of training, the weights can differ from those of the last step, so both metrics are measured
        # again.
        self._measured_step = -1
        run.host.log(self._measure(run), last=True)

    def state(self) -> dict[str, Any]:
        kept = getattr(self, "_kept", None)
        return {} if kept is None else {"kept": kept.state(), "unedited_error": self.unedited_error}

    def load_state(self, state: dict[str, Any]) -> None:
        self._kept.load_state(state["kept"])
        self.unedited_error = state["unedited_error"]

    def detach(self, run: EditRun) -> None:
        self.__dict__.pop("_kept", None)
        self.__dict__.pop("_new", None)

    @torch.no_grad()
    def _measure(self, run: EditRun) -> dict[str, float]:
        """Return both metrics for the current weights, and publish them. Each step is measured at most once."""
        if self._measured_step != run.step:
            pairs = self._kept.all_pairs()
            self.last_change = relative_change([before for before, _ in pairs], [now for _, now in pairs])
            self.last_error, self._measured_step = self._error(), run.step
        assert self.last_error is not None
        assert self.last_change is not None
        metrics = {"edit/forecast/error": self.last_error, "edit/forecast/change": self.last_change}
        run.publish(metrics)
        return metrics

    @torch.no_grad()
    def _error(self) -> float:
        """Return the mean error over all target values of the new inputs."""
        total, count = 0.0, 0
        for index, target in enumerate(self._targets):
            output = self._new(index).double()
            target = target.to(output.device).double()
            levels = self.quantiles if self.error == "quantile" else None
            expected = tuple(target.shape) if levels is None else (*target.shape, len(levels))
            if tuple(output.shape) != expected:
                raise EditError(
                    f"the output for new[0][{index}] must have the shape {expected} to fit its target of shape "
                    f"{tuple(target.shape)}, got {tuple(output.shape)}; change the target, or reshape with output=."
                )
            mean = (output - target).square().mean() if levels is None else quantile_loss(output, target, levels)
            total, count = total + float(mean) * target.numel(), count + target.numel()
        return total / count

    def _read_new(self) -> tuple[list[Any], list[Tensor]]:
        """Return the inputs and the targets of the argument ``new``."""
        if isinstance(self.new, str | os.PathLike):
            items = read_model_inputs(self.new, "new")
            if _TARGETS not in items[0]:
                given = ", ".join(f'"{name}"' for name in items[0])
                raise EditError(
                    f'{self.new} must contain a tensor named "{_TARGETS}", got only {given}; add the targets.'
                )
            return items, [item.pop(_TARGETS) for item in items]
        if not isinstance(self.new, tuple | list) or len(self.new) != 2:
            got = f"{len(self.new)} items" if isinstance(self.new, tuple | list) else type(self.new).__name__
            raise EditError(
                f"new must be a pair of two lists (inputs, targets), got {got}; pass new=([inputs], [targets])."
            )
        items, targets = read_model_inputs(self.new[0], "new"), self.new[1]
        if not isinstance(targets, list | tuple) or not all(isinstance(target, Tensor) for target in targets):
            raise EditError(
                "the targets, the second item of new, must be a list with one tensor per forward pass; for a single "
                "forward pass, pass ([inputs], [targets])."
            )
        if len(items) != len(targets):
            raise EditError(
                f"new must have one target per forward pass, got {len(items)} inputs and {len(targets)} targets; pass "
                "two lists of the same length."
            )
        return items, list(targets)

    def __repr__(self) -> str:
        return f"ForecastMetrics(error={self.error!r}, every_n_steps={self.every_n_steps})"
