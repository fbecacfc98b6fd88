"""Rows of hidden states by content: in memory up to a limit, in files of a folder beyond it."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kedit_train.errors import EditError

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)}
_UNITS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", 1)}


def parse_bytes(size: int | str) -> int:
    """Read a number of bytes: 1000000, "1GB" (10^9), "1.5 GiB" (2^30).

    Raises:
        EditError: it is not understood, or not above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    unit = _UNITS.get(match[2].upper()) if match else None
    count = int(float(match[1]) * unit) if match and unit else 0
    if count <= 0:
        raise EditError(f"{size!r} is no size above 0; write bytes (1000000), '500MB' or '1.5GiB'")
    return count


class RowStore:
    """Tensors of any shape under the keys they are given, on the CPU, never thrown out for others.

    Args:
        memory: bytes of tensors to hold in memory.
        folder: where the rest goes, each lot of rows a safetensors file of its own in a sub-folder that belongs to this
            process and goes with :meth:`close`; None keeps only what fits in memory.

    Attributes:
        memory_bytes, disk_bytes: what is held now, and where.
        left_out: rows that fitted nowhere.
    """

    def __init__(self, memory: int, folder: Path | None = None) -> None:
        self.memory, self.folder = memory, folder
        self._held: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        self._own: Path | None = None
        self._lots = self.memory_bytes = self.disk_bytes = self.left_out = 0
        self._remove: Any = None

    def __len__(self) -> int:
        return len(self._held) + len(self._files)

    def __contains__(self, key: str) -> bool:
        return key in self._held or key in self._files

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Keep copies of rows whose keys are new."""
        beyond: dict[str, Tensor] = {}
        for key, row in rows.items():
            size = row.numel() * row.element_size()
            if key in self:
                continue
            if self.memory_bytes + size <= self.memory:
                # A copy: a row is a view of its whole batch.
                self._held[key] = row.to("cpu", copy=True)
                self.memory_bytes += size
            else:
                beyond[key] = row
        if beyond and (self.folder is None or not self._spill(beyond)):
            self.left_out += len(beyond)

    def get(self, keys: Sequence[str]) -> list[Tensor] | None:
        """Return the rows, or None unless every one of them is here."""
        if not all(key in self for key in keys):
            return None
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}
            found = []
            for key in keys:
                path = self._files.get(key)
                if path is not None and path not in opened:
                    opened[path] = stack.enter_context(safe_open(path, framework="pt"))
                found.append(self._held[key] if path is None else opened[path].get_tensor(key))
            return found

    def clear(self) -> None:
        """Forget every row, on disk too."""
        self._held, self._files = {}, {}
        self.memory_bytes = self.disk_bytes = self.left_out = 0
        if self._remove is not None:
            self._remove()
        self._own = self._remove = None

    close = clear

    def _spill(self, rows: Mapping[str, Tensor]) -> bool:
        assert self.folder is not None
        try:
            if self._own is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                # Of this process alone, whoever else writes there; removed at the latest when the process ends.
                self._own = Path(tempfile.mkdtemp(prefix="prefix-cache-", dir=self.folder))
                self._remove = weakref.finalize(self, shutil.rmtree, self._own, ignore_errors=True)
            path = self._own / f"{self._lots}.safetensors"
            unfinished = path.with_suffix(".part")
            save_file({key: row.to("cpu", copy=True) for key, row in rows.items()}, unfinished)
            os.replace(unfinished, path)
        except (OSError, SafetensorError) as error:
            warnings.warn(f"no more rows are written to {self.folder}: {error}", stacklevel=2)
            self.folder = None
            return False
        self._lots += 1
        self._files |= dict.fromkeys(rows, path)
        self.disk_bytes += path.stat().st_size
        return True
