"""Did it take? Then stop: every further step costs locality and buys nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from kedit_train.callbacks.base import EditCallback
from kedit_train.core.requirements import Requirement
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError

_PROBABILITY = "edit/reliability_smallest_token_probability"
# KLLocality's, on its texts at each log event, and EditMetrics', on the locality probes at each look.
_KL = ("edit/locality/kl", "edit/locality_kl")


class StopWhenEdited(EditCallback):
    """End training once the edits are learned, or once they have cost too much.

    Of several rules the first that is met ends training; a line says which, and ``reason`` holds it.

    Args:
        reliability: stop when ``EditMetrics`` measured at least this reliability; it has to be on the list, with
            ``every_n_steps`` set. None turns this off.
        idle_steps: stop after this many optimizer steps in a row in which ``TokenSmoothing`` found no active token;
            "epoch" takes as many as an epoch has, which then had nothing to teach. None turns this off.
        smallest_probability: stop when the least probable token of all targets has at least this probability, as
            ``EditMetrics`` measures it under teacher forcing: the one token that did not take is what a mean hides.
            Reliability is often 1 before; turn that off then. None turns this off.
        kl_budget: stop when the divergence from the unedited model, in nats a token, is above this:
            ``edit/locality/kl`` of ``KLLocality`` (the mean since the last log event) or ``edit/locality_kl`` of
            ``EditMetrics(metrics=["kl"])``, whichever is on the list. None turns this off.
        loss: stop when the mean of ``TokenSmoothing``'s loss a token over the last ``loss_steps`` optimizer steps is
            below this; 0.01 over an epoch is where FT-M and LocFT-BF ("Fine-tuning Done Right in Model Editing", arXiv
            2509.22072) end. ``TokenLoss()`` has cross-entropy as its loss. None: off.
        loss_steps: a number of steps, or "epoch": as many as an epoch has. A plain loop says it in
            ``editing(epoch_steps=...)``.
    """

    # After EditMetrics, whose scores it reads.
    order = 90

    def __init__(
        self,
        reliability: float | None = 1.0,
        idle_steps: int | Literal["epoch"] | None = None,
        smallest_probability: float | None = None,
        kl_budget: float | None = None,
        loss: float | None = None,
        loss_steps: int | Literal["epoch"] = "epoch",
    ) -> None:
        if all(rule is None for rule in (reliability, idle_steps, smallest_probability, kl_budget, loss)):
            raise EditError("StopWhenEdited: every rule is None, so it would never stop a run")
        if reliability is not None and not 0.0 < reliability <= 1.0:
            raise EditError(f"StopWhenEdited: reliability={reliability} is no share in (0, 1]")
        for name, steps in (("idle_steps", idle_steps), ("loss_steps", loss_steps)):
            if steps not in (None, "epoch") and not (isinstance(steps, int) and steps >= 1):
                raise EditError(f"StopWhenEdited: {name}={steps!r} is no number of steps (1 or more, or 'epoch')")
        if smallest_probability is not None and not 0.0 < smallest_probability < 1.0:
            raise EditError(f"StopWhenEdited: smallest_probability={smallest_probability} is none in (0, 1)")
        if kl_budget is not None and not 0.0 < kl_budget < float("inf"):
            raise EditError(f"StopWhenEdited: kl_budget={kl_budget} is no divergence (nats, above 0)")
        if loss is not None and not 0.0 < loss < float("inf"):
            raise EditError(f"StopWhenEdited: loss={loss} is none to end at (above 0)")
        self.reliability, self.idle_steps = reliability, idle_steps
        self.smallest_probability, self.kl_budget = smallest_probability, kl_budget
        self.loss, self.loss_steps = loss, loss_steps
        self.reason: str | None = None

    def requires(self) -> Sequence[Requirement]:
        metrics = "reads what EditMetrics measures during training; add EditMetrics(every_n_steps=20), or pass"
        tokens = "idle_steps counts active tokens; add TokenSmoothing(epsilon=0.05), or pass idle_steps=None"
        rules = (
            (self.reliability, ("edit/reliability",), f"reliability {metrics} reliability=None"),
            (self.smallest_probability, (_PROBABILITY,), f"smallest_probability {metrics} smallest_probability=None"),
            (self.idle_steps, ("token_clip",), tokens),
            (self.idle_steps, ("edit/tokens/active_now",), tokens),
            (
                self.kl_budget,
                _KL,
                "kl_budget needs a callback that measures the divergence; add KLLocality, or "
                'EditMetrics(every_n_steps=20, metrics=["kl"])',
            ),
            (
                self.loss,
                ("edit/tokens/loss_now",),
                "loss reads the training loss of TokenSmoothing; add TokenLoss(), or pass loss=None",
            ),
        )
        return [Requirement(names, message) for value, names, message in rules if value is not None]

    def attach(self, run: EditRun) -> None:
        self._enough_idle = self._steps(run, "idle_steps") if self.idle_steps is not None else 0
        self._enough_losses = self._steps(run, "loss_steps") if self.loss is not None else 0
        self._idle, self._losses, self.reason = 0, [], None

    def _steps(self, run: EditRun, name: str) -> int:
        steps = getattr(self, name)
        if steps != "epoch":
            return steps
        if run.host.epoch_steps is None:
            raise EditError(
                f"StopWhenEdited({name}='epoch'): this {run.host.name} does not say how many optimizer steps an epoch "
                f"has; give {name} as a number, or in a loop editing(epoch_steps=...)"
            )
        return run.host.epoch_steps

    def state(self) -> dict[str, Any]:
        return {"idle": getattr(self, "_idle", 0), "losses": list(getattr(self, "_losses", []))}

    def load_state(self, state: dict[str, Any]) -> None:
        self._idle, self._losses = state["idle"], list(state.get("losses", []))

    def after_step(self, run: EditRun) -> None:
        met = self._met(run)
        if met and self.reason is None:
            self.reason = " and ".join(met)
            if run.host.is_main:
                print(f"stopped at step {run.step}: {self.reason}")
        if met:
            run.stop()

    def _met(self, run: EditRun) -> list[str]:
        scores, met = run.scores, []
        for label, key, bar in (
            ("reliability", "edit/reliability", self.reliability),
            ("smallest target probability", _PROBABILITY, self.smallest_probability),
        ):
            if bar is not None and scores.get(key, 0.0) >= bar:
                met.append(f"{label} {scores[key]:.3g} is at least {bar:g}")
        kl = max(scores.get(key, 0.0) for key in _KL)
        if self.kl_budget is not None and kl > self.kl_budget:
            met.append(f"KL to the unedited model {kl:.3g} is above the budget of {self.kl_budget:g}")
        if self.idle_steps is not None:
            self._idle = self._idle + 1 if scores.get("edit/tokens/active_now") == 0 else 0
            if self._idle >= self._enough_idle:
                met.append(f"no active token in {self._idle} steps")
        if self.loss is not None:
            self._losses = [*self._losses, scores["edit/tokens/loss_now"]][-self._enough_losses :]
            mean = sum(self._losses) / len(self._losses)
            if len(self._losses) == self._enough_losses and mean < self.loss:
                met.append(f"loss {mean:.3g} is below {self.loss:g}")
        return met

    def __repr__(self) -> str:
        rules = ("reliability", "idle_steps", "smallest_probability", "kl_budget", "loss")
        return f"StopWhenEdited({', '.join(f'{rule}={getattr(self, rule)}' for rule in rules)})"
