"""Store hidden states by sequence key, in memory up to a limit and on disk beyond the limit."""

from __future__ import annotations

import os
import re
import shutil
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kedit_train.errors import EditError, warn
from kedit_train.owners import claim, release, remove, remove_abandoned

_HOUR = 3600
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)}
_UNITS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", 1)}


def parse_bytes(size: int | str, component: str | None = None) -> int:
    """Convert a size such as "1.5GiB" to a number of bytes.

    Args:
        size: an integer, or a string such as "500MB" (1 MB is 10^6 bytes) or "1.5GiB" (1 GiB is 2^30 bytes).
        component: name of the class that the error message begins with. None omits the name.

    Raises:
        EditError: ``size`` cannot be parsed or is not above 0.

    Example:
        >>> parse_bytes("1.5GiB")
        1610612736
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    unit = _UNITS.get(match[2].upper()) if match else None
    count = int(float(match[1]) * unit) if match and unit else 0
    if count <= 0:
        raise EditError(
            f"memory_limit must be a number of bytes above 0 or a size such as '1.5GiB', got {size!r}.", component
        )
    return count


class HiddenStateStore:
    """Store CPU tensors of any shape by key, in memory or on disk. No tensor is evicted.

    Args:
        memory_limit: maximum total size of the tensors in memory, in bytes.
        cache_dir: directory for tensors that do not fit in memory. If it is None, these tensors are not stored. Each
            process writes to its own subdirectory, one safetensors file per call of :meth:`add`. :meth:`close` removes
            the subdirectory. If a process is killed, its subdirectory remains until a later store removes it.

    Attributes:
        memory_bytes: bytes in memory now.
        disk_bytes: bytes on disk now.
        left_out: number of tensors that were not stored, because they fit neither in memory nor on disk.
    """

    def __init__(self, memory_limit: int, cache_dir: Path | None = None) -> None:
        self.memory_limit, self.cache_dir = memory_limit, cache_dir
        self._in_memory: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        self._directory: Path | None = None
        self._touched = 0.0
        self._files_written = self.memory_bytes = self.disk_bytes = self.left_out = 0
        self._remove_directory: Any = None
        if cache_dir is not None:
            remove_abandoned(cache_dir.glob("prefix-cache[-.]*"))

    def __len__(self) -> int:
        return len(self._in_memory) + len(self._files)

    def __contains__(self, key: str) -> bool:
        return key in self._in_memory or key in self._files

    def add(self, hidden_states: Mapping[str, Tensor]) -> None:
        """Store copies of the tensors whose keys are new."""
        too_many: dict[str, Tensor] = {}
        for key, hidden in hidden_states.items():
            size = hidden.numel() * hidden.element_size()
            if key in self:
                continue
            if self.memory_bytes + size <= self.memory_limit:
                # The tensor is copied, because a view would keep the hidden states of the whole batch in memory.
                self._in_memory[key] = hidden.to("cpu", copy=True)
                self.memory_bytes += size
            else:
                too_many[key] = hidden
        if too_many and (self.cache_dir is None or not self._write(too_many)):
            self.left_out += len(too_many)

    def get(self, keys: Sequence[str]) -> list[Tensor] | None:
        """Return the tensors for ``keys`` in the same order, or None if a key is missing."""
        if not all(key in self for key in keys):
            return None
        self._touch()
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}
            tensors = []
            for key in keys:
                path = self._files.get(key)
                if path is not None and path not in opened:
                    opened[path] = stack.enter_context(safe_open(path, framework="pt"))
                tensors.append(self._in_memory[key] if path is None else opened[path].get_tensor(key))
            return tensors

    def clear(self) -> None:
        """Delete all stored tensors, in memory and on disk."""
        self._in_memory, self._files = {}, {}
        self.memory_bytes = self.disk_bytes = self.left_out = 0
        if self._directory is not None and self._remove_directory is not None:
            self._remove_directory()
            release(self._directory)
        self._directory = self._remove_directory = None

    close = clear

    def _touch(self) -> None:
        """Update the modification time of the directory.

        Other hosts remove a directory that has not changed for a day.
        """
        if self._directory is not None and time.time() - self._touched > _HOUR:
            self._touched = time.time()
            os.utime(self._directory)

    def _write(self, hidden_states: Mapping[str, Tensor]) -> bool:
        assert self.cache_dir is not None
        try:
            if self._directory is None:
                self.cache_dir.mkdir(parents=True, exist_ok=True)
                remove_abandoned(self.cache_dir.glob("prefix-cache[-.]*"))
                # Other processes may use the same cache_dir, so this process creates a directory of its own. The
                # directory is removed when this process ends, at the latest.
                self._directory, self._touched = claim(self.cache_dir, "prefix-cache"), time.time()
                remove(self._directory)
                self._directory.mkdir(mode=0o700)
                self._remove_directory = weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
            path = self._directory / f"{self._files_written}.safetensors"
            unfinished = path.with_suffix(".part")
            save_file({key: hidden.to("cpu", copy=True) for key, hidden in hidden_states.items()}, unfinished)
            os.replace(unfinished, path)
        except (OSError, SafetensorError) as error:
            warn(
                f"no more hidden states are written to {self.cache_dir} ({error}); free disk space or set another "
                "cache_dir."
            )
            self.cache_dir = None
            return False
        self._files_written += 1
        self._files |= dict.fromkeys(hidden_states, path)
        self.disk_bytes += path.stat().st_size
        return True
