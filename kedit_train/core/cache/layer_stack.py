"""The frozen layers below the first trained one, found by watching the model run rather than by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kedit_train.errors import EditError


@dataclass(frozen=True)
class Prefix:
    """What a causal language model computes before the first trained tensor is used.

    Attributes:
        backbone: the module that takes token ids and calls the layers.
        layers: the layers in the order in which it calls them, each with the hidden states of the one before.
        cut: the first layer that has to run in every step; those before it are frozen.
        parameters: name -> parameter, of all that runs before that layer.
        modules: the modules that run before it.
    """

    backbone: nn.Module
    layers: list[nn.Module]
    cut: int
    parameters: dict[str, nn.Parameter]
    modules: list[nn.Module]


@dataclass
class _Trace:
    """One forward pass: modules in the order in which they were entered, with the tensor given and the one returned."""

    entered: list[nn.Module] = field(default_factory=list)
    given: list[Any] = field(default_factory=list)
    returned: dict[int, list[Any]] = field(default_factory=dict)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        handles: list[Any] = []
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.entered.append(module)
        self.given.append((args, kwargs))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.returned.setdefault(id(module), []).append(output)

    def chain(self, layers: nn.ModuleList) -> list[nn.Module]:
        """The first layers of a list, if each ran once, in order, on the tensor that the one before returned."""
        own = {id(layer) for layer in layers}
        calls = [(m, call) for m, call in zip(self.entered, self.given, strict=True) if id(m) in own]
        if len(calls) < 2 or [id(m) for m, _ in calls] != [id(m) for m in list(layers)[: len(calls)]]:
            return []
        outputs = [self.returned[id(m)][0] for m, _ in calls]
        tensors = [args[0] if args else None for _, (args, _) in calls]
        good = all(isinstance(x, Tensor) and x.ndim == 3 and x.is_floating_point() for x in (*tensors, *outputs))
        joined = all(left is right for left, right in zip(outputs, tensors[1:], strict=False))
        return [m for m, _ in calls] if good and joined else []


def arguments(backbone: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Name the arguments of a call of the backbone, those of ``**kwargs`` among them; what is None is left out."""
    signature = inspect.signature(backbone.forward)
    named = dict(signature.bind_partial(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return {name: value for name, value in named.items() if value is not None}


def find_prefix(model: nn.Module, trained: Iterable[nn.Parameter], ids: Tensor, forward: Callable[[], Any]) -> Prefix:
    """Find what runs before the first trained tensor.

    Args:
        model: a causal language model.
        trained: the parameters that take a gradient.
        ids: token ids [B, S] with which ``forward`` calls the model.

    Raises:
        EditError: the model has no stack of layers that hand hidden states to each other and to nobody else, or
            something is trained (or sharded) that runs before them or in the first of them.
    """
    trace, name = _Trace(), type(model).__name__
    with trace.watching(model):
        forward()
    stacks = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and trace.chain(m)]
    stacks = [(n, m) for n, m in stacks if not any(n.startswith(f"{other}.") for other, _ in stacks)]
    if len(stacks) != 1:
        raise EditError(
            f"PrefixCache: {name} has {'several stacks' if stacks else 'no stack'} of layers that call each other in "
            "order with a tensor of hidden states first, so what can be skipped is unknown; leave PrefixCache out"
        )
    ((path, stack),) = stacks
    backbone = model.get_submodule(path.rpartition(".")[0])
    _check_backbone(trace, backbone, ids)
    layers = trace.chain(stack)
    training = {id(p) for p in trained}
    holding = [i for i, layer in enumerate(layers) if any(id(p) in training for p in layer.parameters())]
    # With the head or the final norm alone in the scope, the last layer is as good a place as any.
    cut = min(holding, default=len(layers) - 1)
    names = {id(p): n for n, p in model.named_parameters()}
    if cut == 0:
        first = next(names[id(p)] for p in layers[0].parameters() if id(p) in training)
        raise EditError(
            f"PrefixCache: {first} is trained, and only the embedding lies below layer 0, so nothing can be skipped; "
            "leave PrefixCache out, or choose a later layer in ParameterScope"
        )
    start = trace.entered.index(layers[cut])
    before = _parameters(trace.entered[:start], stack, layers[:cut])
    after = _parameters(trace.entered[start:], stack, layers[cut:])
    for key in training & names.keys():
        if key in before or key not in after:
            where = f"runs before layer {cut}" if key in before else "is used where it cannot be followed"
            raise EditError(
                f"PrefixCache: {names[key]} is trained and {where} (a tied head is its embedding), so hidden states "
                "change with every step; leave PrefixCache out, or take it out of the scope"
            )
    sharded = next((names[key] for key, p in before.items() if isinstance(p, DTensor)), None)
    if sharded is not None:
        raise EditError(
            f"PrefixCache: {sharded} is sharded (FSDP2) and would be gathered all the same; leave PrefixCache out, or "
            "use DDP"
        )
    modules = list({id(m): m for m in trace.entered[:start]}.values())
    return Prefix(backbone, layers, cut, {names[key]: p for key, p in before.items()}, modules)


def _check_backbone(trace: _Trace, backbone: nn.Module, ids: Tensor) -> None:
    calls = [call for m, call in zip(trace.entered, trace.given, strict=True) if m is backbone]
    given = arguments(backbone, *calls[0]).get("input_ids") if len(calls) == 1 else None
    if not (isinstance(given, Tensor) and torch.equal(given, ids)):
        raise EditError(
            f"PrefixCache: {type(backbone).__name__} calls the layers and is not given the token ids, by which "
            "rows are known; leave PrefixCache out"
        )


def _parameters(entered: Iterable[nn.Module], stack: nn.Module, layers: list[nn.Module]) -> dict[int, nn.Parameter]:
    """Parameters of these layers and of the modules entered beside the stack; of what contains it, its own only."""
    inside = {id(m) for m in stack.modules()}
    found = {id(p): p for layer in layers for p in layer.parameters()}
    for module in entered:
        if id(module) not in inside:
            contains = any(m is stack for m in module.modules())
            found |= {id(p): p for p in module.parameters(recurse=not contains)}
    return found


class PrefixState:
    """Notices what becomes of the prefix of a model: its modules, their hooks, and every tensor that they hold.

    Tensors are looked up anew each time, so that those put in the place of others are seen too. What is written through
    ``parameter.data`` leaves no trace, and attributes that are no tensors are not looked at.
    """

    def __init__(self, model: nn.Module, prefix: Prefix) -> None:
        first = prefix.layers[prefix.cut]
        self._model = model
        around = [m for m in model.modules() if m is not first and any(x is first for x in m.modules())]
        holding = {id(m) for m in around}
        roots = [m for m in (*prefix.layers[: prefix.cut], *prefix.modules) if id(m) not in holding]
        self._own = list({id(m): m for root in roots for m in root.modules()}.values())
        self._around, self._backbone = around, prefix.backbone
        # Held, so that nothing new can take the place in memory, and with it the id, of what was replaced.
        self._modules = [child for m in (*self._own, *around) for child in m._modules.values()]
        self._structure = self._look_around()
        self._tensors = self._look()
        self._values = self._copies()
        self._states = _states(self._tensors)

    def whole(self) -> bool:
        """Whether the modules and the hooks below the cut are those that were found."""
        return self._look_around() == self._structure

    def trained(self) -> bool:
        """Whether anything below the cut requires a gradient."""
        return any(tensor.requires_grad for tensor in self._look().values())

    def written(self) -> str | None:
        """Name a tensor that was written to or replaced since the last call, or None."""
        tensors = self._look()
        states = _states(tensors)
        if states == self._states:
            return None
        keys = [key for key in states | self._states if states.get(key) != self._states.get(key)]
        # DDP writes buffers in every forward pass, the values that were there.
        changed = [key for key in keys if not self._has_its_values(key, tensors.get(key))]
        self._tensors, self._states = tensors, states
        if not changed:
            return None
        self._values = self._copies()
        module, name = changed[0]
        paths = {id(m): f"{path}." if path else "" for path, m in self._model.named_modules()}
        return f"{paths.get(module, '')}{name}"

    def _look_around(self) -> list[Any]:
        children = [id(child) for m in (*self._own, *self._around) for child in m._modules.values()]
        hooks = [
            (i, key)
            for i, m in enumerate(self._own)
            for key, hook in (*m._forward_pre_hooks.items(), *m._forward_hooks.items())
            # With the first request for hidden states, transformers puts hooks on all layers that only look.
            if not getattr(hook, "__module__", "").startswith("transformers.")
        ]
        return [children, hooks]

    def _look(self) -> dict[tuple[int, str], Tensor]:
        return {
            (id(m), name): tensor
            for m in (*self._own, self._backbone)
            for name, tensor in (*m._parameters.items(), *m._buffers.items())
            if tensor is not None
        }

    def _copies(self) -> dict[tuple[int, str], Tensor]:
        buffers = {key: tensor for key, tensor in self._tensors.items() if not isinstance(tensor, nn.Parameter)}
        return {key: tensor.detach().clone() for key, tensor in buffers.items()}

    def _has_its_values(self, key: tuple[int, str], tensor: Tensor | None) -> bool:
        before = self._values.get(key)
        if before is None or tensor is None or isinstance(tensor, nn.Parameter):
            return False
        alike = before.shape == tensor.shape and before.dtype == tensor.dtype and before.device == tensor.device
        return alike and torch.equal(before, tensor)


def _states(tensors: dict[tuple[int, str], Tensor]) -> dict[tuple[int, str], tuple[int, int, int]]:
    return {key: (id(tensor), tensor._version, tensor.data_ptr()) for key, tensor in tensors.items()}
