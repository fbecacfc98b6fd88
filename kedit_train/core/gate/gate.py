"""Gate: switch a LoRA adapter on when a hidden state is near a stored key.

In each row of a batch, the adapter acts from the first position with such a hidden state to the end of the row.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.compatibility import read_cache
from kedit_train.core.cache.layer_stack import block_input, call_arguments
from kedit_train.core.gate.adapted_layers import find_adapted_layers
from kedit_train.core.gate.gate_cache import add_open, open_before
from kedit_train.core.gate.gate_file import read_gate
from kedit_train.core.gate.guards import (
    ALREADY_GATED,
    GATE,
    NO_NAMES,
    check_switches,
    find_gate,
    guard,
    unguard,
)
from kedit_train.errors import EditError
from kedit_train.functional.key_distance import matches, opened_from

# An attribute of a tensor of hidden states: the state of the gate in the forward pass that computed the tensor.
_STATE = "_kedit_gate_open"


class _ForwardPass(threading.local):
    """The state of the gate during a forward pass. Each thread has its own state.

    Attributes:
        real: True for tokens, False for padding, [rows, positions], bool.
        before: True for each row in which the gate is already open when the pass begins, [rows], bool.
        open: True for each position at which the gate is open, [rows, positions], bool.
        outputs: the outputs of base layers, by the id of the layer.
        opened_rows: see :attr:`Gate.opened_rows`.
    """

    def __init__(self) -> None:
        self.real: Tensor | None = None
        self.before: Tensor | None = None
        self.open: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}
        self.opened_rows: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or pickled gate is in no forward pass.
        return _ForwardPass, ()


class Gate:
    """Stored keys that decide where a LoRA adapter acts.

    The hidden states that enter one decoder block are compared with the keys. No earlier block has an adapter, so the
    decision depends only on the model without the adapter. Each key has a radius. In each row, the adapter acts from
    the first position whose hidden state lies within the radius of a key. At all earlier positions, each adapted layer
    returns the output of its base layer. At these positions, the outputs of the model are therefore equal, bit for bit,
    to the outputs without the adapter.

    The decision for a token depends only on this token and the tokens before it. With a key-value cache, the decision
    is kept in the cache. Several threads may call the model at the same time.

    Args:
        keys: [keys, hidden], fp32.
        radii: [keys], fp32.
        layer: index of the decoder block whose inputs are compared with the keys.
    """

    def __init__(self, keys: Tensor, radii: Tensor, layer: int) -> None:
        self.keys, self.radii, self.layer = keys.float(), radii.float(), layer
        self._handles: list[Any] = []
        self._model: Any = None
        self._pass = _ForwardPass()

    @property
    def opened_rows(self) -> Tensor | None:
        """For each row of this thread's last forward pass: whether the gate was open at any position, [rows], bool."""
        return self._pass.opened_rows

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Gate:
        """Read the gate of an adapter folder.

        Raises:
            EditError: the file is missing or damaged, has a newer format, or was saved with other adapter weights.
        """
        saved = read_gate(folder)
        return cls(saved.keys, saved.radii, saved.layer)

    def install(self, model: Any) -> None:
        """Add the hooks of the gate to a model with a LoRA adapter. The gate stays until :meth:`remove`.

        Until then, ``save_pretrained`` of the model also saves the gate, and merging the adapter raises an error.

        Args:
            model: a ``PeftModel`` with one LoRA adapter.

        Raises:
            EditError: the adapter cannot be gated, the keys do not fit the model, or the model already has a gate.
        """
        adapted = find_adapted_layers(model)
        if find_gate(model) is not None:
            raise EditError(ALREADY_GATED)
        if not 0 <= self.layer <= adapted.first:
            raise EditError(
                f"the layer of the gate must be at most {adapted.first}, the index of the first block with an "
                f"adapter, got {self.layer}; use a lower layer, or adapt only higher blocks."
            )
        hidden = model.get_base_model().config.get_text_config().hidden_size
        if self.keys.shape[1] != hidden:
            raise EditError(
                f"the keys of the gate have {self.keys.shape[1]} entries, but the hidden states of the model have "
                f"{hidden}; use the gate with the model that it was made for."
            )
        self._model = model
        model.get_base_model().__dict__[GATE] = self
        guard(model)
        add = self._handles.append
        add(adapted.backbone.register_forward_pre_hook(self._enter, with_kwargs=True))
        add(adapted.blocks[self.layer].register_forward_pre_hook(self._decide, with_kwargs=True))
        add(adapted.backbone.register_forward_hook(self._leave))
        for block in list(adapted.blocks)[adapted.first :]:
            add(block.register_forward_pre_hook(self._mark, with_kwargs=True))
            for child in block.children():
                add(child.register_forward_pre_hook(self._recall, with_kwargs=True))
        for layer in adapted.layers:
            add(layer.base_layer.register_forward_hook(self._keep))  # type: ignore[union-attr, operator]
            add(layer.register_forward_hook(self._choose, with_kwargs=True))
        try:
            check_switches(self, adapted)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove the gate from its model. The adapter then acts at every position of every row."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._model is not None and find_gate(self._model) is self:
            del self._model.get_base_model().__dict__[GATE]
            unguard(self._model)
        self._model = None

    @contextmanager
    def opened_at(self, is_open: Tensor) -> Iterator[None]:
        """Context manager: set the state of the gate, so that one adapted layer can be called without the model.

        Args:
            is_open: True for each position at which the gate is open, [rows, positions], bool.
        """
        own = self._pass
        before, own.open = own.open, is_open
        try:
            yield
        finally:
            own.open, own.outputs = before, {}

    # -- one forward pass, in the order of the calls

    def _enter(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = call_arguments(backbone, args, kwargs)
        tokens = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
        rows, length = tokens.shape[:2]
        own = self._pass
        own.before = open_before(inputs, rows, tokens.device)
        own.real = _real_tokens(inputs.get("attention_mask"), rows, length, tokens.device)
        _check_not_packed(inputs, own.real)
        own.open, own.outputs = None, {}

    def _decide(self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        own, hidden = self._pass, block_input(args, kwargs)
        if own.real is None or own.before is None or hidden is None:
            return
        if self.keys.device != hidden.device:
            self.keys, self.radii = self.keys.to(hidden.device), self.radii.to(hidden.device)
        with torch.no_grad():
            near = matches(hidden.detach().flatten(0, 1), self.keys, self.radii).view(hidden.shape[:2])
            own.open = opened_from(near & own.real.to(near.device), own.before.to(near.device))

    def _mark(self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Attach the state of the gate to the hidden states that enter a block.

        Gradient checkpointing recomputes the block from these hidden states, and needs the same state of the gate.
        """
        hidden = block_input(args, kwargs)
        if hidden is not None and self._pass.open is not None and self._pass.real is not None:
            setattr(hidden, _STATE, self._pass.open)

    def _recall(self, child: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        state = getattr(block_input(args, kwargs), _STATE, None)
        if state is not None:
            self._pass.open = state

    def _keep(self, base_layer: nn.Module, args: Any, output: Tensor) -> None:
        self._pass.outputs[id(base_layer)] = output

    def _choose(self, layer: Any, args: Any, kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        is_open, base = self._pass.open, self._pass.outputs.pop(id(layer.base_layer), None)
        if layer.merged:
            raise EditError(
                "the adapter is merged into the weights, so the gate has no effect; call unmerge_adapter()."
            )
        if kwargs.get("adapter_names") is not None:
            raise EditError(NO_NAMES)
        if is_open is None:
            raise EditError(
                "a layer with a gated adapter was called outside of a forward pass of the model; call the whole model, "
                "and if it uses gradient checkpointing, set "
                'gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        if base is None:
            raise EditError(
                f"an adapter layer of the PEFT class {type(layer).__name__!r} did not call its base layer, so the gate "
                "cannot switch off the adapter in this layer; use another version of peft."
            )
        if output.shape[:-1] != is_open.shape:
            raise EditError(
                f"the output of {type(layer).__name__} has the shape {list(output.shape)}, but a gate needs outputs of "
                "the shape [rows, positions, features]; choose other target_modules."
            )
        return torch.where(is_open.to(output.device)[..., None], output, base)

    def _leave(self, backbone: nn.Module, args: Any, output: Any) -> None:
        own = self._pass
        state, own.open, own.real, own.before = own.open, None, None, None
        if state is None:
            return
        own.opened_rows = state.any(dim=1)
        cache = read_cache(output)
        parts = output if cache is None and isinstance(output, tuple) else (cache,)
        for part in parts:
            add_open(part, state)


def _real_tokens(mask: Any, rows: int, length: int, device: torch.device) -> Tensor:
    """Return True for tokens and False for padding, [rows, positions], bool."""
    if mask is None:
        return torch.ones(rows, length, dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < length:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise EditError(f"a gated model needs attention_mask [rows, positions], got {shape}; pass a 2-D mask.")
    return mask[:, mask.shape[1] - length :].bool()


def _check_not_packed(inputs: Mapping[str, Any], real: Tensor) -> None:
    """Raise an error if a row contains several sequences, because the gate stays open to the end of its row."""
    positions = inputs.get("position_ids")
    packed = inputs.get("cu_seq_lens_q") is not None
    if isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[1] == real.shape[1]:
        both = real[:, 1:] & real[:, :-1]
        packed = packed or bool(((positions[:, 1:] <= positions[:, :-1]) & both).any())
    if packed:
        raise EditError("a gated adapter cannot read packed sequences; turn packing and padding_free off.")
