"""SubjectValues: train what each layer adds at the subject of each edit, and hardly change other outputs."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.arguments import BOOLEAN, above, check_arguments, integer_from, optional
from kedit_train.callbacks.polyak_step import PolyakStep
from kedit_train.core.cache.sequence_keys import hash_sequences
from kedit_train.core.drift.damped_moments import DampedMoments, naming_weight
from kedit_train.core.drift.factors_of_texts import check_no_adapters
from kedit_train.core.drift.linear_layers import LinearLayer, find_linear_layers
from kedit_train.core.drift.second_moments import broadcast_from_first
from kedit_train.core.drift.subject_keys import subject_keys
from kedit_train.core.fsdp import full_tensor, shard_like
from kedit_train.core.locality.consecutive_runs import continues_run, given_edits, readable_again
from kedit_train.core.locality.texts import Texts, TextSource
from kedit_train.core.run import EditRun
from kedit_train.core.scope.untrained_edits import UntrainedEdits
from kedit_train.data import EditDataset
from kedit_train.data.neighbor_prompts import has_subject
from kedit_train.data.tokenization import shorten
from kedit_train.errors import EditError, warn
from kedit_train.functional.adam import AdamAverages
from kedit_train.functional.dual_keys import distinctness, dual_keys
from kedit_train.functional.precision import full_precision, wide
from kedit_train.paths import SAFETENSORS_PATH

# This fraction of the mean divisor is added to the divisor of each value's gradient. An edit that is not in the batch
# has a gradient of nearly 0. Without this addition, the value of such an edit would move as far as the other values in
# the first steps.
_FLOOR = 0.3
# A key counts as shared by several edits if its inner product with its dual key is below this value. The inner product
# is 1 for a distinct key. Two equal keys have the same dual key, and the inner product is 0.5.
_SHARED = 0.75


class SubjectValues(PolyakStep):
    """Replace each optimizer step by a step that changes the layers' outputs mainly at the subjects of the edits.

    In the prompt "The mother tongue of Danielle Darrieux is", the subject is "Danielle Darrieux". A pretrained language
    model looks up what it knows about a subject at the last token of the subject. The input of a layer at this token is
    the *key* of the edit, and the change of the layer's output for this key is the *value* of the edit. This callback
    trains only the values: one vector per edit and layer. The weight changes by ``sum_i v_i a_iᵀ``, where v_i is the
    value of edit i, and a_i is its dual key (:func:`~kedit_train.functional.dual_keys.dual_keys`). The dual keys are
    computed once, before the first step. The inner product of a_i with the key of edit i is 1. Its inner products with
    all other keys are 0, and those with the layer's inputs on ``texts`` are small. So an edit hardly changes what the
    layer computes for other subjects, other edits and other texts.

    ROME, MEMIT and AlphaEdit also compute values. They optimize the value of one edit after the other, and then change
    the weights in closed form, outside of any training run. Here, the values are trained in your run, for all edits
    together, through the changed weights.

    After each optimizer step, the change that the optimizer made is discarded. Instead, each value takes a step against
    its gradient. The unit of a value is chosen so that a value of norm 1 changes the outputs on ``texts`` equally for
    every edit and layer. So an edit is mostly learned in those layers in which its key differs most from the layer's
    inputs on ``texts``. For each edit and layer, the gradient is divided by its root mean square over all steps. So the
    values of edits that are already learned change little. The length of the step follows from the loss, as in
    :class:`PolyakStep`, so no learning rate is needed.

    Other callbacks act as usual. A penalty such as ``KLLocality`` is part of the gradient. Constraints such as
    ``NullSpace``, ``NormBall`` and ``GradientMask`` are applied after the step.

    Use this callback only with a pretrained language model, and train layers in the first third of the network, such as
    ``ParameterScope("0.14-0.29")``. MEMIT and AlphaEdit change layers at the same depth. The small bundled model does
    not look up facts at the subject. The example below only shows the calls.

    Args:
        texts: a source of texts on which predictions should stay the same, or a :class:`Texts`. The second moments of
            the layers' inputs are computed on these texts.
        edits: the edits that are trained (a path, a list of ``Edit`` or an ``EditDataset``). None uses the edits of
            ``EditMetrics``, ``EditDataModule``, ``EditSFTTrainer`` or ``editing(edits=)``. If an edit has
            no subject, its key is the input at the token of its prompt that differs most from the texts. If the input
            at the subject hardly depends on the subject (an attention sink), a later token is chosen in the same way.
        step_size: how much each step should reduce the training loss, as a fraction of the loss, in (0, 1]. The
            reduction is predicted from the gradient. Default 0.15.
        damping: added to the diagonal of each second moment, after the second moment was divided by the median of its
            diagonal. A higher damping lets the outputs on ``texts`` change more. Default 1e-2.
        sequential: whether consecutive runs of this callback object on one model preserve the edits of earlier runs.
            The dual keys then also have the inner product 0 with the keys of earlier edits, except for earlier edits
            whose prompt is edited again. Only the first run reads the texts.
        factors_path: a ``.safetensors`` file for the second moments. If the file exists, the second moments are read
            from it. If not, the second moments are computed and written to it. A file is valid only for the weights and
            texts from which it was computed. A file of ``NullSpace`` can also be used.
        limit: maximum number of texts to read. None (default) reads all texts.
        batch_size: number of sequences per forward pass when the keys and the second moments are computed. Default 8.

    Two metrics are logged, ``edit/drift/subject_change`` and ``edit/drift/text_change``. Both are the root mean square
    change of the layers' outputs, divided by the root mean square of the outputs before the edit. The first metric is
    measured at the subjects of the edits, and the second metric on ``texts``.

    Raises:
        EditError: an argument is invalid; the edits of the run are unknown; no callback computes the loss (add
            ``TokenLoss``); or the scope contains parameters other than weights of ``nn.Linear`` and ``Conv1D``.

    References:
        "Locating and Editing Factual Associations in GPT", arXiv 2202.05262 (ROME). "Mass-Editing Memory in a
        Transformer", arXiv 2210.07229 (MEMIT). "AlphaEdit: Null-Space Constrained Knowledge Editing for Language
        Models", arXiv 2410.02355. "MoMo: Momentum Models for Adaptive Learning Rates", arXiv 2305.07583, for Polyak's
        step size.

    Example:
        >>> import torch
        >>> from kedit_train import EditDataset, editing, world
        >>> from kedit_train.callbacks import ParameterScope, SubjectValues, TokenLoss
        >>> model, tokenizer = world.load()
        >>> edits = EditDataset.load("world", limit=1)
        >>> batch = tokenizer(f"{edits[0].prompt} {edits[0].target}", return_tensors="pt")
        >>> callbacks = [
        ...     ParameterScope("0.2-0.5", modules="mlp.down_proj.weight"),
        ...     TokenLoss("cross_entropy"),
        ...     SubjectValues("world", edits=edits, limit=64),
        ... ]
        >>> losses = []
        >>> with editing(model, callbacks, tokenizer=tokenizer) as run:
        ...     optimizer = torch.optim.SGD(run.parameters(), lr=1.0)
        ...     for _ in range(2):
        ...         run.before_step()
        ...         losses.append(model(**batch, labels=batch["input_ids"]).loss)
        ...         losses[-1].backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> bool(losses[1] < losses[0])
        True
    """

    duplicate_hint: str | None = "the second one would replace the step of the first, so keep only one"

    def __init__(
        self,
        texts: TextSource | Texts,
        *,
        edits: Any = None,
        step_size: float = 0.15,
        damping: float = 1e-2,
        sequential: bool = False,
        factors_path: str | Path | None = None,
        limit: int | None = None,
        batch_size: int = 8,
    ) -> None:
        super().__init__(step_size)
        check_arguments(
            self,
            damping=(damping, above(0)),
            sequential=(sequential, BOOLEAN),
            factors_path=(factors_path, optional(SAFETENSORS_PATH)),
            limit=(limit, optional(integer_from(1))),
            batch_size=(batch_size, integer_from(1)),
        )
        self.texts: Texts = Texts.of(texts)
        self.edits: Any = readable_again(edits)
        self.damping = damping
        self.sequential = sequential
        self.factors_path = factors_path
        self.limit = limit
        self.batch_size = batch_size
        self._layers: dict[str, LinearLayer] = {}
        # For each weight: keys and scaled dual keys, [n, d_in].
        self._keys: dict[str, Tensor] = {}
        self._duals: dict[str, Tensor] = {}
        self._moments = self._new_moments()
        # The squared outputs before the edit: their sum over the subjects, and their mean per token of the texts.
        self._outputs = (0.0, 0.0)
        self._source_hash = ""
        # In a sequence of runs: the keys of earlier edits (prompt -> weight -> [d_in]).
        self._earlier: dict[str, dict[str, Tensor]] = {}
        self._prompts: list[str] = []
        self._untrained_edits: UntrainedEdits | None = None
        self._model: weakref.ref[nn.Module] | None = None

    def prepare(self, run: EditRun) -> None:
        run.causal_model()
        self.texts.check()
        if self.edits is not None:
            run.edits = run.edits or EditDataset.of(self.edits)

    def attach(self, run: EditRun) -> None:
        edits = list(given_edits(run, self.edits))
        if without := sum(not has_subject(edit) for edit in edits):
            warn(
                f"{without} of {len(edits)} edits have no subject in their prompt. They are trained at another token "
                "of the prompt, so rephrased prompts will seldom get the new answer; set Edit(subject=) to the name of "
                "the thing that the edit is about, as it is written in the prompt."
            )
        self._layers = find_linear_layers(run.model, run.scope)
        check_no_adapters(self._layers)
        self._prompts = [edit.prompt for edit in edits]
        if self.sequential and continues_run(self._model, run):
            self._moments.continue_with(run, self._layers)
            # A prompt that is edited again must not keep its earlier answer.
            self._earlier = {prompt: keys for prompt, keys in self._earlier.items() if prompt not in self._prompts}
        else:
            # Attributes such as texts may have changed since the callback was created.
            self._moments, self._earlier = self._new_moments(), {}
            self._moments.read(run, self._layers)
        self._model = weakref.ref(run.model)
        tokenizer = run.tokenizer(self.texts.tokenizer)
        # With sequential, the checkpoint contains the dual keys, because the weights before the first run are not known
        # in a new process.
        source = self._prompts if self.sequential else (*self._moments.chosen, *self._prompts)
        self._source_hash = hash_sequences([list(text.encode()) for text in source])
        self._keys = subject_keys(
            run,
            self._layers,
            edits,
            tokenizer,
            distinctness=lambda name, keys: distinctness(keys, self._moments.damped(run, name)),
            batch_size=self.batch_size,
        )
        self._compute_duals()
        if not self.sequential:
            self._moments.free_factors()
        if self.edits is not None:
            self._untrained_edits = UntrainedEdits(run, tokenizer, edits, "SubjectValues")
        self._outputs = self._squares({name: full_tensor(wide(run.reference[name])) for name in self._layers})
        super().attach(run)

    def new_averages(self) -> AdamAverages:
        # Within a value, the direction of the gradient is kept: with one average per entry, as in Adam, values become
        # larger, and more of the other answers change.
        return AdamAverages(momentum=0.0, by_column=True, floor=_FLOOR)

    def coordinates(self, name: str, gradient: Tensor) -> Tensor:
        """Return the gradient of the values, [d_out, n]. It is not sharded."""
        matrix = full_tensor(self._layers[name].as_matrix(gradient))
        with full_precision(matrix.device.type):
            return matrix @ self._duals[name].T

    def change(self, name: str, direction: Tensor) -> Tensor:
        with full_precision(direction.device.type):
            change = self._layers[name].as_matrix(direction @ self._duals[name])
        return shard_like(change, self.run.scope[name])

    def metrics(self, run: EditRun) -> dict[str, float]:
        if not self._layers:
            return {}
        changes = {n: full_tensor(wide(run.scope[n].detach()) - wide(run.reference[n])) for n in self._layers}
        parts = zip(("subject_change", "text_change"), self._squares(changes), self._outputs, strict=True)
        # Rounding can make a square on the texts slightly negative.
        return {f"edit/drift/{n}": max(0.0, moved / whole) ** 0.5 for n, moved, whole in parts if whole > 0.0}

    def _new_moments(self) -> DampedMoments:
        return DampedMoments(
            self.texts, damping=self.damping, path=self.factors_path, limit=self.limit, batch_size=self.batch_size
        )

    def _squares(self, weights: Mapping[str, Tensor]) -> tuple[float, float]:
        """Return the squared outputs of the layers: the sum over the subjects, and the mean per token of the texts."""
        at_subjects = on_texts = 0.0
        for name, layer in self._layers.items():
            weight = layer.as_matrix(weights[name])
            at_subjects += float((weight @ self._keys[name].T).square().sum())
            on_texts += float((weight @ self._moments.mean(name).to(weight) * weight).sum())
        return at_subjects, on_texts

    def state(self) -> dict[str, Any]:
        state = {**super().state(), "keys": {"source": self._source_hash, "damping": self.damping}}
        if self.sequential:
            state["duals"] = dict(self._duals)
            state["earlier"] = {prompt: dict(keys) for prompt, keys in self._earlier.items()}
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        if state.get("keys") != {"source": self._source_hash, "damping": self.damping}:
            raise EditError(
                "the checkpoint was written with other texts, edits or damping; resume with the texts, limit=, edits "
                "and damping= of the run that wrote the checkpoint, or start a new run."
            )
        super().load_state(state)
        if self.sequential:
            device = next(iter(self._keys.values())).device
            self._duals = {name: duals.to(device, copy=True) for name, duals in state["duals"].items()}
            self._earlier = {
                prompt: {name: key.to(device, copy=True) for name, key in keys.items()}
                for prompt, keys in state["earlier"].items()
            }

    def finish(self, run: EditRun) -> None:
        if self.sequential:
            for i, prompt in enumerate(self._prompts):
                self._earlier[prompt] = {name: keys[i] for name, keys in self._keys.items()}

    def detach(self, run: EditRun) -> None:
        super().detach(run)
        if self._untrained_edits is not None:
            self._untrained_edits.stop()
            self._untrained_edits = None
        self._layers, self._keys, self._duals = {}, {}, {}
        if not self.sequential:
            self._moments, self._earlier = self._new_moments(), {}

    def _compute_duals(self) -> None:
        products: list[Tensor] = []
        for name, keys in self._keys.items():
            # Each dual key has the inner product 0 with the keys of earlier edits, too.
            rows = torch.stack([*keys, *(earlier[name] for earlier in self._earlier.values())])
            with naming_weight(name):
                duals, changes = dual_keys(rows, self._moments.damped(self.run, name))
            products.append((duals * rows).sum(dim=1)[: len(keys)])
            # With this scale, steps of equal length change the outputs on the texts equally, for every edit and layer.
            # The layout in memory is that of a tensor read from a checkpoint, because products depend on it.
            own = (duals / changes[:, None])[: len(keys)].contiguous()
            # Every process must take the same step, but the last bits of a solution may differ between processes.
            (self._duals[name],) = broadcast_from_first([own])
        # In every run of a sequence, the keys of the first layer are the same. Earlier runs change the keys above it.
        self._warn_of_shared_keys(products[0] < _SHARED)

    def _warn_of_shared_keys(self, shared: Tensor) -> None:
        if count := int(shared.sum()):
            first = self._prompts[int(shared.nonzero()[0])]
            warn(
                f"{count} of {len(self._prompts)} edits (the first: {shorten(first)!r}) have nearly the same keys "
                "(layer inputs at the subject) as other edits of this run or of earlier runs, so these edits are not "
                "learned independently. Either their prompts have the same subject and begin alike, or there are too "
                "many edits for these layers; train such edits with another callback, for example PolyakStep."
            )

    def __repr__(self) -> str:
        return f"SubjectValues(step_size={self.step_size}, damping={self.damping})"
