"""Check at the start of a distributed run that all processes train the same edit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed.tensor import DTensor

from kedit_train.core.checksums import checksums
from kedit_train.core.processes import is_distributed, rank, world_size
from kedit_train.core.resume import changes_training, named_callbacks
from kedit_train.core.state import RunState
from kedit_train.errors import EditError

# An argument may differ between processes if the last word of its name is one of these. Only one process prints and
# writes, and each machine has its own folders.
_LOCAL = ("show", "edits", "license", "path", "dir")


@contextmanager
def agreeing_processes(run: RunState) -> Iterator[None]:
    """Context manager: check after the ``with`` block that all processes train the same edit.

    All processes must have the same callback arguments, weights in scope and weights before the edit. If the block
    fails in one process, an error is raised in every process, so that no process waits for another one.

    Raises:
        EditError: the processes differ, or one of them has failed.
    """
    if not is_distributed():
        yield
        return
    own: dict[str, Any] = {
        "error": None,
        "weights": {} if run.host.resumed else _sums(run.reference, "before the edit"),
    }
    failure: Exception | None = None
    try:
        yield
        own["weights"] |= _sums(run.scope, "in scope")
        own["callbacks"] = {name: _arguments(callback) for name, callback in named_callbacks(run).items()}
    except Exception as error:
        failure, own["error"] = error, str(error).partition("\n")[0] or type(error).__name__
    found: list[Any] = [None] * world_size()
    try:
        dist.all_gather_object(found, own)
    except RuntimeError as error:
        if failure is not None:
            raise failure from None
        raise EditError(
            "another process ended before the first step, so this edit cannot begin; see the error of that process."
        ) from error
    if failure is not None:
        raise failure
    _compare(found)


def _compare(found: list[dict[str, Any]]) -> None:
    for number, other in enumerate(found):
        if other["error"] is not None:
            raise EditError(
                f"process {number} failed before the first step, so process {rank()} stops too: {other['error']}"
            )
    first = found[0]
    for number, other in enumerate(found[1:], start=1):
        for name in sorted(first["callbacks"].keys() | other["callbacks"].keys()):
            _compare_callback(name, number, first["callbacks"].get(name), other["callbacks"].get(name))
        if first["weights"] == other["weights"]:
            continue
        names = first["weights"].keys() | other["weights"].keys()
        name = next(n for n in sorted(names) if first["weights"].get(n) != other["weights"].get(n))
        raise EditError(
            f"every process must begin with the same weights, but {name} differs between process 0 and process "
            f"{number}; load the same checkpoint in every process, and set the same seed before adapters are added."
        )


def _compare_callback(name: str, number: int, first: dict[str, Any] | None, other: dict[str, Any] | None) -> None:
    component = name.partition(".")[0]
    if first is None or other is None:
        # A callback that only prints or writes may be used in a single process.
        if (first or other or {})["trains"]:
            uses, lacks = (number, 0) if first is None else (0, number)
            raise EditError(
                f"every process must use the same callbacks, but process {uses} uses this callback and process {lacks} "
                "does not; pass the same callbacks in every process.",
                component=component,
            )
        return
    differing = next((key for key in sorted(first.keys() | other.keys()) if first.get(key) != other.get(key)), None)
    if differing is not None:
        raise EditError(
            f"{differing} must be the same in every process, got {first.get(differing)!r} in process 0 and "
            f"{other.get(differing)!r} in process {number}; pass the same arguments in every process.",
            component=component,
        )


def _arguments(callback: Any) -> dict[str, Any]:
    return {
        "trains": bool(changes_training(callback) or callback.anchors),
        **{
            name: value
            for name, value in vars(callback).items()
            if not name.startswith("_")
            and name.rpartition("_")[2] not in _LOCAL
            and (value is None or isinstance(value, bool | int | float | str))
            and not (isinstance(value, str) and os.sep in value)
        },
    }


def _sums(tensors: Any, where: str) -> dict[str, int]:
    """Return the checksum of each tensor. Sharded tensors are left out, because every process has a different part."""
    complete = {name: value for name, value in tensors.items() if not isinstance(value, DTensor)}
    names = [f"{name} ({where})" for name in complete]
    return dict(zip(names, checksums(complete.values()), strict=True))
