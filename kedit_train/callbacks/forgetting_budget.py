"""ForgettingBudget: adapt the weight of a KL penalty during training, so that the divergence stays within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from kedit_train.arguments import above, check_arguments, integer_from, one_of, optional, within
from kedit_train.callbacks.base import EditCallback
from kedit_train.core.locality.divergence_penalty import CAPABILITY, DivergencePenalty, Measured
from kedit_train.core.processes import is_distributed
from kedit_train.core.requirements import Requirement
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError, warn
from kedit_train.functional.dual_ascent import dual_ascent, log_ratio, penalty_weight

# The divergence is a running average: each step counts half as much as the step after it.
_DECAY = 0.5
# The weight is adapted so that the divergence approaches this fraction of the budget. Fluctuations then stay below the
# budget itself.
_AIM = 0.9
# A smaller weight has no effect, and would need many steps to grow again.
_SMALLEST_WEIGHT = 0.01
# The callback that adds each penalty, by the value of ``measured_on``.
_OWNERS: dict[str, str] = {"texts": "KLLocality", "batch": "BatchAnchor", "outputs": "OutputAnchor"}


class ForgettingBudget(EditCallback):
    """Keep the divergence from the model before the edit within a budget, by adapting the weight of a penalty.

    Another callback adds the penalty. :class:`KLLocality` penalizes the divergence on texts. :class:`BatchAnchor`
    penalizes the divergence on the training data. :class:`OutputAnchor` penalizes changed outputs, such as forecasts.
    After each optimizer step, ``ForgettingBudget`` compares a running average of the divergence with 0.9 times the
    budget. If the average is larger, the weight of the penalty rises. Otherwise, the weight falls (dual ascent on a
    Lagrange multiplier). You therefore choose how much the model may change, and do not have to choose a weight. The
    argument ``weight`` of the penalty is only the value at the start.

    If the run is long enough, the divergence is within the budget when training ends. In the first steps, the
    divergence can be above the budget, because ``ForgettingBudget`` has not yet adapted the weight of the penalty. The
    divergence of a step is measured before the weights of the model change, so the effect of the last step is not
    measured. If the last average is above the budget, there is a warning at the end of the run.

    Args:
        kl: the budget: mean divergence per token in nats, in the direction that the penalty uses. For
            :class:`OutputAnchor`, the budget is a mean distance, in the unit of the chosen ``distance``.
        step_size: how fast the weight adapts. In each step, a Lagrange multiplier rises or falls by at most the factor
            exp(step_size). If the running average of the divergence is at most 0.9 times the budget, the weight is this
            multiplier. If the average is larger, the weight is up to 1.65 times this multiplier.
        measured_on: which penalty to adapt, if there are several: "texts" (KLLocality), "batch" (BatchAnchor) or
            "outputs" (OutputAnchor). With None, there must be only one penalty.
        max_weight: upper bound of the weight. If the weight reaches this bound, the learning rate is too high for the
            budget: a larger weight would only prevent learning.
        stop_after: end training when the divergence has been above the budget in this number of consecutive steps.
            None never ends training.

    Attributes:
        weight: the current weight of the penalty. None before training.
        divergence: running average of the divergence per token, in nats. None before the first step.
        reason: why training was ended by ``stop_after``, as text, or None.

    Raises:
        EditError: an argument is out of range, no callback adds the penalty that ``measured_on`` names, several
            penalties match, another ForgettingBudget adapts the same penalty, or the weight of the penalty is 0.

    References:
        Responsive Safety in Reinforcement Learning by PID Lagrangian Methods, arXiv 2007.03964.
        RL's Razor: Why Online Reinforcement Learning Forgets Less, arXiv 2509.04259, for the divergence on the new data
        as a predictor of forgetting.

    Example:
        >>> import torch
        >>> from kedit_train import editing, world
        >>> from kedit_train.callbacks import BatchAnchor, ForgettingBudget
        >>> model, tokenizer = world.load()
        >>> batch = tokenizer("The old baker found a coin.", return_tensors="pt")
        >>> budget = ForgettingBudget(0.2)
        >>> with editing(model, [BatchAnchor(weight=1.0), budget], tokenizer=tokenizer) as edit:
        ...     optimizer = torch.optim.SGD(edit.parameters(), lr=1e-3)
        ...     edit.before_step()
        ...     model(**batch, labels=batch["input_ids"]).loss.backward()
        ...     optimizer.step()
        >>> round(budget.weight, 3)  # The model has not changed before the first step, so the weight falls.
        0.905
    """

    # ForgettingBudget comes after the callbacks that add the penalties.
    order = 40
    # This callback returns no penalty, but its arguments change the trained weights, so a resumed run and all processes
    # must use the same arguments.
    penalizes = True
    follows_steps = True

    def __init__(
        self,
        kl: float = 0.01,
        *,
        step_size: float = 0.1,
        measured_on: Measured | None = None,
        max_weight: float = 1000.0,
        stop_after: int | None = None,
    ) -> None:
        check_arguments(
            self,
            kl=(kl, above(0)),
            step_size=(step_size, within("(0, 1]")),
            measured_on=(measured_on, optional(one_of(tuple(_OWNERS)))),
            max_weight=(max_weight, above(_SMALLEST_WEIGHT)),
            stop_after=(stop_after, optional(integer_from(1))),
        )
        self.kl = kl
        self.step_size = step_size
        self.max_weight = max_weight
        self.measured_on: Measured | None = measured_on
        self.stop_after = stop_after
        self.weight: float | None = None
        self.divergence: float | None = None
        self.reason: str | None = None

    def requires(self) -> Sequence[Requirement]:
        message = (
            "no callback of this run adds a penalty whose weight can be adapted; add KLLocality(texts) (a penalty on "
            "texts), BatchAnchor() (on the training data) or OutputAnchor(inputs) (on the outputs for given inputs)."
        )
        return [Requirement((CAPABILITY,), message)]

    def attach(self, run: EditRun) -> None:
        self._penalty = self._find_penalty(run)
        self._penalty.adapted = True
        self._set_weight(min(self._penalty.weight, self.max_weight))
        # A penalty may begin with an even smaller weight.
        self._smallest = min(_SMALLEST_WEIGHT, self._penalty.weight)
        self._log_multiplier = math.log(self._penalty.weight)
        self.divergence, self.reason = None, None
        self._steps_above = 0

    def _find_penalty(self, run: EditRun) -> DivergencePenalty:
        kinds = (self.measured_on,) if self.measured_on else tuple(_OWNERS)
        found = [penalty for penalty in run.penalties if penalty.measured_on in kinds]
        if not found:
            owner = _OWNERS[kinds[0]]
            raise EditError(f'measured_on="{self.measured_on}" needs {owner}, which is missing; add {owner}.')
        if len(found) > 1:
            on = [penalty.measured_on for penalty in found]
            several = (
                f"only one penalty can be adapted, but this run has {len(found)}: "
                f"{', '.join(f'{_OWNERS[kind]} (measured on {kind})' for kind in on)}"
            )
            advice = "set measured_on= to choose one" if len(set(on)) > 1 else "keep only one of the penalties"
            raise EditError(f"{several}; {advice}.")
        (penalty,) = found
        if penalty.adapted:
            raise EditError(
                f"another ForgettingBudget already adapts the penalty with measured_on={penalty.measured_on!r}; keep "
                "only one ForgettingBudget, or give each ForgettingBudget a different measured_on=."
            )
        if penalty.weight == 0.0:
            owner = _OWNERS[penalty.measured_on]
            raise EditError(
                f"the weight of {owner} must be > 0, got 0, because ForgettingBudget only multiplies this weight, so 0 "
                f"would stay 0; remove weight=0 from {owner}."
            )
        return penalty

    def after_step(self, run: EditRun) -> None:
        measured = self._measure(run)
        if measured is None:
            return
        if not math.isfinite(measured):
            raise EditError(f"the divergence of step {run.step} is {measured}; lower the learning rate.")
        before = measured if self.divergence is None else self.divergence
        self.divergence = _DECAY * before + (1.0 - _DECAY) * measured
        violation = log_ratio(self.divergence, _AIM * self.kl)
        bounds = (self._smallest, self.max_weight)
        self._log_multiplier = dual_ascent(self._log_multiplier, violation, step_size=self.step_size, bounds=bounds)
        self._set_weight(penalty_weight(self._log_multiplier, violation, largest=self.max_weight))
        self._steps_above = self._steps_above + 1 if self.divergence > self.kl else 0
        if self.stop_after is not None and self._steps_above >= self.stop_after:
            self._stop(run)

    def _measure(self, run: EditRun) -> float | None:
        """Return the mean divergence over the tokens of this step on all processes, or None if there is no token."""
        total, tokens = self._penalty.take()
        if is_distributed():
            # All processes must use the same weight.
            device = next(iter(run.scope.values())).device
            both = torch.stack((total.to(device, torch.float64), torch.tensor(tokens, device=device).double()))
            dist.all_reduce(both)
            total, tokens = both[0], int(both[1])
        return float(total) / tokens if tokens else None

    def _set_weight(self, weight: float) -> None:
        self.weight = self._penalty.weight = weight

    def _stop(self, run: EditRun) -> None:
        if self.reason is None:
            self.reason = (
                f"the divergence (now {self.divergence:.3g}) has been above the budget of {self.kl:g} in "
                f"{self._steps_above} consecutive steps"
            )
            if run.host.is_main:
                print(f"stopped at step {run.step}: {self.reason}")
        run.stop()

    def metrics(self, run: EditRun) -> dict[str, float]:
        """Return the running average of the divergence, in nats per token, and the current weight of the penalty."""
        if self.divergence is None or self.weight is None:
            return {}
        return {"edit/locality/budget_kl": self.divergence, "edit/locality/budget_weight": self.weight}

    def finish(self, run: EditRun) -> None:
        above = self.divergence is not None and self.divergence > self.kl
        if above and self.reason is None and run.host.is_main:
            at_bound = self.weight is not None and self.weight >= self.max_weight
            advice = "use a lower learning rate" if at_bound else "train for more steps, or use a lower learning rate"
            warn(
                f"the divergence is {self.divergence:.3g} at the end of training, above the budget of {self.kl:g} "
                f"(weight of the penalty: {self.weight:.3g}); {advice}."
            )

    def state(self) -> dict[str, Any]:
        if self.weight is None:
            return {}
        return {
            "log_multiplier": self._log_multiplier,
            "weight": self.weight,
            "divergence": self.divergence,
            "steps_above": self._steps_above,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._log_multiplier, self.divergence = state["log_multiplier"], state["divergence"]
        self._steps_above = state["steps_above"]
        self._set_weight(state["weight"])

    def __repr__(self) -> str:
        return f"ForgettingBudget({self.kl}, step_size={self.step_size}, measured_on={self.measured_on!r})"
