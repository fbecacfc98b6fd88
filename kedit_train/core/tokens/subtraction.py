"""How much of a trained difference to subtract so that old answers are forgotten, within limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Scale = Literal["base", "trained"]
EndedBy = Literal["forgotten", "perplexity", "coefficients"]


@dataclass(frozen=True)
class Measurement:
    """The model with one coefficient subtracted. Coefficient 0 is the model before the subtraction.

    Args:
        coefficient: the coefficient as the user gave it.
        factor: what the trained difference was multiplied by.
        probability: mean probability of the old answers, each the product over its tokens.
        accuracy: share of the old answers whose every token is still the most probable one.
        perplexity: on the texts that must stay.
    """

    coefficient: float
    factor: float
    probability: float
    accuracy: float
    perplexity: float


@dataclass(frozen=True)
class Subtraction:
    """The rule that chooses among coefficients.

    Args:
        coefficients: numbers above 0, tried in ascending order.
        scale: what a coefficient is a share of: the length of the weights ("base") or the trained difference
            ("trained").
        max_probability: enough is forgotten when the mean probability of the old answers is at most this.
        max_perplexity_ratio: the perplexity may grow to at most this multiple.
    """

    coefficients: Sequence[float]
    scale: Scale
    max_probability: float
    max_perplexity_ratio: float

    def search(
        self, before: Measurement, length: float, measure: Callable[[float, float], Measurement]
    ) -> tuple[list[Measurement], int, EndedBy]:
        """Try the coefficients in ascending order until one of the limits is reached.

        Args:
            before: the model before the subtraction.
            length: norm of the trained difference over the norm of the weights that it changes.
            measure: called with a coefficient and a factor; measures the model with ``factor`` times the trained
                difference subtracted.

        Returns:
            All measurements with ``before`` first, the index of the one to keep (0 for none), and what ended the
            search.
        """
        measured, chosen = [before], 0
        for coefficient in sorted({float(c) for c in self.coefficients}):
            measured.append(measure(coefficient, coefficient / length if self.scale == "base" else coefficient))
            # Written so that a perplexity of NaN ends the search.
            if not measured[-1].perplexity <= self.max_perplexity_ratio * before.perplexity:
                return measured, chosen, "perplexity"
            chosen = len(measured) - 1
            if measured[-1].probability <= self.max_probability:
                return measured, chosen, "forgotten"
        return measured, chosen, "coefficients"

    def shortfall(self, measured: Sequence[Measurement], chosen: int, ended_by: EndedBy, length: float) -> str:
        """Return why the old answers are not forgotten and what to change, for a warning."""
        last = measured[-1]
        if ended_by == "perplexity":
            reason = (
                f"coefficient {last.coefficient:g} raises the perplexity from {measured[0].perplexity:.3f} to "
                f"{last.perplexity:.3f}, which is more than {self.max_perplexity_ratio:g} times; pass smaller steps "
                "between coefficients, or other texts"
            )
        else:
            reason = (
                f"there are no larger coefficients (the trained difference has {length:.2%} of the length of the "
                'weights); pass larger ones, or scale="base"'
            )
        return (
            f"with coefficient {measured[chosen].coefficient:g} the old answers still have a mean probability of "
            f"{measured[chosen].probability:.3f} (max_probability={self.max_probability:g}); {reason}."
        )
