"""Read the weights of a module, a state dict or a checkpoint folder, one tensor at a time."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kedit_train.core.fsdp import full_tensor
from kedit_train.core.gate.gate import find_gate
from kedit_train.core.scope.adapters import base_model
from kedit_train.errors import EditError
from kedit_train.safetensors_header import Span, read_header, read_tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Weights(Mapping[str, Tensor]):
    """A mapping from names to full CPU tensors. Each tensor is loaded on access, and a tied weight appears once.

    Args:
        readers: for each name, a function that returns the tensor.
        tied: for each name, the other names of the same tensor.
        made_of: for each name, the ids (``id()``) of the parameters from which the tensor is computed. The dict is
            empty if the weights do not come from a module.
        about: ``name`` and ``license`` of the model, if known.
    """

    def __init__(
        self,
        readers: Mapping[str, Callable[[], Tensor]],
        tied: Mapping[str, tuple[str, ...]] | None = None,
        made_of: Mapping[str, set[int]] | None = None,
        about: Mapping[str, str | None] | None = None,
    ) -> None:
        self._readers, self.tied = dict(readers), dict(tied or {})
        self.made_of, self.about = dict(made_of or {}), dict(about or {})

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        return full_tensor(self._readers[name]().detach()).cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def weights_of(source: Any) -> Weights:
    """Return the weights of a module, a state dict or a safetensors checkpoint (sharded or not).

    The weights of a module are its parameters and persistent buffers. The weights of a PEFT model have the names and
    values that ``merge_and_unload()`` would give, but the PEFT model itself stays unchanged.

    Args:
        source: a module, a mapping of tensors, the path of a checkpoint folder, or :class:`Weights`.

    Raises:
        EditError: ``source`` is none of these, or its adapters cannot be merged.
    """
    if isinstance(source, Weights):
        return source
    if isinstance(source, nn.Module):
        return _module_weights(source)
    if isinstance(source, Mapping):
        return _state_dict_weights(source)
    if isinstance(source, str | os.PathLike):
        return _folder_weights(Path(source))
    raise EditError(f"expected a module, a state dict or the folder of a checkpoint, got {type(source).__name__}.")


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and persistent buffer; a tied tensor appears under each of its names."""
    return {**dict(module.named_parameters(remove_duplicate=False)), **persistent_buffers(module)}


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return every persistent buffer; a tied buffer appears under each of its names."""
    found: dict[str, Tensor] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        buffers = {
            n: b for n, b in part._buffers.items() if b is not None and n not in part._non_persistent_buffers_set
        }
        found |= {f"{prefix}.{name}" if prefix else name: buffer for name, buffer in buffers.items()}
    return found


def grouped(named: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Group the names that refer to the same memory.

    Returns:
        A dict with one item per tensor: its first name as the key, and a tuple of its other names as the value.
    """
    firsts: dict[Any, str] = {}
    groups: dict[str, tuple[str, ...]] = {}
    for name, tensor in named.items():
        key: Any = id(tensor)
        if not isinstance(tensor, nn.Parameter | DTensor) and tensor.numel() and not tensor.is_meta:
            key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        first = firsts.setdefault(key, name)
        groups[first] = (*groups[first], name) if first in groups else ()
    return groups


def _state_dict_weights(source: Mapping[str, Any]) -> Weights:
    named = {name: value for name, value in source.items() if isinstance(value, Tensor)}
    if len(named) != len(source) or not named:
        raise EditError("a state dict must contain tensors and nothing else; pass model.state_dict().")
    tied = grouped(named)
    return Weights({name: lambda name=name: named[name] for name in tied}, tied)


def _module_weights(module: Any) -> Weights:
    base = module
    if find_gate(module) is not None:
        raise EditError(
            "a gated adapter acts on some inputs only, so a delta cannot store it; save the adapter with "
            "GatedAdapter(path=)."
        )
    if hasattr(module, "peft_config"):
        if any(config.is_prompt_learning for config in module.peft_config.values()):
            raise EditError("prompt tuning changes no weight, so a delta cannot store it; save the adapter with PEFT.")
        base = base_model(module)
    named = named_tensors(base)
    readers: dict[str, Callable[[], Tensor]] = {name: lambda value=value: value for name, value in named.items()}
    made_of = {name: {id(value)} for name, value in named.items()}
    if base is not module or hasattr(module, "peft_config"):
        named, readers, made_of = _merged(base, named, readers, made_of)
    tied = grouped(named)
    return Weights(
        {name: readers[name] for name in tied},
        tied,
        {n: set().union(*(made_of[m] for m in (n, *others))) for n, others in tied.items()},
        _about(base),
    )


def _merged(base: nn.Module, named: dict[str, Tensor], readers: Any, made_of: Any) -> tuple[Any, Any, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    renamed: dict[str, str] = {name: name for name in named}
    for prefix, layer in base.named_modules():
        own = [name for name in named if name.startswith(f"{prefix}.")]
        if isinstance(layer, ModulesToSaveWrapper):
            active = f"{prefix}.modules_to_save.{layer.active_adapters[0]}." if layer.active_adapters else None
            used = active or f"{prefix}.original_module."
            for name in own:
                renamed[name] = f"{prefix}.{name.removeprefix(used)}" if name.startswith(used) else ""
        elif isinstance(layer, AuxiliaryTrainingWrapper):
            raise EditError(
                f"{prefix}: adapters of type {type(layer).__name__} cannot be merged, so a delta cannot store them; "
                "save the adapter with PEFT."
            )
        elif isinstance(layer, BaseTunerLayer):
            if layer.merged or any(isinstance(named[name], DTensor) for name in own):
                if layer.merged:
                    problem, remedy = "is already merged", "call unmerge_adapter()"
                else:
                    problem, remedy = "is sharded (FSDP2)", "gather its full tensors"
                raise EditError(f"{prefix}: the adapter {problem}; {remedy} before you make a delta.")
            for name in own:
                inner = name.removeprefix(f"{prefix}.base_layer.")
                renamed[name] = f"{prefix}.{inner}" if inner != name else ""
                if inner != name:
                    readers[name] = lambda layer=layer, inner=inner: _merge(layer, inner)
                    made_of[name] = {id(named[other]) for other in own}
    renames = [(old, new) for old, new in renamed.items() if new]
    return tuple({new: table[old] for old, new in renames} for table in (named, readers, made_of))  # type: ignore[return-value]


def _merge(layer: Any, name: str) -> Tensor:
    """Return a parameter with the layer's active adapters merged into it. The layer itself stays unchanged."""
    plain = layer.get_base_layer().get_parameter(name)
    merged = copy.deepcopy(layer)
    merged.merge()
    value = merged.get_base_layer().get_parameter(name)
    # An adapter that adds zero must not change a bit, but adding 0.0 turns -0.0 into 0.0.
    return plain if torch.equal(value, plain) else value


def _about(model: Any) -> dict[str, str | None]:
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
    # The path of a local folder is private, so only its last part is recorded.
    return {"name": Path(name).name, "license": license_of(name)} if Path(name).exists() else {"name": name}


def license_of(folder: str | os.PathLike[str]) -> str | None:
    """Return the license that the model card in a checkpoint folder states, or None if it states no license."""
    card = Path(folder) / "README.md"
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines() if card.is_file() else []
    if not lines or lines[0].strip() != "---":
        return None
    stated = [line.partition(":")[2].strip() for line in lines[1:50] if line.startswith("license:")]
    return stated[0][:100] if stated else None


def _folder_weights(folder: Path) -> Weights:
    readers = {
        name: lambda path=path, span=span, name=name: read_tensor(path, span, name)
        for path, spans in shards_of(folder).items()
        for name, span in spans.items()
    }
    return Weights(readers, {}, about={"name": folder.name, "license": license_of(folder)})


def shards_of(folder: Path) -> dict[Path, dict[str, Span]]:
    """Read where each tensor of a checkpoint is stored.

    Returns:
        For each weight file, a dict from the names of its tensors to their positions in the file.

    Raises:
        EditError: the folder is not a safetensors checkpoint, or its index does not match the weight files (shards).
            The error is also raised if a shard is missing or damaged, or lies outside of the folder.
    """
    if not folder.is_dir():
        raise EditError(f"folder {str(folder)!r} does not exist; give the folder of a checkpoint.")
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            raise EditError(
                f"folder {str(folder)!r} contains neither {SINGLE} nor {INDEX}; save the model with save_pretrained."
            )
        return {folder / SINGLE: read_header(folder / SINGLE)[0]}
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = {str(file) for file in index.values()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
        raise EditError(
            f"{folder / INDEX} is not a valid shard index ({type(error).__name__}); download or save the "
            "checkpoint again."
        ) from error
    for name in names:
        if not name.endswith(".safetensors") or name.startswith(".") or {"/", "\\", "\0"} & set(name):
            raise EditError(
                f"{folder / INDEX} must name only .safetensors files in the same folder, got {name!r}; do not load "
                "this checkpoint, and download it again from a source that you trust."
            )
    shards = {folder / name: read_header(folder / name)[0] for name in sorted(names)}
    stored = {tensor: path.name for path, spans in shards.items() for tensor in spans}
    if stored != index:
        wrong = sorted(stored.items() ^ index.items())[0][0]
        raise EditError(
            f"{folder / INDEX} does not match its shards (weight files): by the index, the tensor {wrong!r} is in "
            f"{index.get(wrong, 'no file')}, but it is in {stored.get(wrong, 'no file')}; download or save the "
            "checkpoint again."
        )
    return shards
