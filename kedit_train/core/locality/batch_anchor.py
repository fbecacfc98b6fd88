"""Compute the loss term of ``BatchAnchor``, and store the reference hidden states that this term needs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kedit_train.core.cache.hidden_state_store import HiddenStateStore
from kedit_train.core.cache.sequence_keys import forward_keys, is_per_example
from kedit_train.core.locality.divergence_penalty import DivergencePenalty
from kedit_train.core.locality.reference_cache import ReferenceCache
from kedit_train.core.output_head import evaluation_mode
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError, reported_by, warn
from kedit_train.functional.divergence import Direction, token_divergence
from kedit_train.functional.labels import IGNORE_INDEX

# Arguments of a forward call that do not change the hidden states of the supervised tokens.
_IRRELEVANT = ("labels", "num_items_in_batch", "fused_lm_head", "use_cache")


class AnchorTerm:
    """A loss term: the divergence from the reference model at the supervised tokens of the training batches.

    The class implements :class:`~kedit_train.core.tokens.interfaces.TokenTerm`.

    When an example occurs for the first time, one forward pass of the reference model computes the reference hidden
    states of the example. These hidden states are stored under a hash of the example's content, so later epochs need
    only the forward pass of the model in training.

    Args:
        run: the run. It must keep the reference weights while the term is in use.
        penalty: contains the weight of the divergence. Another callback may change this weight between steps.
        direction: direction of the divergence, as in :func:`kedit_train.functional.token_divergence`.
        cache: settings for storing the reference hidden states.

    Attributes:
        examples: number of examples since the last call of :meth:`metrics`.
        hits: number of these examples whose hidden states were already stored.
        last_step: the optimizer step of the last forward pass; -1 before the first forward pass.

    Raises:
        EditError: the model is sharded with FSDP2.
    """

    def __init__(
        self, run: EditRun, penalty: DivergencePenalty, *, direction: Direction, cache: ReferenceCache
    ) -> None:
        if any(isinstance(p, DTensor) for p in run.model.parameters()):
            raise EditError(
                "FSDP2 is not supported, because BatchAnchor runs the unedited model inside the forward pass, where "
                "sharded parameters cannot be accessed; use DDP or a single process, or use KLLocality with texts."
            )
        self.run, self.head = run, run.head()
        self.penalty, self.dtype = penalty, cache.torch_dtype
        self.direction: Direction = direction
        limit = sys.maxsize if cache.memory_bytes is None else cache.memory_bytes
        self.store = HiddenStateStore(limit, cache.directory)
        self.examples = self.hits = 0
        self.last_step: int = -1
        self._reference_projection = run.reference_head()
        self._sum, self._tokens = torch.zeros(()), 0

    @property
    def weight(self) -> float:
        """Factor of the divergence in the current step."""
        return self.penalty.weight

    def reference_states(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], labels: Tensor) -> Tensor:
        """Return the reference hidden states at the positions that predict supervised tokens, [N, hidden].

        Args:
            args: positional arguments of the model's forward call.
            kwargs: keyword arguments of the model's forward call.
            labels: [batch, sequence], -100 where a token is not supervised.
        """
        # The model calls this method in its forward pass, where errors do not name the callback by default.
        with reported_by("BatchAnchor"):
            return self._find_or_compute(args, kwargs, labels)

    def divergence(self, logits: Tensor, reference_states: Tensor) -> Tensor:
        """Return the divergence [N], in nats, from the reference model.

        Args:
            logits: [N, vocabulary], from the model in training.
            reference_states: [N, hidden], from :meth:`reference_states`.
        """
        with torch.no_grad():
            reference = self.head.project(reference_states, self._reference_projection)
        return token_divergence(reference, logits, direction=self.direction)

    def observe(self, divergence: Tensor) -> None:
        """Record the divergence [N] of one forward pass for :meth:`metrics`."""
        self._sum = self._sum.to(divergence.device) + divergence.detach().sum(dtype=torch.float32)
        self._tokens, self.last_step = self._tokens + len(divergence), self.run.step
        self.penalty.observe(divergence)

    def metrics(self) -> dict[str, float]:
        """Return the metrics since the last call of this method.

        The metrics are the mean divergence per token in nats, the share of examples whose hidden states were already
        stored, and the current size of the stored hidden states in bytes.
        """
        if not self.examples:
            return {}
        metrics = {
            "edit/locality/batch_kl": float(self._sum) / max(1, self._tokens),
            "edit/locality/batch_hits": self.hits / self.examples,
            "edit/locality/batch_bytes": float(self.store.memory_bytes + self.store.disk_bytes),
        }
        self._sum, self._tokens, self.examples, self.hits = torch.zeros(()), 0, 0, 0
        return metrics

    def _find_or_compute(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], labels: Tensor) -> Tensor:
        named = inspect.signature(self.head.model.forward).bind_partial(*args).arguments if args else {}
        inputs = {k: v for k, v in {**named, **kwargs}.items() if k not in _IRRELEVANT and v is not None}
        inputs = {name: _per_example(name, value, len(labels)) for name, value in inputs.items()}
        keys = forward_keys(inputs, labels)
        missing = [i for i, key in enumerate(keys) if key not in self.store and key not in keys[:i]]
        self.examples, self.hits = self.examples + len(keys), self.hits + len(keys) - len(missing)
        computed = self._compute(inputs, labels, missing) if missing else {}
        states = {keys[i]: hidden for i, hidden in computed.items()}
        left_out = self.store.left_out
        self.store.add(states)
        if self.store.left_out > left_out == 0:
            warn(
                "memory_limit of the ReferenceCache is reached, so the hidden states of further examples are not "
                "stored but computed again in every step; set cache_dir or raise memory_limit."
            )
        known = [key for key in dict.fromkeys(keys) if key not in states]
        states |= dict(zip(known, self.store.get(known) or (), strict=True))
        return torch.cat([states[key].to(labels.device) for key in keys])

    @torch.no_grad()
    def _compute(self, inputs: Mapping[str, Any], labels: Tensor, examples: list[int]) -> dict[int, Tensor]:
        """Return the hidden states [supervised tokens, hidden] of each example. All examples share one forward pass."""
        if len(examples) < len(labels):
            inputs = {k: v[examples] if isinstance(v, Tensor) else v for k, v in inputs.items()}
        with self.run.reference_model(), evaluation_mode(self.run.model):
            hidden = self.head.hidden(**inputs)
        dtype = self.dtype or self.head.compute_dtype(hidden)
        supervised = labels[examples, 1:].to(hidden.device) != IGNORE_INDEX
        return {example: hidden[n, :-1][supervised[n]].to(dtype) for n, example in enumerate(examples)}


def _per_example(name: str, value: Any, examples: int) -> Any:
    """Expand a tensor argument to one entry per example. Numbers and strings stay unchanged."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool | int | float | str):
            return value
        raise EditError(
            f"the model is called with the argument {name} of type {type(value).__name__}, but BatchAnchor can "
            "identify examples only if all arguments are tensors, numbers or strings; remove this argument, or use "
            "KLLocality with texts."
        )
    # A single example may have tensors of another length, such as the starts of its packed sequences.
    if examples == 1 or is_per_example(name, value, examples):
        return value
    if value.ndim and value.shape[0] == 1:
        return value.expand(examples, *value.shape[1:])
    raise EditError(
        f"the model is called with {name} of shape {tuple(value.shape)} for {examples} examples, but this "
        "argument must have one entry per example; remove the argument, or use KLLocality with texts."
    )
