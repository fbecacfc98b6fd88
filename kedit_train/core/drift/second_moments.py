"""Second moments of what goes into a linear map and of the gradient that comes back, gathered by hooks on texts.

Only [d, d] sums are kept, never activations of more than one batch. They are summed in fp32 (fp64 for fp64 models)
whatever the model computes in, over real tokens only, and over all processes of a distributed run, each of which takes
its share of the texts.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kedit_train.core.drift.linear_layers import LinearMap
from kedit_train.core.locality.texts import pad
from kedit_train.core.output_head import evaluation_mode
from kedit_train.core.processes import is_distributed, rank, world_size
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError
from kedit_train.functional.precision import full_precision, wide


@dataclass
class Moment:
    """A running second moment: the sum of x xᵀ, [d, d], over ``count`` tokens."""

    sum: Tensor
    count: int = 0

    @property
    def mean(self) -> Tensor:
        return self.sum / self.count

    def add(self, rows: Tensor) -> None:
        """Take in rows [n, d]."""
        with full_precision(rows.device.type):
            rows = rows.to(self.sum.dtype)
            self.sum += rows.T @ rows
        self.count += len(rows)

    def __add__(self, other: Moment) -> Moment:
        """Of both samples together, each token counting once."""
        return Moment(self.sum + other.sum, self.count + other.count)


@dataclass(frozen=True)
class Batch:
    """What a model is called with; ``mask``, [B, S] bool, tells real tokens where some are padding."""

    inputs: tuple[Any, ...] | Mapping[str, Any]
    mask: Tensor | None = None

    def call(self, model: nn.Module) -> Any:
        return model(**self.inputs) if isinstance(self.inputs, Mapping) else model(*self.inputs)


def text_batches(rows: Sequence[Sequence[int]], batch_size: int, device: torch.device) -> Iterator[Batch]:
    """Token rows, those of similar length together, right-padded."""
    ordered = sorted(rows, key=len)
    for start in range(0, len(ordered), batch_size):
        ids, mask = pad(ordered[start : start + batch_size])
        ids, mask = ids.to(device), mask.to(device)
        yield Batch({"input_ids": ids, "attention_mask": mask}, None if bool(mask.all()) else mask.bool())


def holds_model_inputs(source: Any) -> bool:
    """Tell whether these are a model's own inputs (batches of tensors) rather than texts."""
    if isinstance(source, str) or not isinstance(source, Iterable):
        return False
    first = next(iter(source), None)
    values = first.values() if isinstance(first, Mapping) else first if isinstance(first, tuple | list) else [first]
    return any(isinstance(value, Tensor) for value in values)


def own_batches(source: Iterable[Any], device: torch.device) -> Iterator[Batch]:
    """This process's share of a model's own inputs: mappings (keyword arguments), sequences (positional) or tensors."""
    for given in islice(source, rank(), None, world_size()):
        if isinstance(given, Mapping):
            inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}
            mask = inputs.get("attention_mask")
            yield Batch(inputs, None if mask is None or bool(mask.all()) else mask.bool())
        else:
            values = given if isinstance(given, tuple | list) else [given]
            yield Batch(tuple(v.to(device) if isinstance(v, Tensor) else v for v in values))


def text_model(run: EditRun) -> nn.Module:
    """The outermost module that reads token ids: the language model, or one with another head (reward, classes)."""
    queue = deque([run.language_model or run.model])
    while queue:
        module = queue.popleft()
        if "input_ids" in inspect.signature(module.forward).parameters:
            return module
        queue.extend(module.children())
    raise EditError(
        f"{type(run.root).__name__} holds no model that reads token ids, so texts tell nothing about it; "
        "give texts= as a list of its own inputs (tensors, tuples or mappings of them)"
    )


def input_moments(
    run: EditRun, maps: Mapping[str, LinearMap], model: nn.Module, batches: Iterable[Batch]
) -> dict[str, Moment]:
    """Gather the second moment of each map's inputs on the model before the edit.

    Args:
        model: what the batches are for.
        batches: this process's share.

    Raises:
        EditError: a module was never called, or saw other tokens than the batch has.
    """
    moments = {
        name: empty_moment(run.scope[name], one.as_matrix(run.scope[name]).shape[1]) for name, one in maps.items()
    }
    head = run.head() if model is run.language_model else None
    # The head costs most and is given one position only, unless its own inputs are asked for.
    # Adapters wrap the head: what they own is in there as well.
    parts = set(head.module.modules()) if head is not None else set()
    short = head is not None and not any(module in parts for one in maps.values() for module in one.modules)
    current = Current()

    def watch(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: moments[name].add(current.rows(read_input(args, kwargs), name))

    hooks = [m.register_forward_pre_hook(watch(n), with_kwargs=True) for n, one in maps.items() for m in one.modules]
    try:
        with torch.no_grad(), run.unedited(), evaluation_mode(run.model), run.host.forward_context():
            for batch in batches:
                current.batch = batch
                if head is not None and short and isinstance(batch.inputs, Mapping):
                    head.hidden(**{k: v for k, v in batch.inputs.items() if k not in ("labels", "use_cache")})
                else:
                    batch.call(model)
    finally:
        for hook in hooks:
            hook.remove()
    return gathered(moments)


class Current:
    """The batch under way, for hooks."""

    batch: Batch

    def rows(self, values: Tensor, name: str) -> Tensor:
        """What belongs to real tokens, [n, d]."""
        mask, rows = self.batch.mask, values.reshape(-1, values.shape[-1])
        if mask is None:
            return rows
        flat = values.ndim == 2 and len(values) == mask.numel()
        if values.shape[:-1] != mask.shape and not flat:
            raise EditError(
                f"the module of {name} reads {tuple(values.shape)}, which is not token by token what "
                f"the model was given, {tuple(mask.shape)}, so padding cannot be told apart; set batch_size=1"
            )
        return rows[mask.flatten()]


def read_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a linear module is called with."""
    return args[0] if args else next(iter(kwargs.values()))


def empty_moment(parameter: Tensor, size: int) -> Moment:
    """Of ``size`` dimensions, where the parameter is and in at least fp32."""
    return Moment(wide(torch.zeros(size, size, dtype=parameter.dtype, device=parameter.device)))


def share(items: Sequence[Any]) -> Sequence[Any]:
    """What of it this process is to work on."""
    return items[rank() :: world_size()]


def gathered(moments: dict[str, Moment]) -> dict[str, Moment]:
    """Sum over processes.

    Raises:
        EditError: no process saw any token.
    """
    for name, moment in moments.items():
        if is_distributed():
            count = torch.tensor(moment.count, device=moment.sum.device)
            dist.all_reduce(moment.sum)
            dist.all_reduce(count)
            moment.count = int(count)
        if not moment.count:
            raise EditError(
                f"the module of {name} was never called on the texts (an adapter that is off or merged, "
                "an expert that no token reached), so nothing is known of its inputs; leave it out of the scope"
            )
    return moments


def same_everywhere(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of the first process, on all of them: decompositions may differ in their last bits."""
    if world_size() == 1:
        return list(tensors)
    shapes: list[Any] = [[tuple(t.shape) for t in tensors]]
    dist.broadcast_object_list(shapes, src=0)
    found = []
    for tensor, shape in zip(tensors, shapes[0], strict=True):
        found.append(tensor.contiguous() if rank() == 0 else tensor.new_empty(shape))
        dist.broadcast(found[-1], src=0)
    return found
