"""The metadata of a delta about its edits and about library versions."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kedit_train.data import EditDataset


def library_versions() -> dict[str, str]:
    """Return the versions of this package and of the libraries that computed the weights."""
    versions = {}
    for name in ("kedit-train", "torch", "transformers", "peft"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def describe_edits(edits: Sequence[Any]) -> dict[str, Any]:
    """Return the hash (as in :class:`~kedit_train.data.EditDataset`) and the number of edits."""
    own_hash = getattr(edits, "hash", None)
    return {"hash": own_hash if isinstance(own_hash, str) else EditDataset(edits).hash, "count": len(edits)}
