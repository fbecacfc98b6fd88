"""Choose how much of a trained weight difference to subtract, so that the model forgets old answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Scale = Literal["base", "trained"]
EndedBy = Literal["forgotten", "perplexity", "coefficients"]


@dataclass(frozen=True)
class Measurement:
    """Scores of the model after the subtraction of a trained weight difference.

    Coefficient 0 means the model before the subtraction.

    Args:
        coefficient: the coefficient as the user gave it.
        factor: number by which the trained difference was multiplied.
        probability: mean probability of the old answers. The probability of an answer is the product over its tokens.
        accuracy: fraction of the old answers in which every token is still the most probable token.
        perplexity: perplexity on the texts on which the model should not change.
    """

    coefficient: float
    factor: float
    probability: float
    accuracy: float
    perplexity: float


@dataclass(frozen=True)
class Subtraction:
    """The rule that chooses one of several coefficients for the subtraction.

    Args:
        coefficients: numbers above 0, tried in ascending order.
        scale: "trained" multiplies the trained difference by the coefficient. "base" first rescales the trained
            difference to the norm of the original weights, and then multiplies it by the coefficient. Both norms count
            only the parameters that training changed.
        max_probability: the search ends when the mean probability of the old answers is at most this value.
        max_perplexity_ratio: the highest accepted value of (perplexity after the subtraction) / (perplexity before).
    """

    coefficients: Sequence[float]
    scale: Scale
    max_probability: float
    max_perplexity_ratio: float

    def search(
        self, before: Measurement, length: float, measure: Callable[[float, float], Measurement]
    ) -> tuple[list[Measurement], int, EndedBy]:
        """Try the coefficients in ascending order until the old answers are forgotten or the perplexity is too high.

        If a coefficient makes the perplexity too high, the previous coefficient is chosen.

        Args:
            before: the measurement of the model before the subtraction.
            length: norm of the trained difference divided by the norm of the original weights (counting only the
                parameters that training changed).
            measure: function ``measure(coefficient, factor)`` that subtracts ``factor`` times the trained difference
                and returns a :class:`Measurement`, which contains both arguments and the scores of the model.

        Returns:
            Three values: the list of all measurements, which begins with ``before``; the index of the chosen
            measurement in this list (index 0 means that nothing is subtracted); the reason why the search ended.
        """
        measured, chosen = [before], 0
        for coefficient in sorted({float(c) for c in self.coefficients}):
            measured.append(measure(coefficient, coefficient / length if self.scale == "base" else coefficient))
            # "not <=" instead of ">", so that a perplexity of NaN ends the search.
            if not measured[-1].perplexity <= self.max_perplexity_ratio * before.perplexity:
                return measured, chosen, "perplexity"
            chosen = len(measured) - 1
            if measured[-1].probability <= self.max_probability:
                return measured, chosen, "forgotten"
        return measured, chosen, "coefficients"

    def shortfall(self, measured: Sequence[Measurement], chosen: int, ended_by: EndedBy, length: float) -> str:
        """Return the text of a warning that says why the old answers are not forgotten and what to change."""
        last = measured[-1]
        if ended_by == "perplexity":
            reason = (
                f"coefficient {last.coefficient:g} raises the perplexity from {measured[0].perplexity:.3f} to "
                f"{last.perplexity:.3f}, more than max_perplexity_ratio={self.max_perplexity_ratio:g} allows; pass "
                "coefficients in smaller steps, or measure the perplexity on different texts (texts=)"
            )
        else:
            reason = (
                "there are no larger coefficients to try (training on the old answers changed the weights by "
                f'{length:.2%} of their norm); pass larger coefficients, or scale="base"'
            )
        return (
            f"the mean probability of the old answers must be <= max_probability={self.max_probability:g}, got "
            f"{measured[chosen].probability:.3f} with coefficient {measured[chosen].coefficient:g}: {reason}."
        )
