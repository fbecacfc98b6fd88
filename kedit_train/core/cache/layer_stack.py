"""Find the frozen layers below the first trained layer by tracing a forward pass."""

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
    """The part of a causal language model that runs before the first trained tensor is used.

    Attributes:
        backbone: the module that receives token ids and calls the layers.
        layers: the layers in the order of their calls. Each layer receives the hidden states of the previous layer.
        cut: the index of the first layer that must run in every step. All earlier layers are frozen.
        tuples: for each layer, whether it returns its hidden states as a tuple with one element.
        parameters: name -> parameter of every module that runs before layer ``cut``.
        modules: the modules that run before layer ``cut``.
    """

    backbone: nn.Module
    layers: list[nn.Module]
    cut: int
    tuples: list[bool]
    parameters: dict[str, nn.Parameter]
    modules: list[nn.Module]


@dataclass
class _Trace:
    """A record of one forward pass: the called modules in order, with their inputs and outputs."""

    called: list[nn.Module] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    outputs: dict[int, list[Any]] = field(default_factory=dict)

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
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
        self.called.append(module)
        self.inputs.append((args, kwargs))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.outputs.setdefault(id(module), []).append(output)

    def chain(self, layers: nn.ModuleList) -> list[nn.Module]:
        """Return the called layers if they form a chain, else an empty list.

        In a chain, every layer runs once, in order, and receives the tensor that the previous layer returned. A layer
        may also return the tensor as a tuple with one element, as some models of transformers 4 do.
        """
        own = {id(layer) for layer in layers}
        calls = [(m, call) for m, call in zip(self.called, self.inputs, strict=True) if id(m) in own]
        if len(calls) < 2 or [id(m) for m, _ in calls] != [id(m) for m in list(layers)[: len(calls)]]:
            return []
        outputs = [self.outputs[id(m)][0] for m, _ in calls]
        outputs = [output[0] if _is_single(output) else output for output in outputs]
        inputs = [args[0] if args else None for _, (args, _) in calls]
        are_states = all(isinstance(x, Tensor) and x.ndim == 3 and x.is_floating_point() for x in (*inputs, *outputs))
        are_joined = all(output is received for output, received in zip(outputs, inputs[1:], strict=False))
        return [m for m, _ in calls] if are_states and are_joined else []


def call_arguments(backbone: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a backbone call by name, including ``**kwargs`` and without None values."""
    signature = inspect.signature(backbone.forward)
    named = dict(signature.bind_partial(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return {name: value for name, value in named.items() if value is not None}


def block_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the hidden states that a module receives: its first argument, or the argument ``hidden_states``."""
    value = args[0] if args else kwargs.get("hidden_states")
    return value if isinstance(value, Tensor) else None


def find_prefix(
    model: nn.Module, trained: Iterable[nn.Parameter], input_ids: Tensor, forward: Callable[[], Any]
) -> Prefix:
    """Find the part of a model that runs before the first trained tensor is used.

    Args:
        model: a causal language model.
        trained: the parameters that receive gradients.
        input_ids: [B, S], the token ids that ``forward`` passes to the model.
        forward: runs the model once.

    Raises:
        EditError: the model does not have exactly one stack of layers in which each layer passes hidden states to the
            next layer. The error is also raised if layer 0 is trained, or if a module that runs before the first
            trained layer uses a trained parameter or a sharded parameter.
    """
    trace, name = _Trace(), type(model).__name__
    with trace.recording(model):
        forward()
    stacks = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and trace.chain(m)]
    stacks = [(n, m) for n, m in stacks if not any(n.startswith(f"{other}.") for other, _ in stacks)]
    if len(stacks) != 1:
        raise EditError(
            "the model must have exactly one stack of layers in which each layer passes a tensor of hidden "
            f"states to the next layer, but {name} has {'several such stacks' if stacks else 'none'}; remove "
            "PrefixCache."
        )
    ((path, stack),) = stacks
    backbone = model.get_submodule(path.rpartition(".")[0])
    _check_backbone(trace, backbone, input_ids)
    layers = trace.chain(stack)
    trained_ids = {id(p) for p in trained}
    trained_layers = [i for i, layer in enumerate(layers) if any(id(p) in trained_ids for p in layer.parameters())]
    # If only the head or the final norm is trained, the last layer is the cut.
    cut = min(trained_layers, default=len(layers) - 1)
    names = {id(p): n for n, p in model.named_parameters()}
    if cut == 0:
        first = next(names[id(p)] for p in layers[0].parameters() if id(p) in trained_ids)
        raise EditError(
            f"{first} in layer 0 is trained, so there is no frozen layer below it that PrefixCache can skip; "
            "remove PrefixCache, or choose later layers in ParameterScope."
        )
    start = trace.called.index(layers[cut])
    before = _parameters(trace.called[:start], stack, layers[:cut])
    after = _parameters(trace.called[start:], stack, layers[cut:])
    for key in trained_ids & names.keys():
        if key in before or key not in after:
            use = (
                f"is used before layer {cut} (for example as an embedding that is tied to the output head)"
                if key in before
                else "belongs to no module that was called"
            )
            raise EditError(
                f"{names[key]} is trained and {use}, so every step may change the output of the frozen layers, "
                "which PrefixCache stores; remove PrefixCache, or remove this parameter from the scope."
            )
    sharded = next((names[key] for key, p in before.items() if isinstance(p, DTensor)), None)
    if sharded is not None:
        raise EditError(
            f"{sharded} is sharded, but PrefixCache does not support FSDP2, because FSDP2 would still gather the "
            "parameters of every layer that is skipped; remove PrefixCache or use DDP."
        )
    modules = list({id(m): m for m in trace.called[:start]}.values())
    tuples = [_is_single(trace.outputs[id(layer)][0]) for layer in layers]
    return Prefix(backbone, layers, cut, tuples, {names[key]: p for key, p in before.items()}, modules)


def _is_single(output: Any) -> bool:
    return isinstance(output, tuple) and len(output) == 1


def _check_backbone(trace: _Trace, backbone: nn.Module, input_ids: Tensor) -> None:
    calls = [call for m, call in zip(trace.called, trace.inputs, strict=True) if m is backbone]
    received = call_arguments(backbone, *calls[0]).get("input_ids") if len(calls) == 1 else None
    if not (isinstance(received, Tensor) and torch.equal(received, input_ids)):
        raise EditError(
            f"{type(backbone).__name__} calls the layers but does not receive the input_ids of the model, so "
            "PrefixCache cannot identify the sequences; remove PrefixCache."
        )


def _parameters(called: Iterable[nn.Module], stack: nn.Module, layers: list[nn.Module]) -> dict[int, nn.Parameter]:
    """Return the parameters of ``layers`` and of the called modules outside the stack, by id."""
    inside = {id(m) for m in stack.modules()}
    parameters = {id(p): p for layer in layers for p in layer.parameters()}
    for module in called:
        if id(module) not in inside:
            contains_stack = any(m is stack for m in module.modules())
            parameters |= {id(p): p for p in module.parameters(recurse=not contains_stack)}
    return parameters


class PrefixState:
    """Detects changes in the frozen part of a model: in its modules, their hooks and their tensors.

    Every check reads the tensors from the modules again, so replaced tensors are detected. Writes through
    ``parameter.data`` and changes of attributes that are not tensors are not detected.
    """

    def __init__(self, model: nn.Module, prefix: Prefix) -> None:
        first = prefix.layers[prefix.cut]
        self._model = model
        containers = [m for m in model.modules() if m is not first and any(x is first for x in m.modules())]
        container_ids = {id(m) for m in containers}
        roots = [m for m in (*prefix.layers[: prefix.cut], *prefix.modules) if id(m) not in container_ids]
        self._frozen = list({id(m): m for root in roots for m in root.modules()}.values())
        self._containers, self._backbone = containers, prefix.backbone
        # References keep replaced modules alive. Otherwise a new module could get the id of an old one.
        self._modules = [child for m in (*self._frozen, *containers) for child in m._modules.values()]
        self._structure = self._read_structure()
        self._tensors = self._read_tensors()
        self._buffers = self._copy_buffers()
        self._versions = _versions(self._tensors)

    def unchanged_modules(self) -> bool:
        """Return True if the modules and hooks of the frozen part are the same as when this object was created."""
        return self._read_structure() == self._structure

    def is_trained(self) -> bool:
        """Return True if a tensor of the frozen part requires a gradient."""
        return any(tensor.requires_grad for tensor in self._read_tensors().values())

    def changed_tensor(self) -> str | None:
        """Return the name of a tensor that was written to or replaced since the last call, or None."""
        tensors = self._read_tensors()
        versions = _versions(tensors)
        if versions == self._versions:
            return None
        keys = [key for key in versions | self._versions if versions.get(key) != self._versions.get(key)]
        # DDP writes every buffer in each forward pass without changing its values.
        changed = [key for key in keys if not self._is_same_buffer(key, tensors.get(key))]
        self._tensors, self._versions = tensors, versions
        if not changed:
            return None
        self._buffers = self._copy_buffers()
        module, name = changed[0]
        paths = {id(m): f"{path}." if path else "" for path, m in self._model.named_modules()}
        return f"{paths.get(module, '')}{name}"

    def _read_structure(self) -> list[Any]:
        children = [id(child) for m in (*self._frozen, *self._containers) for child in m._modules.values()]
        hooks = [
            (i, key)
            for i, m in enumerate(self._frozen)
            for key, hook in (*m._forward_pre_hooks.items(), *m._forward_hooks.items())
            # transformers adds hooks to all layers when hidden states are requested. These hooks change nothing.
            if not getattr(hook, "__module__", "").startswith("transformers.")
        ]
        return [children, hooks]

    def _read_tensors(self) -> dict[tuple[int, str], Tensor]:
        return {
            (id(m), name): tensor
            for m in (*self._frozen, self._backbone)
            for name, tensor in (*m._parameters.items(), *m._buffers.items())
            if tensor is not None
        }

    def _copy_buffers(self) -> dict[tuple[int, str], Tensor]:
        buffers = {key: tensor for key, tensor in self._tensors.items() if not isinstance(tensor, nn.Parameter)}
        return {key: tensor.detach().clone() for key, tensor in buffers.items()}

    def _is_same_buffer(self, key: tuple[int, str], tensor: Tensor | None) -> bool:
        before = self._buffers.get(key)
        if before is None or tensor is None or isinstance(tensor, nn.Parameter):
            return False
        alike = before.shape == tensor.shape and before.dtype == tensor.dtype and before.device == tensor.device
        return alike and torch.equal(before, tensor)


def _versions(tensors: dict[tuple[int, str], Tensor]) -> dict[tuple[int, str], tuple[int, int, int]]:
    return {key: (id(tensor), tensor._version, tensor.data_ptr()) for key, tensor in tensors.items()}
