"""The weights of whatever holds them (a module, a state dict, a checkpoint's folder), read one tensor at a time."""

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

from kedit_train.core.fsdp import whole
from kedit_train.errors import EditError
from kedit_train.safetensors_header import Span, read_header, read_tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Weights(Mapping[str, Tensor]):
    """name -> whole tensor on the CPU, made when it is asked for. A tied weight is there once.

    Args:
        readers: name -> what makes the tensor; tied: name -> further names of the same tensor.
        made_of: name -> the parameters (``id``) that its value is made of, where they are known.
        about: ``name`` and ``license`` of the model, where they are known.
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
        return whole(self._readers[name]().detach()).cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def weights_of(source: Any) -> Weights:
    """Read a module, a mapping of tensors, or the folder of a checkpoint (safetensors, sharded or not).

    Of a module, parameters and persistent buffers. Adapters of PEFT count as merged into the weights that they adapt,
    under those weights' own names, computed by PEFT's own ``merge``: the weights of ``merge_and_unload()``.

    Raises:
        EditError: none of these, or adapters that cannot be merged.
    """
    if isinstance(source, Weights):
        return source
    if isinstance(source, nn.Module):
        return _of_module(source)
    if isinstance(source, Mapping):
        return _of_state_dict(source)
    if isinstance(source, str | os.PathLike):
        return _of_folder(Path(source))
    raise EditError(f"no weights in a {type(source).__name__}; give a module, a state dict or a checkpoint's folder")


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every name of every parameter and persistent buffer; tied ones under each of theirs."""
    found: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    for prefix, part in module.named_modules(remove_duplicate=False):
        kept = {n: b for n, b in part._buffers.items() if b is not None and n not in part._non_persistent_buffers_set}
        found |= {f"{prefix}.{name}" if prefix else name: buffer for name, buffer in kept.items()}
    return found


def grouped(named: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """First name of each tensor -> its other names, by identity (of the memory, for a state dict's views)."""
    firsts: dict[Any, str] = {}
    groups: dict[str, tuple[str, ...]] = {}
    for name, tensor in named.items():
        key: Any = id(tensor)
        if not isinstance(tensor, nn.Parameter | DTensor) and tensor.numel() and not tensor.is_meta:
            key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        first = firsts.setdefault(key, name)
        groups[first] = (*groups[first], name) if first in groups else ()
    return groups


def _of_state_dict(source: Mapping[str, Any]) -> Weights:
    named = {name: value for name, value in source.items() if isinstance(value, Tensor)}
    if len(named) != len(source) or not named:
        raise EditError("this mapping holds something other than tensors, or nothing; give model.state_dict()")
    tied = grouped(named)
    return Weights({name: lambda name=name: named[name] for name in tied}, tied)


def _of_module(module: Any) -> Weights:
    base = module
    if hasattr(module, "peft_config"):
        if any(config.is_prompt_learning for config in module.peft_config.values()):
            raise EditError("learned prompts are no change of a weight, so no delta can hold them; save the adapter")
        base = module.get_base_model() if hasattr(module, "get_base_model") else module
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
            kept = active or f"{prefix}.original_module."
            for name in own:
                renamed[name] = f"{prefix}.{name.removeprefix(kept)}" if name.startswith(kept) else ""
        elif isinstance(layer, AuxiliaryTrainingWrapper):
            raise EditError(
                f"{prefix}: adapters of this kind ({type(layer).__name__}) cannot be merged; save the adapter"
            )
        elif isinstance(layer, BaseTunerLayer):
            if layer.merged or any(isinstance(named[name], DTensor) for name in own):
                state = "is merged already; call unmerge_adapter()" if layer.merged else "is sharded (FSDP2); gather it"
                raise EditError(f"{prefix}: its adapter {state} before a delta is made")
            for name in own:
                inner = name.removeprefix(f"{prefix}.base_layer.")
                renamed[name] = f"{prefix}.{inner}" if inner != name else ""
                if inner != name:
                    readers[name] = lambda layer=layer, inner=inner: _merge(layer, inner)
                    made_of[name] = {id(named[other]) for other in own}
    kept_names = [(old, new) for old, new in renamed.items() if new]
    return tuple({new: table[old] for old, new in kept_names} for table in (named, readers, made_of))  # type: ignore[return-value]


def _merge(layer: Any, name: str) -> Tensor:
    """A parameter of the adapted layer with the active adapters merged in, by PEFT's own code on a copy."""
    plain = layer.get_base_layer().get_parameter(name)
    merged = copy.deepcopy(layer)
    merged.merge()
    found = merged.get_base_layer().get_parameter(name)
    # An adapter that adds nothing leaves the very bits: adding 0.0 would turn -0.0 around.
    return plain if torch.equal(found, plain) else found


def _about(model: Any) -> dict[str, str | None]:
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
    # A folder of this machine is nobody else's business.
    return {"name": Path(name).name, "license": license_of(name)} if Path(name).exists() else {"name": name}


def license_of(folder: str | os.PathLike[str]) -> str | None:
    """What the model card in a checkpoint's folder states as its license, if there is one."""
    card = Path(folder) / "README.md"
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines() if card.is_file() else []
    if not lines or lines[0].strip() != "---":
        return None
    stated = [line.partition(":")[2].strip() for line in lines[1:50] if line.startswith("license:")]
    return stated[0][:100] if stated else None


def _of_folder(folder: Path) -> Weights:
    readers = {
        name: lambda path=path, span=span, name=name: read_tensor(path, span, name)
        for path, spans in shards_of(folder).items()
        for name, span in spans.items()
    }
    return Weights(readers, {}, about={"name": folder.name, "license": license_of(folder)})


def shards_of(folder: Path) -> dict[Path, dict[str, Span]]:
    """The weight files of a checkpoint with the place of every tensor in each.

    Raises:
        EditError: no safetensors checkpoint, a shard that is missing, damaged or outside of the folder, or an index
            that does not agree with its shards.
    """
    if not folder.is_dir():
        raise EditError(f"there is no folder {str(folder)!r}; give that of a checkpoint")
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            raise EditError(f"{folder} holds neither {SINGLE} nor {INDEX}; save the model with save_pretrained")
        return {folder / SINGLE: read_header(folder / SINGLE)[0]}
    try:
        where = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = {str(file) for file in where.values()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
        raise EditError(f"{folder / INDEX} is no index of shards ({type(error).__name__}); get it again") from error
    for name in names:
        if not name.endswith(".safetensors") or name.startswith(".") or {"/", "\\", "\0"} & set(name):
            raise EditError(f"{folder / INDEX} names {name!r}, which is no plain file of this folder; do not trust it")
    shards = {folder / name: read_header(folder / name)[0] for name in sorted(names)}
    held = {tensor: path.name for path, spans in shards.items() for tensor in spans}
    if held != where:
        wrong = sorted(held.items() ^ where.items())[0][0]
        raise EditError(f"{folder / INDEX} and its shards do not agree on where {wrong!r} is; get the checkpoint again")
    return shards
