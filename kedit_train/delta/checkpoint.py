"""A delta applied to a checkpoint on the disk, shard by shard; no more than one tensor is in memory."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from kedit_train.atomic_write import writing
from kedit_train.delta.tensor_change import Change
from kedit_train.delta.weight_source import INDEX, shards_of
from kedit_train.errors import EditError
from kedit_train.safetensors_file import tensor_bytes
from kedit_train.safetensors_header import Span, read_tensor

# Weights in other formats: copied, they would be the ones before the edit.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".safetensors")


def patch_checkpoint(changes: Mapping[str, Change], folder: Path, out: Path, to: Literal["edited", "base"]) -> Path:
    """Copy a checkpoint with the changed tensors replaced.

    Every changed tensor is checked before the first byte is written. Shards are copied as files and the values written
    into their places, so that headers, order and every other tensor stay as they are, byte for byte. ``out`` appears
    when it is complete. Configuration and tokenizer files come along; subfolders and weights in other formats do not.

    Raises:
        EditError: the checkpoint does not hold the tensors in the state to change, or ``out`` is there already.
    """
    if out.exists():
        raise EditError(f"{out} is there already; give the name of a folder that is not")
    shards = shards_of(folder)
    jobs = _jobs(changes, shards, to)
    with writing(out) as unfinished:
        unfinished.mkdir()
        for path in tqdm(sorted(folder.iterdir()), desc="writing", unit="file", leave=False, disable=None):
            if path.is_file() and (path in shards or path.suffix.lower() not in _OTHER_WEIGHTS):
                if path.name.endswith(".index.json") and path.name != INDEX:
                    continue
                copy = unfinished / path.name
                shutil.copyfile(path, copy)
                _patch(copy, path, jobs.get(path, {}), to)
    return out


def _jobs(
    changes: Mapping[str, Change], shards: Mapping[Path, dict[str, Span]], to: str
) -> dict[Path, dict[str, tuple[Span, Change]]]:
    where = {name: (path, span) for path, spans in shards.items() for name, span in spans.items()}
    held = {name: [one for one in (name, *change.tied) if one in where] for name, change in changes.items()}
    lost = next((name for name, found in held.items() if not found), None)
    if lost is not None:
        raise EditError(f"the checkpoint has no tensor {lost!r}; the delta belongs to another model")
    jobs: dict[Path, dict[str, tuple[Span, Change]]] = {}
    for name, change in changes.items():
        for one in held[name]:
            path, span = where[one]
            change.require("base" if to == "edited" else "edited", one, read_tensor(path, span, one))
            jobs.setdefault(path, {})[one] = (span, change)
    return jobs


def _patch(copy: Path, original: Path, jobs: Mapping[str, tuple[Span, Change]], to: str) -> None:
    if not jobs:
        return
    with copy.open("rb+") as file:
        for name, (span, change) in jobs.items():
            value = change.put(read_tensor(original, span, name), change.after if to == "edited" else change.before)
            file.seek(span.start)
            file.write(tensor_bytes(value))
