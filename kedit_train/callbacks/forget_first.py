"""ForgetFirst: the old answers are subtracted from the weights before training begins (F-Learning)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from kedit_train.arguments import Rule, at_least, check_arguments, one_of, within
from kedit_train.callbacks.base import EditCallback
from kedit_train.core.locality.texts import Texts, TextSource
from kedit_train.core.output_head import evaluation_mode
from kedit_train.core.processes import is_distributed
from kedit_train.core.reference_weights import write
from kedit_train.core.run import EditRun
from kedit_train.core.tokens.old_answer_training import ForgetTraining, trained_difference
from kedit_train.core.tokens.subtraction import Measurement, Scale, Subtraction
from kedit_train.data import Edit, EditDataset
from kedit_train.data.prompts import PromptFormat, check_format
from kedit_train.errors import EditError, warn
from kedit_train.evaluation.scoring.old_answers import find_old_answers, measure_old_answers

# Of the paper.
COEFFICIENTS = (0.1, 0.3, 0.5, 0.7)


def _all_above_zero(values: Any) -> bool:
    return len(values) > 0 and all(0 < float(value) < math.inf for value in values)


class ForgetFirst(EditCallback):
    """Before the first step, subtract what training on the old answers would change.

    F-Learning computes ``theta' = theta - coefficient * (FT(theta, old) - theta)`` on the scope, and the run learns the
    new answers from there. The coefficients are tried in ascending order. The search ends when the mean probability of
    the old answers is at most ``max_probability``, and it keeps no coefficient with which the perplexity on ``texts``
    is more than ``max_perplexity_ratio`` times as large. A warning says so if the old answers are not forgotten.

    An edit takes part if the model gives its old answer by itself: its ``old_target``, or, if the data has none,
    whatever the model generates unless that is the new answer.

    The reference of everything else stays the model before forgetting: the drift metrics, ``SaveDelta``, the first
    evaluation of ``EditMetrics``, ``KLLocality`` and ``NormBall``. Constraints hold for the subtraction as well, so a
    small ball leaves little of it. With a learning rate of 0 the run only forgets. A resumed run does not forget again.

    Args:
        texts: texts that must stay, for the perplexity: a source or a :class:`Texts`. Other facts in the wording of the
            edits show harm long before prose does.
        edits: a path or edits; None uses those of ``EditMetrics`` or of the data module.
        coefficients: how much to subtract, each above 0; None uses the 0.1, 0.3, 0.5 and 0.7 of the paper.
        scale: what a coefficient is a share of. "base" is the length of the scoped weights, so that the amount does not
            depend on the training on the old answers. "trained" is the trained difference, as in the paper.
        max_probability: enough is forgotten when the mean probability of the old answers is at most this, in (0, 1).
        max_perplexity_ratio: the perplexity on the texts may grow to at most this multiple, >= 1.
        training: how to train on the old answers: a :class:`ForgetTraining`, or a mapping with its arguments.
        prompt_format: "plain", "chat" or "question"; use that of the run.

    Attributes:
        measured: one measurement for each coefficient that was tried, the model before forgetting first.
        chosen: index of the measurement that was kept, 0 if none was.
        length: norm of the trained difference over the norm of the weights that it changes.

    Raises:
        EditError: an argument is out of range, there is no ``ParameterScope``, the model has adapters, or the scope is
            sharded.

    References:
        "Forgetting before Learning: Utilizing Parametric Arithmetic for Knowledge Updating in Large Language Models",
        arXiv 2311.08011.

    Example:
        >>> from kedit_train import EditDataset, editing, world
        >>> from kedit_train.callbacks import ForgetFirst, ForgetTraining, ParameterScope
        >>> model, tokenizer = world.load()
        >>> edits = EditDataset.load("world", limit=2)
        >>> forget = ForgetFirst(["The river runs past the old mill."], edits=edits, coefficients=[0.5],
        ...                      max_probability=0.9, max_perplexity_ratio=9.0, training=ForgetTraining(epochs=3))
        >>> with editing(model, [ParameterScope(layers=0.7), forget], tokenizer=tokenizer) as edit:
        ...     edit.before_step()  # doctest: +ELLIPSIS
        ForgetFirst: subtracted coefficient 0.5 ...
        >>> forget.measured[forget.chosen].probability < forget.measured[0].probability
        True
    """

    # Last, so that the other callbacks have read the reference model before the weights change.
    order = 99
    duplicate_hint = "pass all edits to one of them"

    def __init__(
        self,
        texts: TextSource | Texts,
        *,
        edits: Any = None,
        coefficients: list[float] | None = None,
        scale: Scale = "base",
        max_probability: float = 0.5,
        max_perplexity_ratio: float = 1.1,
        training: ForgetTraining | dict[str, Any] | None = None,
        prompt_format: PromptFormat = "plain",
    ) -> None:
        check_format(prompt_format)
        coefficients = list(COEFFICIENTS) if coefficients is None else coefficients
        check_arguments(
            self,
            coefficients=(coefficients, Rule("a list of numbers > 0", _all_above_zero)),
            scale=(scale, one_of(get_args(Scale))),
            max_probability=(max_probability, within("(0, 1)")),
            max_perplexity_ratio=(max_perplexity_ratio, at_least(1)),
        )
        self.subtraction = Subtraction(coefficients, scale, max_probability, max_perplexity_ratio)
        self.training = ForgetTraining(**training) if isinstance(training, Mapping) else training or ForgetTraining()
        self.texts = Texts.of(texts)
        self.edits = list(edits) if isinstance(edits, Iterator) else edits
        self.prompt_format: PromptFormat = prompt_format
        self.measured: list[Measurement] = []
        self.chosen, self.length = 0, 0.0

    def prepare(self, run: EditRun) -> None:
        run.causal_model()
        if hasattr(run.model, "peft_config"):
            raise EditError(
                "the subtraction needs plain weights, and the model has adapters; forget without adapters first "
                "(recipes/unlearn.yaml) and train adapters on the result."
            )
        if self.edits is not None:
            EditDataset.of(self.edits)
        self.texts.check()

    def attach(self, run: EditRun) -> None:
        self.measured, self.chosen = [], 0
        if run.host.resumed:
            # The weights of the checkpoint have forgotten already; load_state restores the measurements.
            return
        if not run.reference:
            raise EditError("there is no scope to subtract from; add ParameterScope.")
        if any(isinstance(p, DTensor) for p in run.scope.values()):
            raise EditError(
                "a sharded scope cannot be trained on the old answers; forget in one process first "
                "(recipes/unlearn.yaml)."
            )
        with torch.no_grad(), evaluation_mode(run.model), run.host.forward_context():
            summary = self._forget(run)
        if is_distributed():
            # Sums on a GPU depend on their order, so the processes could end with different weights.
            for parameter in run.scope.values():
                dist.broadcast(parameter.data, src=0)
        if run.host.is_main:
            print(f"ForgetFirst: {summary}")

    def state(self) -> dict[str, Any]:
        return {"chosen": self.chosen, "measured": [asdict(one) for one in self.measured]}

    def load_state(self, state: dict[str, Any]) -> None:
        self.chosen, self.measured = state["chosen"], [Measurement(**one) for one in state["measured"]]

    def metrics(self, run: EditRun) -> dict[str, float]:
        """Return what was subtracted, and the old answers and the perplexity before and after."""
        if not self.measured:
            return {}
        before, after = self.measured[0], self.measured[self.chosen]
        return {
            "edit/forgetting/coefficient": after.coefficient,
            "edit/forgetting/old_probability_before": before.probability,
            "edit/forgetting/old_probability": after.probability,
            "edit/forgetting/old_accuracy": after.accuracy,
            "edit/forgetting/perplexity_before": before.perplexity,
            "edit/forgetting/perplexity": after.perplexity,
        }

    def _forget(self, run: EditRun) -> str:
        """Subtract from the live weights, and return one line that says what was done."""
        edits = self._edits(run)
        tokenizer = run.tokenizer()
        texts = self.texts.load(edits)
        options: dict[str, Any] = {"batch_size": self.training.batch_size, "prompt_format": self.prompt_format}
        old, _ = find_old_answers(run.model, tokenizer, edits, max_new_tokens=self.training.max_new_tokens, **options)
        if not old:
            warn(f"the model gives none of {len(edits)} old answers, so there is nothing to forget.")
            return f"nothing to forget, the model gives none of {len(edits)} old answers"

        def measure(coefficient: float, factor: float) -> Measurement:
            return Measurement(coefficient, factor, *measure_old_answers(run.model, tokenizer, old, texts, **options))

        before, base = measure(0.0, 0.0), run.reference
        try:
            difference = trained_difference(
                run, tokenizer, old, base, training=self.training, prompt_format=self.prompt_format
            )
            changed = {name: base[name] for name, value in difference.items() if bool(value.any())}
            if not changed:
                raise EditError("training on the old answers changed no weight; raise learning_rate.")
            self.length = _norm(difference) / max(_norm(changed), 1e-30)

            def subtract(coefficient: float, factor: float) -> Measurement:
                _subtract(run, base, difference, factor)
                return measure(coefficient, factor)

            self.measured, self.chosen, ended_by = self.subtraction.search(before, self.length, subtract)
        except BaseException:
            write(run.scope, base)
            raise
        best = self.measured[self.chosen]
        write(run.scope, base)
        if self.chosen:
            _subtract(run, base, difference, best.factor)
        if ended_by != "forgotten":
            constraints = ", ".join(type(callback).__name__ for callback in run.callbacks if callback.constrains)
            removed = f" {constraints} removed a part of the subtraction." if constraints else ""
            warn(self.subtraction.shortfall(self.measured, self.chosen, ended_by, self.length) + removed)
        return (
            f"subtracted coefficient {best.coefficient:g} ({best.factor:.3g} times the trained difference) for "
            f"{len(old)} of {len(edits)} edits whose old answer the model gave: probability {before.probability:.3f} "
            f"-> {best.probability:.3f}, teacher-forced accuracy {before.accuracy:.2f} -> {best.accuracy:.2f}, "
            f"perplexity {before.perplexity:.3f} -> {best.perplexity:.3f}, ended by {ended_by}"
        )

    def _edits(self, run: EditRun) -> Sequence[Edit]:
        edits = self.edits if self.edits is not None else run.edits or run.host.edits()
        if edits is None:
            raise EditError(f"this {run.host.name} run has no edits of its own; pass edits=, a path or an EditDataset.")
        return EditDataset.of(edits)

    def __repr__(self) -> str:
        rule, training = self.subtraction, self.training
        return (
            f"ForgetFirst(coefficients={list(rule.coefficients)}, scale={rule.scale!r}, "
            f"max_probability={rule.max_probability}, max_perplexity_ratio={rule.max_perplexity_ratio}, "
            f"training={training})"
        )


def _subtract(run: EditRun, base: Mapping[str, Tensor], difference: Mapping[str, Tensor], factor: float) -> None:
    """Write ``base - factor * difference`` into the live weights, with every constraint applied."""
    write(run.scope, {name: value - factor * difference[name] for name, value in base.items()})
    # No optimizer step has been taken, so what scales with the learning rate (the pull of an anchor) is left out.
    run.steps.learning_rates = {}
    run.steps.apply_constraints()


def _norm(values: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in values.values()))
