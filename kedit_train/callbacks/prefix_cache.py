"""Nothing but time: what is frozen below the scope is computed once for each example."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from kedit_train.callbacks.base import EditCallback
from kedit_train.core.cache.hidden_state_store import RowStore, parse_bytes
from kedit_train.core.cache.layer_stack import find_prefix
from kedit_train.core.cache.prefix_cache import FrozenPrefix
from kedit_train.core.output_head import evaluation_mode
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError


class PrefixCache(EditCallback):
    """Keep the hidden states that enter the first layer with anything to train, and run the layers below it no more.

    The layers below the scope give a row of tokens the same hidden states in every epoch. They are stored by content
    (token ids, first position), without padding, so they serve shuffled batches, other padding, accumulated
    micro-batches, and the texts of ``KLLocality``. Batches that are the same in every epoch give losses and weights
    that are the same bit for bit; shuffled ones the same within the rounding that other padding brings. Evaluation and
    generation are left as they are. The layers are found by watching the model run, and at the start it is checked
    that its logits are the same, bit for bit, without them.

    An error says so where storing would be wrong: nothing is frozen below the scope, dropout or noise below it,
    ``model.compile()``, sharded parameters, a model whose layers do more than hand hidden states on. A warning says so
    where single batches have to be computed in full: packed rows, masks that are not [B, S], ``inputs_embeds``,
    requests for hidden states of every layer, padding without ``labels=``, modules or hooks that come or go below.
    Frozen weights and buffers that somebody writes to or replaces are noticed at once and everything stored is
    forgotten. What leaves no trace (``parameter.data.add_()``, an attribute, random numbers of a hook's own generator)
    is noticed by the recheck only: until then batches are served what was stored before. A batch is served when all of
    its rows are stored: it is worth a second epoch, and memory for all rows (``tokens * d`` numbers). No keys and
    values are returned with a batch that is served.

    Args:
        memory: for hidden states, on the CPU, for each process: bytes, "500MB" or "1.5GiB".
        folder: where hidden states beyond that go, removed when training ends; None computes them again.
        recheck: after so many batches that were served, the next one is computed in full and compared with what is
            stored; if it differs, a warning says so and nothing is cached for the rest of the run. 0 never does.

    Example:
        >>> SFTTrainer(model, args, train_dataset=data, callbacks=[ParameterScope(layers=0.7), PrefixCache()])
    """

    # Its penalty comes before others', whose forward passes it serves.
    order = 10
    single = "one holds the rows of every batch: keep one"

    def __init__(self, memory: int | str = "1GB", folder: str | None = None, recheck: int = 100) -> None:
        self.memory, self.folder, self.recheck = memory, folder, recheck
        self._bytes = parse_bytes(memory)
        self._prefix: FrozenPrefix | None = None
        if recheck < 0:
            raise EditError(f"PrefixCache: recheck={recheck!r} is below 0; give a number of batches, or 0 for never")

    def prepare(self, run: EditRun) -> None:
        if run.language_model is None:
            run.head()
        if self.folder is not None and Path(self.folder).is_file():
            raise EditError(f"PrefixCache: folder={self.folder!r} is a file; name a folder")

    def attach(self, run: EditRun) -> None:
        model: Any = run.model
        if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in run.root.modules()):
            raise EditError(
                "PrefixCache: the model is compiled, and layers that are compiled cannot be passed over; leave "
                "torch.compile or PrefixCache out"
            )
        trained = [p for p in run.root.parameters() if p.requires_grad]
        if not trained:
            raise EditError("PrefixCache: nothing is trained, so there is no first layer to begin at; widen the scope")
        device = next(model.parameters()).device
        ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]], device=device) % model.get_input_embeddings().num_embeddings

        def forward() -> Any:
            return model(input_ids=ids).logits

        with evaluation_mode(model), run.host.forward_context():
            with torch.no_grad():
                prefix = find_prefix(model, trained, ids, forward)
            store = RowStore(self._bytes, None if self.folder is None else Path(self.folder))
            self._prefix = FrozenPrefix(model, prefix, store, self.recheck, lambda: _masked(run))
            self._prefix.prove(forward)

    def penalty(self, run: EditRun) -> None:
        # From the first step on: what callbacks run when they attach would otherwise depend on the order of the list.
        if self._prefix is not None:
            self._prefix.active = True

    def after_step(self, run: EditRun) -> None:
        if self._prefix is not None and self._prefix.compiled:
            self._prefix.remove()
            self._prefix = None
            warnings.warn(
                "PrefixCache: the loop compiles the model, so nothing is cached; leave one of the two out",
                stacklevel=2,
            )

    def metrics(self, run: EditRun) -> dict[str, float]:
        """Share of rows served since the last call; rows, bytes, batches in full and seconds saved until now."""
        prefix = self._prefix
        if prefix is None or not (prefix.asked or prefix.bypassed):
            return {}
        found = {
            "edit/cache/rows": float(len(prefix.store)),
            "edit/cache/memory_bytes": float(prefix.store.memory_bytes),
            "edit/cache/disk_bytes": float(prefix.store.disk_bytes),
            "edit/cache/rows_left_out": float(prefix.store.left_out),
            "edit/cache/bypassed": float(prefix.bypassed),
            "edit/cache/seconds_saved": prefix.seconds_saved,
        }
        if prefix.asked:
            found["edit/cache/hit_rate"] = prefix.served / prefix.asked
        prefix.asked = prefix.served = 0
        return found

    def detach(self, run: EditRun) -> None:
        if self._prefix is not None:
            self._prefix.remove()
            self._prefix = None

    def __repr__(self) -> str:
        return f"PrefixCache(memory={self.memory!r}, folder={self.folder!r}, recheck={self.recheck})"


def _masked(run: EditRun) -> bool:
    """Whether a callback is running the model for what its head reads, of which it takes the real tokens."""
    return run.reads_hidden_states
