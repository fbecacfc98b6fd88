"""The part of a delta's metadata that describes the edits and the library versions."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kedit_train.data import EditDataset
from kedit_train.version import __version__


def library_versions() -> dict[str, str]:
    """Return the version of kedit-train, and the installed versions of torch, transformers and peft."""
    versions = {"kedit-train": __version__}
    for name in ("torch", "transformers", "peft"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def describe_edits(edits: Sequence[Any]) -> dict[str, Any]:
    """Return a dict with the hash of the edits (see :class:`~kedit_train.data.EditDataset`) and their number."""
    own_hash = getattr(edits, "hash", None)
    return {"hash": own_hash if isinstance(own_hash, str) else EditDataset(edits).hash, "count": len(edits)}
