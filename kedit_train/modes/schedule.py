"""Which edits are trained together, and after which others: what tells batch, sequential and streaming apart."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from kedit_train.errors import EditError

Mode = Literal["single", "batch", "sequential", "streaming"]
MODES: tuple[Mode, ...] = get_args(Mode)
STREAM = 100


@dataclass(frozen=True)
class Round:
    """One call of the training.

    Args:
        trained: numbers of the edits that it gets, in their order.
        new: those among them that came with this round.
        seen: how many have come so far, these included.
    """

    trained: tuple[int, ...]
    new: tuple[int, ...]
    seen: int


def rounds(mode: Mode, n: int, round_size: int | None = None, replay: int | None = None, seed: int = 0) -> list[Round]:
    """The rounds of ``n`` edits.

    Args:
        mode: ``single``: each edit alone (and, in :func:`~kedit_train.modes.run_edits`, on the unedited model);
            ``batch``: all in one round; ``sequential``: ``round_size`` new ones at a time (1), never an old one again;
            ``streaming``: ``round_size`` new ones at a time (100), with earlier ones among them.
        replay: of ``streaming``, how many earlier edits come again in a round, drawn by ``seed``; None takes all.

    Raises:
        EditError: an unknown mode, or an argument that the mode has no use for.
    """
    if mode not in MODES:
        raise EditError(f"mode={mode!r} is not known: use one of {', '.join(MODES)}")
    if round_size is not None and (mode in ("single", "batch") or round_size < 1):
        raise EditError(f"round_size={round_size}: {mode} takes " + _takes(mode))
    if replay is not None and (mode != "streaming" or replay < 0):
        raise EditError(f"replay={replay}: streaming alone replays, 0 or more earlier edits a round, or None for all")
    size = n if mode == "batch" else round_size or (STREAM if mode == "streaming" else 1)
    return list(_rounds(n, size, mode == "streaming", replay, seed))


def _takes(mode: Mode) -> str:
    return {"single": "one edit at a time", "batch": "all edits at once"}.get(mode, "at least 1 edit a round")


def _rounds(n: int, size: int, replays: bool, replay: int | None, seed: int) -> Iterator[Round]:
    for start in range(0, n, size):
        new = tuple(range(start, min(start + size, n)))
        old: list[int] = []
        if replays:
            drawn = start if replay is None else min(replay, start)
            old = sorted(random.Random(f"{seed} {start}").sample(range(start), drawn))
        yield Round((*old, *new), new, start + len(new))
