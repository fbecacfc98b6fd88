"""ForgetFirst: make the model forget the old answers before training begins (F-Learning)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from kedit_train.arguments import Rule, at_least, check_arguments, one_of, within
from kedit_train.callbacks.base import EditCallback
from kedit_train.core.locality.consecutive_runs import readable_again
from kedit_train.core.locality.texts import Texts, TextSource
from kedit_train.core.output_head import evaluation_mode
from kedit_train.core.processes import is_distributed
from kedit_train.core.reference_weights import write
from kedit_train.core.run import EditRun
from kedit_train.core.tokens.old_answer_training import ForgetTraining, trained_difference
from kedit_train.core.tokens.subtraction import Measurement, Scale, Subtraction
from kedit_train.data import Edit, EditDataset
from kedit_train.data.chat_format import PromptFormat, check_format, read_format
from kedit_train.errors import EditError, warn
from kedit_train.evaluation.scoring.old_answers import find_old_answers, measure_old_answers

# The coefficients of the paper.
COEFFICIENTS = (0.1, 0.3, 0.5, 0.7)


def _all_above_zero(values: Any) -> bool:
    return len(values) > 0 and all(0 < float(value) < math.inf for value in values)


class ForgetFirst(EditCallback):
    """Make the model forget the old answers before it learns the new answers (F-Learning).

    Before the first step, the weights in the scope (the parameters that may change) are trained on the old answers. The
    weight change of this training is then subtracted: ``theta' = theta - coefficient * (FT(theta, old) - theta)``.
    Here, ``theta`` are the weights before the edit, and ``FT(theta, old)`` are the weights after training on the old
    answers. The run then learns the new answers, starting from ``theta'``.

    The coefficients are tried in ascending order until the mean probability of the old answers is at most
    ``max_probability``. If a coefficient raises the perplexity on ``texts`` to more than ``max_perplexity_ratio`` times
    the perplexity before the subtraction, the search ends. The previous coefficient is then used. If there is no
    previous coefficient, nothing is subtracted. If the old answers are not forgotten, a warning is issued.

    The old answer of an edit is the ``old_target`` of the edit. If the model does not generate this answer before the
    edit, nothing is subtracted for this edit. If an edit has no ``old_target``, the old answer is the answer that the
    model generates. If this answer is already the new answer, nothing is subtracted for this edit.

    The model before forgetting remains the reference for the drift metrics, ``SaveDelta``, the first evaluation of
    ``EditMetrics``, ``KLLocality`` and ``NormBall``. The constraints of other callbacks also apply to the subtraction,
    so a ``NormBall`` with a small radius undoes most of the subtraction. With a learning rate of 0, the run only
    forgets. A resumed run does not forget again.

    Args:
        texts: texts on which the model should not change: a source of texts or a :class:`Texts`. The perplexity is
            measured on these texts. Use texts that state other facts in the wording of the edits. On such texts, the
            perplexity rises at much smaller coefficients than on prose.
        edits: a path or a sequence of edits. None uses the edits of ``EditMetrics`` or of the training loop.
        coefficients: how much to subtract, as numbers > 0. None uses 0.1, 0.3, 0.5 and 0.7, as in the paper.
        scale: how the coefficient sets the size of the subtracted change. With "trained", the weight change
            ``FT(theta, old) - theta`` is multiplied by the coefficient, as in the paper. With "base" (default), this
            weight change is rescaled. Its norm is then the coefficient times the norm of the original weights, and does
            not depend on the length of the training. Parameters that the training did not change are left out of the
            norms.
        max_probability: the old answers count as forgotten if their mean probability is at most this value, in (0, 1).
        max_perplexity_ratio: maximum ratio of two perplexities on ``texts``, >= 1. The ratio is the perplexity after
            the subtraction, divided by the perplexity before the subtraction.
        training: how to train on the old answers: a :class:`ForgetTraining` or a mapping of its arguments. None uses
            the defaults.
        prompt_format: how prompts are written: "plain", "chat", "question" or a :class:`~kedit_train.ChatFormat`. Use
            the format of the training data.

    Attributes:
        measured: a list of measurements. The first one describes the model before forgetting. Each coefficient that was
            tried adds one measurement.
        chosen: index in ``measured`` of the coefficient that was subtracted; 0 if nothing was subtracted.
        length: norm of the weight change ``FT(theta, old) - theta``, divided by the norm of the original weights.
            Parameters that the training did not change are left out of the norms.

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

    # ForgetFirst comes last, so that the other callbacks have read the reference model before the weights change.
    order = 99
    duplicate_hint: str | None = "keep one ForgetFirst and pass all edits to it"

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
        prompt_format = read_format(prompt_format)
        check_format(prompt_format)
        coefficients = list(COEFFICIENTS) if coefficients is None else coefficients
        check_arguments(
            self,
            coefficients=(coefficients, Rule("a list of at least one finite number > 0", _all_above_zero)),
            scale=(scale, one_of(get_args(Scale))),
            max_probability=(max_probability, within("(0, 1)")),
            max_perplexity_ratio=(max_perplexity_ratio, at_least(1)),
        )
        self.coefficients: list[float] = coefficients
        self.scale: Scale = scale
        self.max_probability = max_probability
        self.max_perplexity_ratio = max_perplexity_ratio
        self.subtraction: Subtraction = Subtraction(coefficients, scale, max_probability, max_perplexity_ratio)
        self.training: ForgetTraining = (
            ForgetTraining(**training) if isinstance(training, Mapping) else training or ForgetTraining()
        )
        self.texts: Texts = Texts.of(texts)
        self.edits: Any = readable_again(edits)
        self.prompt_format: PromptFormat = prompt_format
        self.measured: list[Measurement] = []
        self.chosen: Any = 0
        self.length: float = 0.0

    def prepare(self, run: EditRun) -> None:
        run.causal_model()
        if hasattr(run.model, "peft_config"):
            raise EditError(
                "the model must not have adapters, because ForgetFirst changes the weights of the base model; run "
                "ForgetFirst without adapters (recipes/unlearn.yaml), then train adapters on the saved model."
            )
        if self.edits is not None:
            EditDataset.of(self.edits)
        self.texts.check()

    def attach(self, run: EditRun) -> None:
        self.measured, self.chosen = [], 0
        if run.host.resumed:
            # The old answers were subtracted before the checkpoint was written. load_state restores the measurements.
            return
        if not run.reference:
            raise EditError("the run needs a scope (the parameters that may change); add ParameterScope.")
        if run.zero is not None or any(isinstance(p, DTensor) for p in run.scope.values()):
            found = "sharded weights (DTensor)" if run.zero is None else "DeepSpeed ZeRO"
            raise EditError(
                f"the weights must not be sharded or trained with DeepSpeed, got {found}; run ForgetFirst in a single "
                "process (recipes/unlearn.yaml), then train the saved model."
            )
        with torch.no_grad(), evaluation_mode(run.model), run.host.forward_context():
            summary = self._forget(run)
        if is_distributed():
            # The result of a sum on a GPU depends on the order of its terms, so the processes could end with different
            # weights.
            for parameter in run.scope.values():
                dist.broadcast(parameter.data, src=0)
        if run.host.is_main:
            print(f"ForgetFirst: {summary}")

    def state(self) -> dict[str, Any]:
        return {"chosen": self.chosen, "measured": [asdict(one) for one in self.measured]}

    def load_state(self, state: dict[str, Any]) -> None:
        self.chosen, self.measured = state["chosen"], [Measurement(**one) for one in state["measured"]]

    def metrics(self, run: EditRun) -> dict[str, float]:
        """Return the metrics of the subtraction.

        The metrics are the coefficient, and the teacher-forced accuracy of the old answers after the subtraction. The
        mean probability of the old answers and the perplexity on the texts are given before and after the subtraction.
        """
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
        """Make the model forget the old answers, and return a one-line summary."""
        edits = self._edits(run)
        tokenizer = run.tokenizer()
        texts = self.texts.load(edits, tokenizer=tokenizer)
        options: dict[str, Any] = {"batch_size": self.training.batch_size, "prompt_format": self.prompt_format}
        old, _ = find_old_answers(run.model, tokenizer, edits, max_new_tokens=self.training.max_new_tokens, **options)
        if not old:
            warn(
                f"the model gives none of the {len(edits)} old answers, so nothing was subtracted; if this is "
                "unexpected, compare old_target with the answers of the model."
            )
            return f"subtracted nothing, because the model gives none of the {len(edits)} old answers"

        def measure(coefficient: float, factor: float) -> Measurement:
            return Measurement(coefficient, factor, *measure_old_answers(run.model, tokenizer, old, texts, **options))

        before, base = measure(0.0, 0.0), run.reference
        try:
            difference = trained_difference(
                run, tokenizer, old, base, training=self.training, prompt_format=self.prompt_format
            )
            changed = {name: base[name] for name, value in difference.items() if bool(value.any())}
            if not changed:
                raise EditError("training on the old answers changed no weight; raise learning_rate in training=.")
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
            f"subtracted coefficient {best.coefficient:g} ({best.factor:.3g} times the weight change from training on "
            f"the old answers of {len(old)} of {len(edits)} edits): probability of the old answers "
            f"{before.probability:.3f} -> {best.probability:.3f}, their teacher-forced accuracy "
            f"{before.accuracy:.2f} -> {best.accuracy:.2f}, "
            f"perplexity on the texts {before.perplexity:.3f} -> {best.perplexity:.3f}, "
            f"reason for ending the search: {ended_by}"
        )

    def _edits(self, run: EditRun) -> Sequence[Edit]:
        edits = self.edits if self.edits is not None else run.edits or run.host.edits()
        if edits is None:
            raise EditError(
                f"edits must be given, because this run ({run.host.name}) has no edits of its own; pass edits= (a "
                "path, a list of Edit or an EditDataset)."
            )
        return EditDataset.of(edits)

    def __repr__(self) -> str:
        rule, training = self.subtraction, self.training
        return (
            f"ForgetFirst(coefficients={list(rule.coefficients)}, scale={rule.scale!r}, "
            f"max_probability={rule.max_probability}, max_perplexity_ratio={rule.max_perplexity_ratio}, "
            f"training={training})"
        )


def _subtract(run: EditRun, base: Mapping[str, Tensor], difference: Mapping[str, Tensor], factor: float) -> None:
    """Write ``base - factor * difference`` into the model, and apply the constraints of all callbacks."""
    write(run.scope, {name: value - factor * difference[name] for name, value in base.items()})
    # No optimizer step has been taken, so constraints that depend on the learning rate (WeightAnchor) are left out.
    run.steps.learning_rates = {}
    run.steps.apply_constraints()


def _norm(values: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in values.values()))
