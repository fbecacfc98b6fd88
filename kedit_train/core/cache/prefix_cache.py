"""Frozen layers run once for each example: their hidden states are stored by content and the layers passed over.

A pre-hook on the backbone knows each row by its token ids and its first position. Where every row of a batch has been
met, the layers below the cut pass on what was stored; else they run, and a pre-hook on the first layer that has to run
stores what reaches it. Without gradients (evaluation, generation) nothing is touched.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.core.cache.hidden_state_store import RowStore
from kedit_train.core.cache.layer_stack import Prefix, PrefixState, arguments
from kedit_train.core.cache.sequence_keys import Rows, read_rows
from kedit_train.errors import EditError


@dataclass
class _Call:
    """One forward pass: its rows, what was stored of them, the random generators at its start, and since when.

    ``hidden`` [B, S, d] is there where the layers are passed over, ``stored`` where they run and are compared with it.
    """

    rows: Rows
    hidden: Tensor | None
    noise: list[Tensor]
    started: float
    stored: list[Tensor] | None = None


class FrozenPrefix:
    """Hooks that pass over the layers of ``prefix`` where ``store`` has their result.

    Args:
        model: the causal language model in which the prefix was found.
        prefix: what never changes.
        store: where the rows of hidden states go, [tokens, d] each, in the dtype that flows there.
        recheck: after so many batches that were served, the next one runs in full and is compared; 0 never does.
        masked: whether the forward pass that is running is read at real tokens only, although it has no labels.

    Attributes:
        active: until this is set, nothing is touched.
        asked, served: rows of forward passes with gradients, and those of them for which no frozen layer ran.
        bypassed: forward passes that had to be computed in full for what they asked.
        seconds_saved: estimated by what the prefix took a token when it ran.
        compiled: a forward pass was traced by torch.compile, where nothing is cached.
    """

    def __init__(
        self, model: nn.Module, prefix: Prefix, store: RowStore, recheck: int, masked: Callable[[], bool]
    ) -> None:
        self.model, self.prefix, self.store, self.recheck, self._masked = model, prefix, store, recheck, masked
        self.asked = self.served = self.bypassed = 0
        self.active, self.seconds_saved, self.compiled = False, 0.0, False
        self._cost = [0.0, 0]
        self._call: _Call | None = None
        # Of the calls of the model that are running: a loss head may call it again within.
        self._labels: list[Tensor | None] = []
        self._inert = self._proving = self._stale = False
        self._unchecked = 0
        self._warned: set[str] = set()
        self._replaced: list[tuple[nn.Module, Any]] = []
        self._state = PrefixState(model, prefix)
        self._adapters = [m for m in prefix.modules if hasattr(m, "active_adapters") and hasattr(m, "disable_adapters")]
        self._handles = [
            # Before a loss head takes the labels out of the call.
            model.register_forward_pre_hook(self._note, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._forget_labels, always_call=True),
            prefix.backbone.register_forward_pre_hook(self._enter, with_kwargs=True),
            prefix.layers[prefix.cut].register_forward_pre_hook(self._arrive),
            # Also after a forward that failed, so that the next one finds the layers as they were.
            prefix.backbone.register_forward_hook(self._leave, always_call=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        # A copied or pickled model takes its hooks along; there they do nothing.
        return {"_inert": True, "_call": None, "_labels": [], "compiled": False, "_replaced": []}

    def remove(self) -> None:
        """Take the hooks off the model and forget every row."""
        for handle in self._handles:
            handle.remove()
        self.store.close()

    @torch.no_grad()
    def prove(self, forward: Callable[[], Tensor]) -> None:
        """Check that the logits [B, S, V] of ``forward`` are the same, bit for bit, when the layers are passed over.

        Raises:
            EditError: they are not, so something above the cut reads more of the prefix than its hidden states.
        """
        kept, self.store = self.store, RowStore(1 << 30)
        plain, before = forward(), self.served
        self._proving = True
        try:
            logits = [forward(), forward()]
        finally:
            self._proving, self.store = False, kept
        passed_over = self.served > before
        self.asked = self.served = self._unchecked = 0
        self.seconds_saved, self._cost = 0.0, [0.0, 0]
        if not passed_over or not all(_same_bits(plain, x) for x in logits):
            raise EditError(
                f"PrefixCache: the logits of {type(self.model).__name__} are not the same without the layers below "
                f"{self.prefix.cut}, so something above reads more of them than their hidden states; leave PrefixCache "
                "out"
            )

    # -- one forward pass

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._inert and not torch.compiler.is_compiling():
            self._labels.append(kwargs.get("labels"))

    def _forget_labels(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._labels:
            self._labels.pop()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._inert:
            return
        if torch.compiler.is_compiling():
            self.compiled = True
            return
        if not (self._proving or (self.active and torch.is_grad_enabled())):
            return
        if torch._C._current_graph_task_id() != -1:
            raise EditError(
                "PrefixCache: the whole backbone is computed again in the backward pass (activation checkpointing "
                "around all layers at once); checkpoint layer by layer, as transformers does, or leave PrefixCache out"
            )
        if self._stale:
            self.bypassed += 1
            return
        given = arguments(module, args, kwargs)
        rows = self._read(given, self._labels[-1] if self._labels else None)
        if isinstance(rows, str):
            self.bypassed += 1
            self._say(f"a batch is computed in full: {rows}")
            return
        self._check_weights()
        started, device = time.perf_counter(), given["input_ids"].device
        stored = self.store.get(rows.keys)
        self.asked += len(rows.keys)
        if stored is None or 0 < self.recheck <= self._unchecked:
            self._call = _Call(rows, None, _generators(device), started, stored)
        else:
            self._unchecked += 1
            self.served += len(rows.keys)
            hidden = self._assemble(rows, stored, device)
            self._call = _Call(rows, hidden, [], started)
            self._pass_over(hidden)

    def _arrive(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        call, self._call = self._call, None
        if call is None:
            return
        tokens = call.rows.shape.numel()
        if call.hidden is not None:
            cost = self._cost[0] / self._cost[1] * tokens if self._cost[1] else 0.0
            self.seconds_saved += cost - (time.perf_counter() - call.started)
            return
        hidden: Tensor = args[0].detach()
        if not all(map(torch.equal, call.noise, _generators(hidden.device))):
            raise EditError(
                f"PrefixCache: a random number was drawn below layer {self.prefix.cut} (dropout, noise on embeddings), "
                "so hidden states differ from epoch to epoch; set it to 0 there, or leave PrefixCache out"
            )
        # Waits for the device, so that the time is the prefix's; keys were read from it just before.
        hidden = hidden.cpu()
        self._cost = [self._cost[0] + time.perf_counter() - call.started, self._cost[1] + tokens]
        if call.stored is not None:
            self._compare(call, hidden)
            return
        left_out = self.store.left_out
        self.store.add({k: row[span] for k, row, span in zip(call.rows.keys, hidden, call.rows.spans, strict=True)})
        if self.store.left_out > left_out:
            self._say(
                f"its limit of memory is reached with {len(self.store)} rows; batches with any other row are "
                "computed in full: raise memory=, or name a folder= for the rest"
            )

    def _compare(self, call: _Call, hidden: Tensor) -> None:
        """Give up where what has run [B, S, d] is not what was stored, up to the rounding of other padding."""
        self._unchecked = 0
        tolerance = self._tolerance(hidden)
        for span, row, stored in zip(call.rows.spans, hidden, call.stored or (), strict=True):
            if row[span].shape[0] == 0:
                continue
            now, then = row[span].float(), stored.float()
            # Of the tokens' the median: rounding may send single ones to other experts.
            apart = ((now - then).norm(dim=-1) / then.norm(dim=-1).clamp(min=1e-30)).median()
            if not float(apart) <= tolerance:
                self._stale = True
                self.store.clear()
                self._say(
                    f"what enters layer {self.prefix.cut} is no longer what was stored for the same rows, so something "
                    "below changed unseen (parameter.data.add_(), an attribute, random numbers of its own); all is "
                    "forgotten and nothing is cached any more, but batches served since the last recheck had old rows"
                )
                return

    def _tolerance(self, hidden: Tensor) -> float:
        kind = self.model.get_parameter(next(iter(self.prefix.parameters))).device.type
        dtypes = [hidden.dtype, *([torch.get_autocast_dtype(kind)] if torch.is_autocast_enabled(kind) else [])]
        # TF32 and the like round more than fp32 does.
        return max(1e-3, *(torch.finfo(dtype).eps ** 0.5 for dtype in dtypes))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._call = None
        if self._replaced and getattr(output, "past_key_values", None) is not None:
            # It lacks what the layers passed over would have put there.
            output.past_key_values = None
        while self._replaced:
            layer, own = self._replaced.pop()
            layer.__dict__.pop("forward", None)
            if own is not None:
                layer.__dict__["forward"] = own

    def _pass_over(self, hidden: Tensor) -> None:
        def enter(given: Tensor, *_: Any, **__: Any) -> Tensor:
            # Where embeddings are made to require a gradient, reentrant checkpointing above depends on it.
            return hidden.requires_grad_() if given.requires_grad else hidden

        for i, layer in enumerate(self.prefix.layers[: self.prefix.cut]):
            self._replaced.append((layer, layer.__dict__.get("forward")))
            layer.__dict__["forward"] = enter if i == 0 else _pass_on

    @staticmethod
    def _assemble(rows: Rows, stored: list[Tensor], device: torch.device) -> Tensor:
        """Hidden states [B, S, d], zero where there is padding."""
        shape = (*rows.shape, stored[0].shape[-1])
        hidden = torch.zeros(shape, dtype=stored[0].dtype, pin_memory=device.type == "cuda")
        for target, row, span in zip(hidden, stored, rows.spans, strict=True):
            target[span] = row
        return hidden.to(device, non_blocking=True)

    # -- what a row is known by

    def _read(self, given: dict[str, Any], labels: Tensor | None) -> Rows | str:
        if not self._state.whole():
            return f"a module or a hook below layer {self.prefix.cut} was added, removed or replaced"
        if self._state.trained():
            return f"a parameter below layer {self.prefix.cut} requires a gradient"
        if "input_ids" not in given:
            return "the backbone was called without input_ids"
        config = getattr(self.prefix.backbone, "config", None)
        return read_rows(given, labels, self._masked(), config, self._mode(given["input_ids"].device))

    def _mode(self, device: torch.device) -> bytes:
        """What else hidden states depend on: precision, adapters switched on, modules in training or evaluation."""
        kind = device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        adapters: list[Any] = [
            (m.disable_adapters, m.active_adapters, getattr(m, "scaling", None)) for m in self._adapters
        ]
        return f"{autocast} {adapters}".encode() + bytes(m.training for m in self.prefix.modules)

    # -- what must not change

    def _check_weights(self) -> None:
        changed = self._state.written()
        if changed is not None:
            self.store.clear()
            self._say(f"{changed} was written to, although it is frozen; what was stored is computed again")

    def _say(self, what: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"PrefixCache: {what}", stacklevel=2)


def _pass_on(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden


def _generators(device: torch.device) -> list[Tensor]:
    """The states of the random generators that a module on this device draws from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
