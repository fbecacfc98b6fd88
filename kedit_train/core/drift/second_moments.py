"""Compute second moments of the inputs of linear layers with forward hooks.

Only sums of shape [d, d] are stored. If the weights are fp64, the sums are fp64. For all other dtypes, the sums are
fp32. Padding is not counted. In a distributed run, each process reads a part of the texts, and the sums are added over
all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from kedit_train.core.drift.linear_layers import LinearLayer
from kedit_train.core.drift.model_batches import Batch
from kedit_train.core.fsdp import reshard
from kedit_train.core.output_head import evaluation_mode
from kedit_train.core.processes import is_distributed, rank
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError
from kedit_train.functional.precision import full_precision, wide


class _AllInputsSeen(Exception):
    """An exception that ends a forward pass when the inputs of all layers have been recorded."""


@dataclass
class SecondMoment:
    """The second moment of vectors x that are added one batch at a time.

    Attributes:
        sum: sum of x xᵀ over all vectors, [d, d].
        count: number of vectors.
    """

    sum: Tensor
    count: int = 0

    @property
    def mean(self) -> Tensor:
        """The mean E[x xᵀ], [d, d]."""
        return self.sum / self.count

    def update(self, vectors: Tensor) -> None:
        """Add ``vectors`` [n, d] to the sum and to the count."""
        with full_precision(vectors.device.type):
            vectors = vectors.to(self.sum.dtype)
            self.sum += vectors.T @ vectors
        self.count += len(vectors)

    def __add__(self, other: SecondMoment) -> SecondMoment:
        """Return the second moment of the vectors of ``self`` and ``other``. Every vector counts equally."""
        return SecondMoment(self.sum + other.sum, self.count + other.count)

    def __sub__(self, other: SecondMoment) -> SecondMoment:
        """Return the second moment without the vectors of ``other``."""
        return SecondMoment(self.sum - other.sum, self.count - other.count)


def zero_moment(weight: Tensor, size: int) -> SecondMoment:
    """Return a second moment to which no vector has been added. Its sum is a zero matrix, [size, size].

    The matrix is on the device of ``weight``. It is fp64 if the weight is fp64, and fp32 otherwise.
    """
    return SecondMoment(wide(torch.zeros(size, size, dtype=weight.dtype, device=weight.device)))


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the input of a linear module from the arguments that a hook receives."""
    return args[0] if args else next(iter(kwargs.values()))


def input_moments(
    run: EditRun, layers: Mapping[str, LinearLayer], model: nn.Module, batches: Iterable[Batch]
) -> dict[str, SecondMoment]:
    """Run the model before the edit, and compute the second moment of each layer's inputs.

    Args:
        run: the current run.
        layers: name -> linear layer.
        model: the module that is called with the batches.
        batches: the batches that this process handles.

    Returns:
        name -> second moment of the inputs, [d_in, d_in].

    Raises:
        EditError: a layer was never called, or does not receive one vector per token.
    """
    reshard(run.root)
    moments = {
        name: zero_moment(run.scope[name], layer.as_matrix(run.scope[name]).shape[1]) for name, layer in layers.items()
    }
    head = run.head() if model is run.language_model else None
    # The output head is the most expensive layer. It computes one position only, unless its own inputs are needed.
    head_modules = set(head.module.modules()) if head is not None else set()
    modules = [(name, module) for name, layer in layers.items() for module in layer.modules]
    skip_head = head is not None and not any(module in head_modules for _, module in modules)
    batch: Batch
    calls: list[nn.Module] = []
    every = {module for _, module in modules}
    # In two cases, no forward pass may be interrupted. A model that reads no text may call a module several times,
    # depending on the input. In a sharded model, hooks must free the weights that other hooks have gathered.
    complete = not skip_head or any(isinstance(module, FSDPModule) for module in run.root.modules())
    once = False

    def all_seen() -> bool:
        return len(calls) == len(modules) and set(calls) == every

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, kwargs: Any) -> None:
            moments[name].update(batch.real_tokens(layer_input(args, kwargs), name))
            calls.append(module)
            if once and all_seen():
                raise _AllInputsSeen

        return record

    hooks = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in modules]
    try:
        with torch.no_grad(), run.reference_model(), evaluation_mode(run.model), run.host.forward_context():
            for batch in batches:
                calls.clear()
                with suppress(_AllInputsSeen):
                    if head is not None and skip_head and isinstance(batch.inputs, Mapping):
                        head.hidden(**{k: v for k, v in batch.inputs.items() if k not in ("labels", "use_cache")})
                    else:
                        batch.call(model)
                # If the complete first pass calls each module once, later passes can stop when all have been called.
                once = once or (not complete and all_seen())
    finally:
        for handle in hooks:
            handle.remove()
    return sum_over_processes(moments)


def sum_over_processes(moments: dict[str, SecondMoment]) -> dict[str, SecondMoment]:
    """Sum each moment over all processes, in place.

    Raises:
        EditError: a moment is empty on every process.
    """
    for name, moment in moments.items():
        if is_distributed():
            count = torch.tensor(moment.count, device=moment.sum.device)
            dist.all_reduce(moment.sum)
            dist.all_reduce(count)
            moment.count = int(count)
        if not moment.count:
            raise EditError(
                f"the module of {name} was never called on the texts. The module may be a disabled or merged adapter, "
                "or an expert that no token reached; remove its weight from the scope."
            )
    return moments


def broadcast_from_first(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors of the first process on every process.

    Use this for tensors that every process computes, but that must be the same on all processes. For example, two
    processes may compute eigenvectors that differ in the last bits or in sign.
    """
    if not is_distributed():
        return list(tensors)
    shapes: list[Any] = [[tuple(t.shape) for t in tensors]]
    dist.broadcast_object_list(shapes, src=0)
    received = []
    for tensor, shape in zip(tensors, shapes[0], strict=True):
        received.append(tensor.contiguous() if rank() == 0 else tensor.new_empty(shape))
        dist.broadcast(received[-1], src=0)
    return received
