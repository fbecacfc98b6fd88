"""Store the output of a model's frozen layers for each sequence, and skip these layers if the output is stored.

A pre-hook on the backbone computes a key for each sequence of a batch. If the output of every sequence is stored, the
frozen layers pass the stored hidden states on without computing anything. Otherwise the layers run, and a pre-hook on
the first trained layer stores the input of that layer. The hooks do nothing in forward passes without gradients
(evaluation, generation).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.compatibility import remove_cache
from kedit_train.core.cache.hidden_state_store import HiddenStateStore
from kedit_train.core.cache.layer_stack import Prefix, PrefixState, call_arguments
from kedit_train.core.cache.sequence_keys import SequenceBatch, read_sequences
from kedit_train.core.scope.experts import experts_per_block
from kedit_train.core.transforms import check_no_transform
from kedit_train.errors import EditError, reported_by, warn

# Hooks run in the forward pass of the training loop, where errors do not name a callback by default.
_COMPONENT = "PrefixCache"


@dataclass
class _Call:
    """One forward pass of the backbone.

    Attributes:
        sequences: the sequences of the batch.
        hidden: the hidden states [B, S, d] if the frozen layers are skipped, None if they run.
        random_states: the states of the random generators at the start of the forward pass.
        started: the time at the start of the forward pass.
        stored: the stored hidden states, if this forward pass compares them with the output of the frozen layers.
            Otherwise None.
    """

    sequences: SequenceBatch
    hidden: Tensor | None
    random_states: list[Tensor]
    started: float
    stored: list[Tensor] | None = None


class FrozenPrefix:
    """Hooks that skip the frozen layers of a model if ``store`` contains the output of these layers.

    Args:
        model: the causal language model.
        prefix: the frozen layers, as returned by :func:`find_prefix`.
        store: keeps hidden states [tokens, d] for each sequence, in the dtype of the layer outputs.
        recheck: number of batches with skipped layers between two checks. In a check, the frozen layers run, and their
            output is compared with the store. 0 disables the checks.
        ignores_padding: function that returns True if the current forward pass does not use the hidden states of
            padding. Its result matters only in forward passes without labels. Labels already show whether the loss
            uses the hidden states of padding.

    Attributes:
        active: the hooks do nothing until this is True.
        sequences: number of sequences in forward passes with gradients.
        served: number of sequences, out of ``sequences``, for which the frozen layers were skipped.
        bypassed: number of forward passes for which the store could not be used.
        seconds_saved: seconds saved, estimated from the measured time per token of the frozen layers.
        compiled: True after torch.compile has traced a forward pass. Compiled forward passes are not cached.
    """

    def __init__(
        self,
        model: nn.Module,
        prefix: Prefix,
        store: HiddenStateStore,
        recheck: int,
        ignores_padding: Callable[[], bool],
    ) -> None:
        self.model, self.prefix, self.store, self.recheck = model, prefix, store, recheck
        self.sequences = self.served = self.bypassed = 0
        self._ignores_padding, self.active, self.compiled = ignores_padding, False, False
        self.seconds_saved: float = 0.0
        # Seconds that the frozen layers ran, and the number of tokens that they processed.
        self._seconds_and_tokens = [0.0, 0]
        self._call: _Call | None = None
        # The labels are kept in a stack, because a loss head may call the model again within a call of the model.
        self._labels: list[Tensor | None] = []
        self._inert = self._checking = self._outdated = False
        self._served_since_recheck = 0
        self._warned: set[str] = set()
        self._replaced_forwards: list[tuple[nn.Module, Any]] = []
        self._bypass_reason = ""
        self._has_experts = bool(experts_per_block(dict(model.named_parameters())))
        self._state = PrefixState(model, prefix)
        self._adapters = [m for m in prefix.modules if hasattr(m, "active_adapters") and hasattr(m, "disable_adapters")]
        self._handles = [
            # This hook must run first, because a loss head removes the labels from the call.
            model.register_forward_pre_hook(self._push_labels, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._pop_labels, always_call=True),
            prefix.backbone.register_forward_pre_hook(self._enter_backbone, with_kwargs=True),
            prefix.layers[prefix.cut].register_forward_pre_hook(self._enter_first_trained_layer),
            # This hook is also called if the forward pass fails, so that the next forward pass finds the original
            # layers.
            prefix.backbone.register_forward_hook(self._leave_backbone, always_call=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        # A copied or pickled model contains copies of the hooks. These copies must do nothing.
        return {"_inert": True, "_call": None, "_labels": [], "compiled": False, "_replaced_forwards": []}

    def remove(self) -> None:
        """Remove the hooks and delete the stored hidden states."""
        for handle in self._handles:
            handle.remove()
        self.store.close()

    @torch.no_grad()
    def check_logits(self, forward: Callable[[], Tensor]) -> None:
        """Check that the logits are the same bit for bit when the frozen layers are skipped.

        Args:
            forward: runs the model once and returns its logits [B, S, V].

        Raises:
            EditError: no batch can be cached, or the logits differ. The store contains only hidden states, so the
                logits differ if a later module also reads other results of the frozen layers.
        """
        own_store, self.store = self.store, HiddenStateStore(1 << 30)
        expected, served_before = forward(), self.served
        self._checking = True
        try:
            logits = [forward(), forward()]
        finally:
            self._checking, self.store = False, own_store
        skipped = self.served > served_before
        self.sequences = self.served = self._served_since_recheck = 0
        self.seconds_saved, self._seconds_and_tokens = 0.0, [0.0, 0]
        if not skipped and self._bypass_reason:
            change = "remove this cause"
            if "output_router_logits" in self._bypass_reason:
                change = "set router_aux_loss_coef=0.0 in SFTConfig, or model.config.output_router_logits=False"
            problem = f"no batch can be cached, because {self._bypass_reason}; {change}, or remove PrefixCache."
            raise EditError(problem, component=_COMPONENT)
        if not skipped or not all(_same_bits(expected, x) for x in logits):
            raise EditError(
                f"the cache would change the logits of {type(self.model).__name__}, because the cache stores only the "
                f"hidden states that enter layer {self.prefix.cut}, but a later module also reads other values that "
                "earlier layers compute; remove PrefixCache.",
                component=_COMPONENT,
            )

    # -- one forward pass

    def _push_labels(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._inert and not torch.compiler.is_compiling():
            self._labels.append(kwargs.get("labels"))

    def _pop_labels(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._labels:
            self._labels.pop()

    def _enter_backbone(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._inert:
            return
        if torch.compiler.is_compiling():
            self.compiled = True
            return
        if not (self._checking or (self.active and torch.is_grad_enabled())):
            return
        if torch._C._current_graph_task_id() != -1:
            raise EditError(
                "the backward pass runs the whole backbone again, because one activation checkpoint contains all "
                "layers; checkpoint each layer separately, as transformers does, or remove PrefixCache.",
                component=_COMPONENT,
            )
        with reported_by(_COMPONENT):
            check_no_transform()
        if self._outdated:
            self.bypassed += 1
            return
        inputs = call_arguments(module, args, kwargs)
        sequences = self._read(inputs, self._labels[-1] if self._labels else None)
        if isinstance(sequences, str):
            self.bypassed, self._bypass_reason = self.bypassed + 1, sequences
            if not self._checking:
                self._warn_once(f"a batch is computed in full, without the cache, because {sequences}.")
            return
        self._check_weights()
        started, device = time.perf_counter(), inputs["input_ids"].device
        stored = self.store.get(sequences.keys)
        self.sequences += len(sequences.keys)
        if stored is None or 0 < self.recheck <= self._served_since_recheck:
            self._call = _Call(sequences, None, _random_states(device), started, stored)
        else:
            self._served_since_recheck += 1
            self.served += len(sequences.keys)
            hidden = self._assemble(sequences, stored, device)
            self._call = _Call(sequences, hidden, [], started)
            self._skip_layers(hidden)

    def _enter_first_trained_layer(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        call, self._call = self._call, None
        if call is None:
            return None
        tokens = call.sequences.shape.numel()
        if call.hidden is not None:
            seconds, measured = self._seconds_and_tokens
            cost = seconds / measured * tokens if measured else 0.0
            self.seconds_saved += cost - (time.perf_counter() - call.started)
            return None
        hidden: Tensor = args[0].detach()
        if not all(map(torch.equal, call.random_states, _random_states(hidden.device))):
            raise EditError(
                f"a module below layer {self.prefix.cut} draws random numbers (dropout, noise on embeddings), so the "
                "hidden states differ between epochs; set dropout and noise in these layers to 0, or remove "
                "PrefixCache.",
                component=_COMPONENT,
            )
        replaced = (call.sequences.without_padding(args[0]), *args[1:]) if self._has_experts else None
        # The copy to the CPU waits for the device, so the measured time includes all work of the frozen layers.
        hidden = hidden.cpu()
        seconds, measured = self._seconds_and_tokens
        self._seconds_and_tokens = [seconds + time.perf_counter() - call.started, measured + tokens]
        if call.stored is not None:
            self._compare(call, hidden)
            return replaced
        left_out = self.store.left_out
        with reported_by(_COMPONENT):
            spans = zip(call.sequences.keys, hidden, call.sequences.spans, strict=True)
            self.store.add({key: states[span] for key, states, span in spans})
        if self.store.left_out > left_out:
            self._warn_once(
                f"memory_limit is reached with {len(self.store)} sequences, so all layers run for every batch with a "
                "sequence that is not stored; raise memory_limit or set cache_dir."
            )
        return replaced

    def _compare(self, call: _Call, hidden: Tensor) -> None:
        """Stop caching if ``hidden`` [B, S, d] differs from the stored hidden states by more than rounding."""
        self._served_since_recheck = 0
        tolerance = self._tolerance(hidden)
        for span, states, stored in zip(call.sequences.spans, hidden, call.stored or (), strict=True):
            if states[span].shape[0] == 0:
                continue
            now, before = states[span].float(), stored.float()
            # The median is used, because rounding may send single tokens of a mixture of experts to another expert.
            difference = ((now - before).norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-30)).median()
            if not float(difference) <= tolerance:
                self._outdated = True
                self.store.clear()
                self._warn_once(
                    f"layer {self.prefix.cut} now receives other hidden states than those stored for the same "
                    "sequences, so an earlier module has changed (possible causes: a write to parameter.data, a new "
                    "value of an attribute, a separate random generator). Caching has stopped, but batches since the "
                    "last recheck used outdated hidden states; remove the cause of the change, or remove PrefixCache."
                )
                return

    def _tolerance(self, hidden: Tensor) -> float:
        kind = self.model.get_parameter(next(iter(self.prefix.parameters))).device.type
        dtypes = [hidden.dtype, *([torch.get_autocast_dtype(kind)] if torch.is_autocast_enabled(kind) else [])]
        # At least 1e-3, because TF32 rounds more than fp32.
        return max(1e-3, *(torch.finfo(dtype).eps ** 0.5 for dtype in dtypes))

    def _leave_backbone(self, module: nn.Module, args: Any, output: Any) -> None:
        self._call = None
        if self._replaced_forwards:
            # The skipped layers have added no keys and values, so the key-value cache is incomplete.
            remove_cache(output)
        while self._replaced_forwards:
            layer, own = self._replaced_forwards.pop()
            layer.__dict__.pop("forward", None)
            if own is not None:
                layer.__dict__["forward"] = own

    def _skip_layers(self, hidden: Tensor) -> None:
        def skip(index: int, received: Tensor, *_: Any, **__: Any) -> Tensor | tuple[Tensor]:
            # If the embeddings require a gradient, reentrant checkpointing needs an input that requires a gradient.
            first = hidden.requires_grad_() if received.requires_grad else hidden
            states = received if index else first
            return (states,) if self.prefix.tuples[index] else states

        for i, layer in enumerate(self.prefix.layers[: self.prefix.cut]):
            self._replaced_forwards.append((layer, layer.__dict__.get("forward")))
            layer.__dict__["forward"] = partial(skip, i)

    @staticmethod
    def _assemble(sequences: SequenceBatch, stored: list[Tensor], device: torch.device) -> Tensor:
        """Combine the stored hidden states of the sequences into a batch [B, S, d], with zeros at padding."""
        shape = (*sequences.shape, stored[0].shape[-1])
        hidden = torch.zeros(shape, dtype=stored[0].dtype, pin_memory=device.type == "cuda")
        for target, states, span in zip(hidden, stored, sequences.spans, strict=True):
            target[span] = states
        return hidden.to(device, non_blocking=True)

    # -- keys of the sequences

    def _read(self, inputs: dict[str, Any], labels: Tensor | None) -> SequenceBatch | str:
        if not self._state.unchanged_modules():
            return f"a module or a hook below layer {self.prefix.cut} was added, removed or replaced"
        if self._state.is_trained():
            return f"a parameter below layer {self.prefix.cut} requires a gradient"
        if "input_ids" not in inputs:
            return "the backbone was called without input_ids"
        return read_sequences(
            inputs,
            labels,
            ignores_padding=self._ignores_padding(),
            config=getattr(self.prefix.backbone, "config", None),
            mode=self._mode(inputs["input_ids"].device),
        )

    def _mode(self, device: torch.device) -> bytes:
        """Return the settings that hidden states depend on: autocast, active adapters, training or evaluation mode."""
        kind = device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        adapters: list[Any] = [
            (m.disable_adapters, m.active_adapters, getattr(m, "scaling", None)) for m in self._adapters
        ]
        return f"{autocast} {adapters}".encode() + bytes(m.training for m in self.prefix.modules)

    # -- frozen weights

    def _check_weights(self) -> None:
        changed = self._state.changed_tensor()
        if changed is not None:
            self.store.clear()
            self._warn_once(f"the frozen tensor {changed} was changed; the stored hidden states are computed again.")

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            with reported_by(_COMPONENT):
                warn(message)


def _random_states(device: torch.device) -> list[Tensor]:
    """Return the state of the CPU's random generator and, for a CUDA device, the state of the device's generator."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
