"""The schedule of a mode: the edits that are trained together, and their order."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from kedit_train.errors import EditError

Mode = Literal["single", "batch", "sequential", "streaming"]
MODES: tuple[Mode, ...] = get_args(Mode)
STREAMING_EDITS_PER_STEP = 100


@dataclass(frozen=True, kw_only=True)
class ScheduleStep:
    """One call of the training function.

    Args:
        trained: the indices of the edits that are trained in this step, in order.
        new: the indices of the edits that are trained for the first time in this step.
        seen: number of distinct edits that have been trained up to and including this step.
    """

    trained: tuple[int, ...]
    new: tuple[int, ...]
    seen: int


def make_schedule(
    mode: Mode, n: int, *, edits_per_step: int | None = None, replay: int | None = None, seed: int = 0
) -> list[ScheduleStep]:
    """Split ``n`` edits into schedule steps.

    Args:
        mode: "single" (one edit per step), "batch" (all edits in one step), "sequential" (only new edits in each step)
            or "streaming" (new edits and replayed previous edits in each step).
        n: number of edits.
        edits_per_step: number of new edits per step, for "sequential" (default 1) and "streaming" (default 100).
        replay: number of previous edits that "streaming" replays in each step. None: all previous edits.
        seed: seed for drawing the replayed edits.

    Raises:
        EditError: the mode is unknown, or an argument does not apply to the mode.

    Example:
        >>> from kedit_train.modes import make_schedule
        >>> for step in make_schedule("streaming", 4, edits_per_step=2):
        ...     print(step.trained, "new:", step.new)
        (0, 1) new: (0, 1)
        (0, 1, 2, 3) new: (2, 3)
    """
    if mode not in MODES:
        raise EditError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
    if edits_per_step is not None and mode in ("single", "batch"):
        raise EditError(
            f"edits_per_step must be None for mode {mode!r}, got {edits_per_step}; "
            "only 'sequential' and 'streaming' use edits_per_step."
        )
    if edits_per_step is not None and edits_per_step < 1:
        raise EditError(f"edits_per_step must be >= 1, got {edits_per_step}.")
    if replay is not None and mode != "streaming":
        raise EditError(f"replay must be None for mode {mode!r}, got {replay}; only 'streaming' replays edits.")
    if replay is not None and replay < 0:
        raise EditError(f"replay must be >= 0, or None to replay all previous edits, got {replay}.")
    size = n if mode == "batch" else edits_per_step or (STREAMING_EDITS_PER_STEP if mode == "streaming" else 1)
    return list(_steps(n, size, mode == "streaming", replay, seed))


def _steps(n: int, size: int, with_replay: bool, replay: int | None, seed: int) -> Iterator[ScheduleStep]:
    for start in range(0, n, size):
        new = tuple(range(start, min(start + size, n)))
        previous: list[int] = []
        if with_replay:
            count = start if replay is None else min(replay, start)
            previous = sorted(random.Random(f"{seed} {start}").sample(range(start), count))
        yield ScheduleStep(trained=(*previous, *new), new=new, seen=start + len(new))
