"""Apply a delta to a checkpoint on disk, shard by shard, with one tensor in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from kedit_train.atomic_write import writing
from kedit_train.core.scope.experts import is_stack
from kedit_train.delta.tensor_change import Change
from kedit_train.delta.weight_source import INDEX, shards_of
from kedit_train.errors import EditError
from kedit_train.safetensors_file import tensor_bytes
from kedit_train.safetensors_header import Span, read_tensor

# Files with these endings are not copied if the checkpoint does not use them. They may contain the original weights.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".safetensors")


def patch_checkpoint(changes: Mapping[str, Change], folder: Path, out: Path, to: Literal["edited", "base"]) -> Path:
    """Copy a checkpoint and apply or revert the changes in the copy.

    All tensors that will change are checked before the first byte is written. Each shard is copied as a file, and only
    the changed values are overwritten in the copy. So the header, the order of the tensors and all unchanged tensors
    stay identical, byte for byte. Configuration and tokenizer files are copied. Two things are not copied: subfolders,
    and weight files that the checkpoint does not use. The folder ``out`` appears only when it is complete.

    Args:
        changes: the change of each tensor, by name.
        folder: the checkpoint to read.
        out: the folder to write. It must not exist.
        to: the state of the new checkpoint: "edited" applies the changes, "base" reverts them.

    Raises:
        EditError: ``out`` exists, or the checkpoint is not in the expected state. With ``to="edited"``, it must be the
            base model. With ``to="base"``, it must be the edited model.
    """
    if out.exists():
        raise EditError(f"the output folder {out} already exists; choose the name of a new folder.")
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
    """Return the changes to write into each shard.

    If the checkpoint stores a tied tensor under several names, the change is written under each of these names.
    """
    places = {name: (path, span) for path, spans in shards.items() for name, span in spans.items()}
    stored = {
        name: [alias for alias in (name, *change.tied) if alias in places] or _other_names(name, change, places)
        for name, change in changes.items()
    }
    missing = next((name for name, aliases in stored.items() if not aliases), None)
    if missing is not None and is_stack(missing, changes[missing].shape):
        raise EditError(
            f"the checkpoint stores {missing!r} as one tensor per expert, but the delta has one tensor for all "
            "experts; load the model with from_pretrained, apply or revert the delta, and save the model with "
            "save_pretrained."
        )
    if missing is not None:
        raise EditError(
            f"the model has no tensor {missing!r}, which the delta changes, so the delta was made for another model; "
            "use the model for which the delta was made."
        )
    jobs: dict[Path, dict[str, tuple[Span, Change]]] = {}
    for name, change in changes.items():
        for alias in stored[name]:
            path, span = places[alias]
            change.require("base" if to == "edited" else "edited", alias, read_tensor(path, span, alias))
            jobs.setdefault(path, {})[alias] = (span, change)
    return jobs


def _other_names(name: str, change: Change, places: Mapping[str, tuple[Path, Span]]) -> list[str]:
    """Find a tensor that has another name in the checkpoint than in the model.

    For example, some vision-language models have a tensor ``model.language_model.layers.0.mlp.down_proj.weight``. Their
    checkpoints store it as ``model.layers.0.mlp.down_proj.weight``. Both names end with
    ``layers.0.mlp.down_proj.weight``. So this function searches the checkpoint for a tensor of the same shape whose
    name has the same end. The contents of the tensor are compared later, as for all tensors.

    Returns:
        A list with the name in the checkpoint. The list is empty if no tensor matches, or if several tensors match.
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    end = parts[max(0, numbers[-1] - 1) if numbers else -2 :]
    found = [
        other
        for other, (_, span) in places.items()
        if other.split(".")[-len(end) :] == end and tuple(span.shape) == tuple(change.shape)
    ]
    return found if len(found) == 1 else []


def _patch(copy: Path, original: Path, jobs: Mapping[str, tuple[Span, Change]], to: str) -> None:
    if not jobs:
        return
    with copy.open("rb+") as file:
        for name, (span, change) in jobs.items():
            values = change.after if to == "edited" else change.before
            file.seek(span.start)
            file.write(tensor_bytes(change.replaced(read_tensor(original, span, name), values)))
