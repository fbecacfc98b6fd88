"""PrefixCache: run the frozen layers below the scope only once for each example, not in every epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kedit_train.arguments import check_arguments, integer_from, optional
from kedit_train.callbacks.base import EditCallback
from kedit_train.core.cache.hidden_state_store import HiddenStateStore, parse_bytes
from kedit_train.core.cache.layer_stack import find_prefix
from kedit_train.core.cache.prefix_cache import FrozenPrefix
from kedit_train.core.gate.gate import find_gate
from kedit_train.core.output_head import evaluation_mode
from kedit_train.core.reference_weights import check_stored
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError, warn
from kedit_train.paths import PATH


class PrefixCache(EditCallback):
    """Store the hidden states that enter the first trained layer, and skip the frozen layers below it.

    The scope contains the parameters that the run may change. The frozen layers below the scope compute the same hidden
    states for a token sequence in every epoch. ``PrefixCache`` stores these hidden states without padding. The key of a
    stored sequence consists of the token ids and the position of the first token. A stored sequence can therefore be
    used in shuffled batches, with other padding, in accumulated micro-batches and for the texts of ``KLLocality``.

    From the second epoch on, training is faster. If every epoch has the same batches, then losses and weights are bit
    for bit the same as without the cache. If batches are shuffled, then the padding differs, so losses and weights
    differ by rounding. Evaluation and generation do not use the cache.

    To find the frozen layers, ``PrefixCache`` observes one forward pass of the model. Before training, ``PrefixCache``
    checks that the logits with the cache and the logits without the cache are equal bit for bit.

    If all sequences of a batch are stored, the batch skips the frozen layers, and the model output contains no
    attention keys and values. If a sequence is not stored, all layers run for the whole batch.

    Some batches are always computed in full, and a warning names the reason. Possible reasons are packed sequences,
    attention masks that are not [B, S], ``inputs_embeds``, padding without ``labels``, and requests for the hidden
    states of every layer. The cache is also not used after a module or hook below the scope was added, removed or
    replaced.

    If a frozen weight or buffer is modified or replaced, ``PrefixCache`` detects the change before the next batch and
    empties the cache. In addition, after every ``recheck`` batches from the cache, one batch is computed in full and
    compared with the stored hidden states. Three changes are detected only by this comparison: a write with
    ``parameter.data.add_()``, a new value of a layer's Python attribute, and random numbers that a hook draws from its
    own generator. Between such a change and the next comparison, batches use outdated hidden states.

    Args:
        memory_limit: CPU memory for hidden states per process: a number of bytes, or a string such as "500MB" or
            "1.5GiB". A sequence takes ``tokens * hidden size`` values in the dtype of the layer outputs (2 bytes per
            value in bf16).
        cache_dir: directory for the hidden states that do not fit into ``memory_limit``. These files are deleted when
            training ends. With None, hidden states that do not fit are computed again in every epoch.
        recheck: after this number of batches from the cache, one batch is computed in full and compared with the stored
            hidden states. If the hidden states differ, a warning is issued and the cache is not used any more. 0
            disables the comparison.

    Raises:
        EditError: raised before the first step if caching is impossible: there is no frozen layer below the scope, a
            layer below the scope uses dropout or noise, the model uses ``torch.compile`` or sharded parameters, or a
            layer passes more than hidden states to the next layer.

    Example:
        >>> import torch
        >>> from kedit_train import editing, world
        >>> from kedit_train.callbacks import ParameterScope, PrefixCache
        >>> model, tokenizer = world.load()
        >>> batch = tokenizer("The capital of Norvia is Ostrel.", return_tensors="pt")
        >>> with editing(model, [ParameterScope(-1), PrefixCache()], log_every_n_steps=1) as edit:
        ...     optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-3)
        ...     for step in range(3):
        ...         edit.before_step()
        ...         model(**batch, labels=batch["input_ids"]).loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> [logs["edit/cache/hit_rate"] for logs in edit.history]
        [0.0, 1.0, 1.0]
    """

    # PrefixCache comes before all callbacks with a penalty, because its penalty() activates the cache for their forward
    # passes.
    order = 10
    duplicate_hint: str | None = "one PrefixCache serves every batch, so keep only one"

    def __init__(
        self, memory_limit: int | str = "1GB", *, cache_dir: str | Path | None = None, recheck: int = 100
    ) -> None:
        check_arguments(self, cache_dir=(cache_dir, optional(PATH)), recheck=(recheck, integer_from(0)))
        self.memory_limit = memory_limit
        self.cache_dir = cache_dir
        self.recheck = recheck
        self._bytes = parse_bytes(memory_limit, "PrefixCache")
        self._prefix: FrozenPrefix | None = None

    def prepare(self, run: EditRun) -> None:
        if run.language_model is None:
            # Raises the error that names the missing head.
            run.head()
        if self.cache_dir is not None and Path(self.cache_dir).is_file():
            raise EditError(f"cache_dir must be a directory, got the file {str(self.cache_dir)!r}; pass another path.")

    def attach(self, run: EditRun) -> None:
        model: Any = run.model
        check_stored(dict(model.named_parameters()))
        if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in run.root.modules()):
            raise EditError(
                "the model is compiled, and compiled layers cannot be skipped; remove torch.compile or PrefixCache."
            )
        trained = [p for p in run.root.parameters() if p.requires_grad]
        if not trained:
            raise EditError("no parameter is trainable; unfreeze the parameters that the run should train.")
        device = next(model.parameters()).device
        ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]], device=device) % model.get_input_embeddings().num_embeddings

        def forward() -> Any:
            return model(input_ids=ids).logits

        with evaluation_mode(model), run.host.forward_context():
            with torch.no_grad():
                prefix = find_prefix(model, trained, ids, forward)
            gate = find_gate(model)
            if gate is not None and gate.layer < prefix.cut:
                raise EditError(
                    f"the gate of the adapter reads the input of block {gate.layer}, but PrefixCache skips all blocks "
                    f"below block {prefix.cut}, the first trained block; remove PrefixCache, or set "
                    f"layer={prefix.cut} in GatedAdapter and put adapters only on block {prefix.cut} and higher blocks."
                )
            store = HiddenStateStore(self._bytes, None if self.cache_dir is None else Path(self.cache_dir))
            self._prefix = FrozenPrefix(model, prefix, store, self.recheck, lambda: run.reads_hidden_states)
            self._prefix.check_logits(forward)

    def penalty(self, run: EditRun) -> None:
        # The cache is active from the first step on. Before that, other callbacks run the model while they attach.
        if self._prefix is not None:
            self._prefix.active = True

    def after_step(self, run: EditRun) -> None:
        if self._prefix is not None and self._prefix.compiled:
            self._prefix.remove()
            self._prefix = None
            warn("the training loop compiles the model, so nothing is cached; remove torch.compile or PrefixCache.")

    def metrics(self, run: EditRun) -> dict[str, float]:
        """Return the fraction of sequences read from the cache since the last call, and totals of the run.

        The totals are the number of stored sequences, their bytes in memory and their bytes on disk. Further totals are
        the number of sequences that did not fit, the number of batches that could not use the cache, and the seconds
        saved.
        """
        prefix = self._prefix
        if prefix is None or not (prefix.sequences or prefix.bypassed):
            return {}
        values = {
            "edit/cache/sequences": float(len(prefix.store)),
            "edit/cache/memory_bytes": float(prefix.store.memory_bytes),
            "edit/cache/disk_bytes": float(prefix.store.disk_bytes),
            "edit/cache/sequences_left_out": float(prefix.store.left_out),
            "edit/cache/bypassed": float(prefix.bypassed),
            "edit/cache/seconds_saved": prefix.seconds_saved,
        }
        if prefix.sequences:
            values["edit/cache/hit_rate"] = prefix.served / prefix.sequences
        prefix.sequences = prefix.served = 0
        return values

    def detach(self, run: EditRun) -> None:
        if self._prefix is not None:
            self._prefix.remove()
            self._prefix = None

    def __repr__(self) -> str:
        return f"PrefixCache({self.memory_limit!r}, cache_dir={self.cache_dir!r}, recheck={self.recheck})"
