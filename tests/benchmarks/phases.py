"""Assign the time of a run, or its floating-point operations, to phases, by replacing methods during the run."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

from kedit_train import callbacks

STATISTICS = "statistics of texts"
# The forward passes inside these phases belong to them.
WHOLE = ("end of answers", STATISTICS, "penalty", "evaluation")
# The object that has a method, the name of the method, and the phase to which the method belongs.
Place = tuple[Any, str, str]


class Phases:
    """Assign a running quantity (seconds or operations) to the innermost phase that is running."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now, self.totals = now, defaultdict[str, float](float)
        self._running, self._last = ["rest of training"], now()

    def _assign(self) -> None:
        value = self.now()
        self.totals[self._running[-1]] += value - self._last
        self._last = value

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._assign()
        self._running.append(name)
        try:
            yield
        finally:
            self._assign()
            self._running.pop()

    def around(self, name: str, function: Any) -> Any:
        @wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            if self._running[-1] in WHOLE:
                return function(*args, **kwargs)
            with self.phase(name):
                return function(*args, **kwargs)

        return measured

    def stop(self) -> dict[str, float]:
        self._assign()
        return dict(self.totals)


def statistics_of_texts() -> list[Place]:
    """Return the methods in which callbacks read texts before training."""
    names = ("NullSpace", "KLLocality", "SecondOrderLocality", "LowCurvature", "WeightAnchor")
    return [(getattr(callbacks, name), "attach", STATISTICS) for name in names]


@contextlib.contextmanager
def timed(phases: Phases, places: Sequence[Place]) -> Iterator[None]:
    """Assign the methods to their phases."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, phase in places:
        setattr(owner, name, phases.around(phase, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)
