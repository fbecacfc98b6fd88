"""What forgetting by subtraction needs to know: which old answers a model gives, and how far to go.

Shared by :func:`kedit_train.modes.forget` and :class:`kedit_train.callbacks.ForgetFirst`, which differ in how they
train on the old answers and in what they subtract from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from kedit_train.data import Edit
from kedit_train.data.prompts import PromptFormat
from kedit_train.errors import EditError
from kedit_train.evaluation.asking.generate import generate_answers
from kedit_train.evaluation.asking.teacher_forced import teacher_forced
from kedit_train.evaluation.scoring.normalize import exact_match
from kedit_train.evaluation.scoring.perplexity import perplexity, text_losses

PUBLISHED = (0.1, 0.3, 0.5, 0.7)
Scale = Literal["base", "trained"]
Reason = Literal["forgotten", "perplexity", "coefficients", "unknown"]


@dataclass(frozen=True)
class Measured:
    """The model with one coefficient subtracted; 0 is the model as it was.

    Args:
        coefficient: as it was asked for.
        factor: what the trained difference was multiplied by before it was subtracted.
        probability: mean over the old answers of their whole probability.
        given: share of the old answers that are still the first choice, token by token.
        perplexity: on the texts.
    """

    coefficient: float
    factor: float
    probability: float
    given: float
    perplexity: float


@dataclass(frozen=True)
class Guards:
    """How far a subtraction may go.

    Args:
        coefficients: above 0; tried in ascending order.
        scale: what a coefficient is a share of: the length of the weights that change (``base``), or the trained
            difference (``trained``).
        bound: end where the old answers' mean probability is at most this.
        growth: stay within this many times the perplexity of the texts.

    Raises:
        EditError: an argument out of range.
    """

    coefficients: Sequence[float]
    scale: Scale
    bound: float
    growth: float

    def __post_init__(self) -> None:
        steps = sorted({float(c) for c in self.coefficients})
        if not steps or not (steps[0] > 0 and math.isfinite(steps[-1])):
            raise EditError(f"coefficients={tuple(self.coefficients)}: give numbers above 0")
        if self.scale not in get_args(Scale) or not 0 < self.bound < 1 or not self.growth >= 1:
            raise EditError(
                f"scale={self.scale!r}, bound={self.bound}, growth={self.growth}: expected "
                f"{' or '.join(get_args(Scale))}, a probability, and a number from 1"
            )

    def search(
        self, before: Measured, length: float, measured: Callable[[float, float], Measured]
    ) -> tuple[list[Measured], int, Reason]:
        """Go through the coefficients until a guard ends it.

        Args:
            before: the model as it was.
            length: of the trained difference, over that of the weights it changes.
            measured: ``measured(coefficient, factor)``, of the model with ``factor`` times the difference subtracted.

        Returns:
            All that was measured, ``before`` first; which of these to take (0: none); what ended it.
        """
        found, taken = [before], 0
        for coefficient in sorted({float(c) for c in self.coefficients}):
            found.append(measured(coefficient, coefficient / length if self.scale == "base" else coefficient))
            if not found[-1].perplexity <= self.growth * before.perplexity:
                return found, taken, "perplexity"
            taken = len(found) - 1
            if found[-1].probability <= self.bound:
                return found, taken, "forgotten"
        return found, taken, "coefficients"

    def shortfall(self, found: Sequence[Measured], taken: int, ended: Reason, length: float) -> str:
        """Why the old answers are not forgotten, and what to change, for a warning."""
        last = found[-1]
        why = (
            f"coefficient {last.coefficient:g} takes the perplexity from {found[0].perplexity:.3f} to "
            f"{last.perplexity:.3f}, more than {self.growth:g} times as much: take finer coefficients, or texts that "
            "matter less"
            if ended == "perplexity"
            else f"there are no more coefficients (the trained difference has {length:.2%} of the weights' length): "
            "give larger ones, or scale='base'"
        )
        return (
            f"with coefficient {found[taken].coefficient:g} the old answers still have a mean "
            f"probability of {found[taken].probability:.3f} (bound {self.bound:g}); {why}"
        )


def old_answers(
    model: nn.Module,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    batch_size: int,
    prompt_format: PromptFormat,
    max_new_tokens: int = 32,
) -> tuple[list[Edit], dict[str, str]]:
    """Edits with what the model answers as their targets, and why others are not among them.

    An edit is one whose old answer the model gives by itself (greedy, ended): its ``old_target``, or, where the data
    has none, whatever the model answers, unless that is the new answer already.

    Raises:
        EditError: there are no edits.
    """
    if not len(edits):
        raise EditError("no edits: the data is empty")
    prompts = [edit.prompt for edit in edits]
    asked: dict[str, Any] = {"batch_size": batch_size, "prompt_format": prompt_format, "max_new_tokens": max_new_tokens}
    said = generate_answers(model, tokenizer, prompts, **asked)
    old, left_out = [], {}
    for number, (edit, answer) in enumerate(zip(edits, said, strict=True)):
        reason = None
        if not answer.text or not answer.ended:
            reason = "the model gives no answer that ends"
        elif exact_match(answer.text, edit.answers):
            reason = f"the model gives the new answer already ({answer.text!r})"
        elif edit.old_target is not None and not exact_match(answer.text, (edit.old_target,)):
            reason = f"the model answers {answer.text!r} and not {edit.old_target!r}"
        if reason is None:
            old.append(Edit(edit.prompt, answer.text, subject=edit.subject, id=edit.id))
        else:
            left_out[edit.id or str(number)] = reason
    return old, left_out


def measure(
    model: nn.Module,
    tokenizer: Any,
    old: Sequence[Edit],
    texts: Sequence[str],
    coefficient: float,
    factor: float,
    *,
    batch_size: int,
    prompt_format: PromptFormat,
) -> Measured:
    """The model as it is now, recorded under a coefficient.

    Raises:
        EditError: the texts hold no token to predict.
    """
    pairs = [(edit.prompt, edit.target) for edit in old]
    scored = teacher_forced(model, tokenizer, pairs, batch_size=batch_size, prompt_format=prompt_format)
    value = perplexity(text_losses(model, tokenizer, texts, batch_size=batch_size)).value
    if value is None:
        raise EditError("the texts hold no token to predict: give longer ones")
    probability = sum(math.exp(sum(one.log_probs)) for one in scored) / len(scored)
    return Measured(coefficient, factor, probability, sum(one.exact for one in scored) / len(scored), value)
