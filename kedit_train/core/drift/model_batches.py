"""Batches for computing statistics of a model: tokenized texts, or inputs for a model that reads no text."""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.core.locality.token_sequences import pad_sequences
from kedit_train.core.processes import rank, world_size
from kedit_train.core.run import EditRun
from kedit_train.core.scope.adapters import base_model
from kedit_train.errors import EditError


@dataclass(frozen=True)
class Batch:
    """The arguments of one forward pass.

    Attributes:
        inputs: keyword arguments as a mapping, or positional arguments as a tuple.
        mask: [batch, sequence] bool, True for real tokens. None if there is no padding.
        counted: whether the batch is part of the statistics. With FSDP2, every process must call the model equally
            often. Otherwise, the processes would wait for each other forever. A process with fewer batches than the
            others therefore gets additional batches, which are not counted.
    """

    inputs: tuple[Any, ...] | Mapping[str, Any]
    mask: Tensor | None = None
    counted: bool = True

    def call(self, model: nn.Module) -> Any:
        """Run the model on this batch."""
        return model(**self.inputs) if isinstance(self.inputs, Mapping) else model(*self.inputs)

    def without_first(self) -> Batch:
        """Return a copy of this batch. Its mask is False for padding and for the first token of every sequence."""
        assert isinstance(self.inputs, Mapping)
        mask = self.inputs["attention_mask"].bool().clone()
        mask[:, 0] = False
        return replace(self, mask=mask)

    def real_tokens(self, values: Tensor, name: str) -> Tensor:
        """Remove the vectors of padding. If the batch is not counted, remove all vectors.

        Args:
            values: [batch, sequence, d] or [batch * sequence, d].
            name: name of the weight, for the error message.

        Returns:
            The vectors that remain, [tokens, d].

        Raises:
            EditError: the values do not have one vector per token of the batch.
        """
        vectors = values.reshape(-1, values.shape[-1])
        if not self.counted:
            return vectors[:0]
        if self.mask is None:
            return vectors
        flat = values.ndim == 2 and len(values) == self.mask.numel()
        if values.shape[:-1] != self.mask.shape and not flat:
            raise EditError(
                f"the module of {name} must receive one vector per token, but got a tensor of shape "
                f"{tuple(values.shape)} for a batch of {tuple(self.mask.shape)} tokens, so padding cannot be "
                "identified; set batch_size=1 to avoid padding."
            )
        return vectors[self.mask.flatten()]


def text_batches(sequences: Sequence[Sequence[int]], batch_size: int, device: torch.device) -> Iterator[Batch]:
    """Yield right-padded batches of token sequences, sorted by length."""
    ordered = sorted(sequences, key=len)
    for start in range(0, len(ordered), batch_size):
        ids, mask = pad_sequences(ordered[start : start + batch_size])
        ids, mask = ids.to(device), mask.to(device)
        yield Batch({"input_ids": ids, "attention_mask": mask}, None if bool(mask.all()) else mask.bool())


def process_batches(sequences: Sequence[Sequence[int]], batch_size: int, device: torch.device) -> Iterator[Batch]:
    """Yield the text batches that this process handles. Every process gets the same number of batches."""
    own = share_of_process(sequences)
    yield from text_batches(own, batch_size, device)
    for _ in range(missing_batches(len(sequences), len(own), batch_size)):
        yield replace(next(text_batches(sequences[:1], 1, device)), counted=False)


def missing_batches(count: int, own: int, batch_size: int) -> int:
    """Return how many fewer batches this process has than the process with the most batches.

    Args:
        count: number of items before :func:`share_of_process` distributes them over the processes.
        own: number of items that this process received.
        batch_size: number of items in a batch.
    """
    most = math.ceil(count / world_size())
    return math.ceil(most / batch_size) - math.ceil(own / batch_size)


def holds_model_inputs(source: Any) -> bool:
    """Return True if ``source`` contains tensors, or tuples or mappings of tensors. Return False for texts."""
    if isinstance(source, str) or not isinstance(source, Iterable):
        return False
    return _holds_tensor(next(iter(source), None))


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Mapping | tuple | list):
        return any(_holds_tensor(inner) for inner in (value.values() if isinstance(value, Mapping) else value))
    return isinstance(value, Tensor)


def model_input_batches(source: Iterable[Any], device: torch.device) -> Iterator[Batch]:
    """Yield the batches of model inputs that this process handles. Every process gets the same number of batches.

    Args:
        source: contains one item per forward pass. An item is a mapping (keyword arguments), a tuple or list
            (positional arguments) or a tensor.
        device: device to which the tensors are moved.
    """
    items = iter(source)
    while group := list(islice(items, world_size())):
        own = rank() < len(group)
        yield replace(model_input_batch(group[rank() if own else 0], device), counted=own)


def model_input_batch(item: Any, device: torch.device) -> Batch:
    """Return the batch of one forward pass, with all tensors on ``device``.

    Args:
        item: a mapping (keyword arguments), a tuple or list (positional arguments) or a tensor. An argument may itself
            be a mapping, a tuple or a list of tensors.
        device: device to which the tensors are moved.
    """
    if isinstance(item, Mapping):
        inputs = {name: _move(value, device) for name, value in item.items()}
        mask = inputs.get("attention_mask")
        return Batch(inputs, None if mask is None or bool(mask.all()) else mask.bool())
    values = item if isinstance(item, tuple | list) else [item]
    return Batch(tuple(_move(value, device) for value in values))


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _move(inner, device) for name, inner in value.items()}
    # The constructor of a named tuple takes separate arguments, so a named tuple is passed on unchanged.
    return type(value)(_move(inner, device) for inner in value) if type(value) in (tuple, list) else value


def find_text_model(run: EditRun) -> nn.Module:
    """Return the outermost module that reads token ids: a language model, a reward model or a classifier.

    Raises:
        EditError: no module of the run reads token ids.
    """
    queue = deque([run.language_model or run.model])
    while queue:
        module = queue.popleft()
        # FSDP2 may shard a PEFT wrapper, so the model inside is not called directly.
        if "input_ids" in inspect.signature(base_model(module).forward).parameters:
            return module
        queue.extend(module.children())
    raise EditError(
        f"{type(run.root).__name__} has no module that reads token ids, so the model cannot read texts; set texts= to "
        "a list of the model's inputs (tensors, or tuples or mappings of tensors)."
    )


def share_of_process(items: Sequence[Any]) -> Sequence[Any]:
    """Return the items of this process. In a distributed run, each of the n processes takes every n-th item."""
    return items[rank() :: world_size()]
