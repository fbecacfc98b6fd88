"""StopWhenEdited: end training when the edits are learned, because every further step reduces locality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from kedit_train.arguments import Rule, above, check_arguments, integer_from, optional, within
from kedit_train.callbacks.base import EditCallback
from kedit_train.core.requirements import Requirement
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError

_PROBABILITY = "edit/reliability_smallest_token_probability"
# KLLocality measures the first metric on its texts. EditMetrics measures the second metric on the locality prompts.
_KL = ("edit/locality/kl", "edit/locality_kl")
_STEPS = Rule('an integer >= 1 or "epoch"', lambda value: value == "epoch" or integer_from(1).holds(value))


class StopWhenEdited(EditCallback):
    """End training when the edits are learned, or when they have changed the model too much.

    Every argument except ``loss_steps`` sets one rule. The value None turns the rule off. Training ends as soon as one
    rule is met. A printed line and the attribute ``reason`` name this rule. By default, training ends when the mean
    training loss over an epoch is below 0.01, as in FT-M and LocFT-BF. The default rule needs a callback that computes
    the loss, such as ``TokenLoss("cross_entropy")``.

    Args:
        loss: stop when the mean training loss per token over the last ``loss_steps`` optimizer steps is below this
            value, in nats. None turns this rule off.
        loss_steps: number of optimizer steps over which ``loss`` is averaged, or "epoch" for the number of steps in one
            epoch. In a hand-written loop, pass the number of steps in one epoch as ``editing(epoch_steps=...)``.
        reliability: stop when ``EditMetrics(every_n_steps=...)`` measures at least this reliability, in (0, 1].
        idle_steps: stop after this number of consecutive optimizer steps in which every token was already learned. A
            token is learned if its loss is at most the ``epsilon`` of ``TokenLoss``. "epoch" stands for the number of
            steps in one epoch.
        smallest_probability: stop when every target token has at least this probability, in (0, 1), under teacher
            forcing. ``EditMetrics(every_n_steps=...)`` measures the probabilities. As long as a single target token has
            a smaller probability, this rule does not end training.
        kl_budget: stop when the KL divergence from the reference model, in nats per token, is above this value.
            ``KLLocality`` measures the divergence on texts and averages it since the last log event. ``EditMetrics``
            with the metric "kl" measures the divergence on the locality prompts. If both callbacks are used, the rule
            uses the larger of the two divergences.

    Attributes:
        reason: the rules that were met, as text. None while training continues.

    Raises:
        EditError: every rule is None, an argument is out of range, or no callback measures the value that a rule needs.

    References:
        "Fine-tuning Done Right in Model Editing", arXiv 2509.22072 (the loss rule).

    Example:
        >>> import torch
        >>> from kedit_train import EditDataset, editing, world
        >>> from kedit_train.callbacks import ParameterScope, StopWhenEdited, TokenLoss
        >>> from kedit_train.data.tokenization import collate
        >>> model, tokenizer = world.load()
        >>> batch = collate(EditDataset.load("world", limit=2).encode(tokenizer), pad_id=tokenizer.pad_token_id)
        >>> callbacks = [ParameterScope(layers=0.5), TokenLoss("cross_entropy"), StopWhenEdited(loss=0.5, loss_steps=1)]
        >>> with editing(model, callbacks, tokenizer=tokenizer) as edit:
        ...     optimizer = torch.optim.AdamW(edit.parameters(), lr=3e-3)
        ...     while not edit.should_stop:
        ...         optimizer.zero_grad()
        ...         edit.before_step()
        ...         model(**batch).loss.backward()
        ...         optimizer.step()
        stopped at step ...: loss ... is below 0.5
    """

    # StopWhenEdited comes after EditMetrics, whose scores it reads.
    order = 90
    follows_steps = True

    def __init__(
        self,
        loss: float | None = 0.01,
        *,
        loss_steps: int | Literal["epoch"] = "epoch",
        reliability: float | None = None,
        idle_steps: int | Literal["epoch"] | None = None,
        smallest_probability: float | None = None,
        kl_budget: float | None = None,
    ) -> None:
        if all(rule is None for rule in (reliability, idle_steps, smallest_probability, kl_budget, loss)):
            raise EditError(
                "at least one rule must be set, but all are None; set, for example, loss=0.01.",
                component=type(self).__name__,
            )
        check_arguments(
            self,
            loss=(loss, optional(above(0))),
            loss_steps=(loss_steps, _STEPS),
            reliability=(reliability, optional(within("(0, 1]"))),
            idle_steps=(idle_steps, optional(_STEPS)),
            smallest_probability=(smallest_probability, optional(within("(0, 1)"))),
            kl_budget=(kl_budget, optional(above(0))),
        )
        self.loss = loss
        self.loss_steps = loss_steps
        self.reliability = reliability
        self.idle_steps = idle_steps
        self.smallest_probability = smallest_probability
        self.kl_budget = kl_budget
        self.reason: str | None = None

    def requires(self) -> Sequence[Requirement]:
        metrics = "needs the measurements of EditMetrics during training; add EditMetrics(every_n_steps=20), or pass"
        tokens = "idle_steps needs a token loss with epsilon > 0; add TokenLoss(epsilon=0.05), or pass idle_steps=None."
        rules = (
            (self.reliability, ("edit/reliability",), f"reliability {metrics} reliability=None."),
            (self.smallest_probability, (_PROBABILITY,), f"smallest_probability {metrics} smallest_probability=None."),
            (self.idle_steps, ("token_clip",), tokens),
            (self.idle_steps, ("edit/tokens/active_now",), tokens),
            (
                self.kl_budget,
                _KL,
                "kl_budget needs a callback that measures the divergence; add KLLocality, or "
                'EditMetrics(every_n_steps=20, evaluation=EvaluationOptions(metrics=["kl"])).',
            ),
            (
                self.loss,
                ("edit/tokens/loss_now",),
                'loss needs a callback that computes the loss; add TokenLoss("cross_entropy"), or pass loss=None and '
                "set another rule.",
            ),
        )
        return [Requirement(names, message) for value, names, message in rules if value is not None]

    def attach(self, run: EditRun) -> None:
        self._idle_limit = self._number_of_steps(run, "idle_steps") if self.idle_steps is not None else 0
        self._loss_window = self._number_of_steps(run, "loss_steps") if self.loss is not None else 0
        self._idle, self._losses, self.reason = 0, [], None

    def _number_of_steps(self, run: EditRun, name: str) -> int:
        steps = getattr(self, name)
        if steps != "epoch":
            return steps
        if run.host.epoch_steps is None:
            raise EditError(
                f'{name}="epoch" needs the number of optimizer steps in an epoch, which is unknown in this '
                f"{run.host.name} run; pass {name} as a number, or use editing(epoch_steps=...) in a hand-written loop."
            )
        return run.host.epoch_steps

    def state(self) -> dict[str, Any]:
        return {"idle": getattr(self, "_idle", 0), "losses": list(getattr(self, "_losses", []))}

    def load_state(self, state: dict[str, Any]) -> None:
        self._idle, self._losses = state["idle"], list(state.get("losses", []))

    def after_step(self, run: EditRun) -> None:
        met = self._rules_met(run)
        if met and self.reason is None:
            self.reason = " and ".join(met)
            if run.host.is_main:
                print(f"stopped at step {run.step}: {self.reason}")
        if met:
            run.stop()

    def _rules_met(self, run: EditRun) -> list[str]:
        scores, met = run.scores, []
        for label, key, threshold in (
            ("reliability", "edit/reliability", self.reliability),
            ("smallest target probability", _PROBABILITY, self.smallest_probability),
        ):
            if threshold is not None and scores.get(key, 0.0) >= threshold:
                met.append(f"{label} {scores[key]:.3g} is at least {threshold:g}")
        kl = max(scores.get(key, 0.0) for key in _KL)
        if self.kl_budget is not None and kl > self.kl_budget:
            met.append(f"KL to the reference model {kl:.3g} is above the budget of {self.kl_budget:g}")
        if self.idle_steps is not None:
            self._idle = self._idle + 1 if scores.get("edit/tokens/active_now") == 0 else 0
            if self._idle >= self._idle_limit:
                met.append(f"no token had a loss above epsilon in {self._idle} steps")
        if self.loss is not None:
            self._losses = [*self._losses, scores["edit/tokens/loss_now"]][-self._loss_window :]
            mean = sum(self._losses) / len(self._losses)
            if len(self._losses) == self._loss_window and mean < self.loss:
                met.append(f"loss {mean:.3g} is below {self.loss:g}")
        return met

    def __repr__(self) -> str:
        rules = ("reliability", "idle_steps", "smallest_probability", "kl_budget", "loss")
        return f"StopWhenEdited({', '.join(f'{rule}={getattr(self, rule)}' for rule in rules)})"
