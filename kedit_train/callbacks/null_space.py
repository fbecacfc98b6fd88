"""NullSpace: let the weights move only in directions that hardly change the layer outputs on given texts."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.arguments import BOOLEAN, check_arguments, integer_from, optional, within
from kedit_train.callbacks.base import EditCallback
from kedit_train.core.drift.change_projection import ChangeProjection
from kedit_train.core.drift.factors_of_texts import factors_of_texts
from kedit_train.core.drift.linear_layers import LinearLayer, find_linear_layers
from kedit_train.core.drift.lora_factors import lora_pairs
from kedit_train.core.drift.model_batches import find_text_model, holds_model_inputs, model_input_batches
from kedit_train.core.drift.previous_inputs import PreviousInputs
from kedit_train.core.drift.remaining_moments import remaining_moments
from kedit_train.core.drift.second_moments import SecondMoment, broadcast_from_first, input_moments
from kedit_train.core.drift.sharded_projections import remove_preserved, remove_preserved_from_gradient
from kedit_train.core.drift.shards import total
from kedit_train.core.locality.consecutive_runs import continues_run, require_edits
from kedit_train.core.locality.neighbor_texts import neighbor_texts
from kedit_train.core.locality.texts import Texts, TextSource
from kedit_train.core.locality.token_sequences import tokenize_edits
from kedit_train.core.run import EditRun
from kedit_train.data import Edit, EditDataset
from kedit_train.errors import EditError
from kedit_train.functional.null_space import FreeSpace, free_space, join_directions, principal_directions
from kedit_train.functional.precision import wide
from kedit_train.paths import SAFETENSORS_PATH


class NullSpace(EditCallback):
    """Project the change of each weight so that the outputs of its layer on given texts stay the same.

    This is the null-space constraint of AlphaEdit, applied to fine-tuning. Before training, the model reads the texts
    once. For each weight in the scope, this gives a matrix U with orthonormal columns, the preserved directions. On the
    texts, the inputs of the layer lie mostly in the span of U (see ``energy``). After each optimizer step, the weight
    is set to ``W = W0 + (W - W0)(I - U Uᵀ)``, where W0 is the weight before the edit. For inputs in the span of U, the
    output of the layer then does not change.

    The whole change is projected, because under Adam a projected gradient alone does not keep the change orthogonal to
    U. Gradients are projected as well, so that Adam's statistics contain only directions in which the weight may move.

    ``(W - W0) U = 0`` is exact up to the rounding of the stored weights. ``edit/drift/null_space_leak`` is the fraction
    of the change that still lies in preserved directions. In fp32, this fraction is below 1e-5 for edits of ordinary
    size. ``ParameterScope`` trains bf16 and fp16 weights in fp32. Rounding these weights at the end of training adds an
    error of up to 1/256 of each weight. This error can be large relative to a small change.

    For LoRA layers, only the A factor is projected, so that ``B A U = 0``. The B factor is free. A is also projected
    before the first step. This does not change the model, because B is zero at that time. If only A or only B is in the
    scope, the change of this factor is projected like the change of any other weight.

    The projection is applied after ``LowCurvature`` and before ``NormBall`` and ``GradientMask``. With an L2 ball, the
    constraint remains exact up to rounding. With clipping (``NormBall(norm="linf")``) or a mask, the constraint is only
    approximate.

    Args:
        texts: a source of texts to preserve, or a :class:`Texts`. For a model that does not read text, pass a list with
            one item per forward pass. An item is a tensor, a tuple of positional arguments or a dict of keyword
            arguments.
        neighbors: number of additional prompts per edit for which the layer outputs are preserved. Each of them is a
            copy of the edited prompt in which a name from the texts replaces the subject
            (:func:`~kedit_train.data.neighbor_prompts.neighbor_prompts`). The edit then affects other subjects less.
            Edits without a subject get no such prompts. Default 0.
        energy: fraction of the energy of the layer inputs that the preserved directions contain, in (0, 1]. Default
            0.9. The energy is the mean squared norm of the inputs. A higher value preserves more behavior and leaves
            less freedom for the edit.
        preserve: previous edits (an ``EditDataset``, a list of ``Edit`` or a path to edits) or texts to preserve in
            addition to ``texts``. ``energy`` applies separately to each of these groups: ``texts``, the prompts of
            ``neighbors``, the texts in ``preserve``, and all earlier edits (those in ``preserve`` and those of earlier
            runs).
        sequential: whether consecutive runs of this callback object on one model preserve the edits of earlier runs. If
            a later run edits a prompt again, the earlier edit of this prompt is no longer preserved. Only the first run
            reads the texts. A later run only reads the edits of the run before it. If it edits a prompt again, it reads
            the edits of all earlier runs instead. A LoRA adapter cannot be trained in several runs.
        factors_path: a ``.safetensors`` file for the statistics of ``texts``. If the file exists, the statistics are
            read from it. If it does not exist, the statistics are computed and written to it. A file of
            ``LowCurvature`` can also be used. A file is valid only for the weights, texts and ``limit`` with which it
            was computed. Texts that contain evaluation prompts of the edits are left out, so other edits can need
            another file. With LoRA, no file can be used.
        limit: maximum number of texts to read. None (default) reads all texts.
        batch_size: number of sequences per forward pass before training. Default 8.

    Three metrics are logged:

    - ``edit/drift/null_space_rank``: mean number of preserved directions per weight.
    - ``edit/drift/null_space_share``: mean fraction of the input directions that are preserved.
    - ``edit/drift/null_space_leak``: ``|change U| / |change|`` over the whole scope.

    Raises:
        EditError: an argument is invalid; the scope contains parameters other than weights of ``nn.Linear``, ``Conv1D``
            or LoRA factors; an adapter is DoRA; or a weight has no direction left to move in.

    References:
        AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models, arXiv 2410.02355.

    Example:
        >>> import torch
        >>> from kedit_train import EditDataset, editing, world
        >>> from kedit_train.callbacks import NullSpace, ParameterScope
        >>> model, tokenizer = world.load()
        >>> edit = EditDataset.load("world", limit=1)[0]
        >>> batch = tokenizer(f"{edit.prompt} {edit.target}", return_tensors="pt")
        >>> callbacks = [ParameterScope(0.7, modules="mlp.down_proj.weight"), NullSpace("world", limit=64)]
        >>> with editing(model, callbacks, tokenizer=tokenizer, log_every_n_steps=1) as run:
        ...     optimizer = torch.optim.Adam(run.parameters(), lr=1e-3)
        ...     run.before_step()
        ...     model(**batch, labels=batch["input_ids"]).loss.backward()
        ...     optimizer.step()
        >>> run.history[-1]["edit/drift/null_space_leak"] < 1e-4
        True
    """

    # NullSpace comes after LowCurvature, because only the last projection is exact.
    order = 41
    constrains = True
    duplicate_hint: str | None = "a second projection undoes part of the first, so pass all texts to one NullSpace"

    def __init__(
        self,
        texts: TextSource | Texts,
        *,
        neighbors: int = 0,
        energy: float = 0.9,
        preserve: Any = None,
        sequential: bool = False,
        factors_path: str | Path | None = None,
        limit: int | None = None,
        batch_size: int = 8,
    ) -> None:
        check_arguments(
            self,
            neighbors=(neighbors, integer_from(0)),
            energy=(energy, within("(0, 1]")),
            factors_path=(factors_path, optional(SAFETENSORS_PATH)),
            limit=(limit, optional(integer_from(1))),
            batch_size=(batch_size, integer_from(1)),
            sequential=(sequential, BOOLEAN),
        )
        source = list(texts) if isinstance(texts, Iterator) else texts
        self.texts: Any = source if holds_model_inputs(source) else Texts.of(source)
        self.neighbors = neighbors
        self.energy = energy
        self.preserve = preserve
        self.sequential = sequential
        self.factors_path = factors_path
        self.limit, self.batch_size = limit, batch_size
        self._projection = ChangeProjection({}, {}, remove_preserved)
        self._previous = PreviousInputs()
        # The second moments of the texts in preserve.
        self._preserved: dict[str, SecondMoment] = {}
        # With sequential: the texts of the previous run, their second moments, and the directions of texts and edits.
        self._chosen: Sequence[str] | None = None
        self._text_moments: dict[str, SecondMoment] = {}
        self._of_texts: dict[str, Tensor] = {}
        self._of_previous: dict[str, Tensor] = {}
        self._model: weakref.ref[nn.Module] | None = None
        if isinstance(self.texts, Texts):
            return
        for name, value in (("neighbors", neighbors), ("factors_path", factors_path)):
            if value:
                raise EditError(
                    f"{name}={value!r} needs texts, but texts= contains model inputs; remove {name}.",
                    component="NullSpace",
                )

    def prepare(self, run: EditRun) -> None:
        if isinstance(self.texts, Texts):
            self.texts.check()
            find_text_model(run)

    def attach(self, run: EditRun) -> None:
        if self.sequential:
            require_edits(run, "sequential=True preserves the edits of this run during later runs")
        if self.neighbors:
            require_edits(run, f"neighbors={self.neighbors} replaces the subjects in the prompts of the edits")
        edits, texts = self._read_preserve()
        if not (self.sequential and continues_run(self._model, run)):
            self._previous, self._preserved = PreviousInputs(edits), {}
            self._of_texts, self._of_previous, self._chosen = {}, {}, None
        self._model = weakref.ref(run.model)
        layers = find_linear_layers(run.model, run.scope)
        pairs = lora_pairs(run, layers)
        if pairs and self.factors_path is not None:
            raise EditError(
                "factors_path cannot be used with LoRA, because the file fits only one random initialization of the "
                "adapter; remove factors_path."
            )
        layers = {name: layer for name, layer in layers.items() if name not in pairs.values()}
        directions = self._directions_of_texts(run, layers)
        if texts and not self._preserved:
            self._preserved = self._moments(run, layers, texts)
        earlier = self._previous.moments(run.edits, lambda edits: self._moments(run, layers, edits))
        # The moments of earlier edits change little between runs, so the directions of the last run are a good start.
        self._of_previous = self._directions(earlier, self._of_previous)
        neighbors = neighbor_texts(run, self.texts, self.neighbors) if self.neighbors else None
        of_neighbors = self._directions(self._moments(run, layers, neighbors)) if neighbors else {}
        for more in (self._directions(self._preserved), self._of_previous, of_neighbors):
            directions = {name: join_directions(d, more[name]) if more else d for name, d in directions.items()}
        spaces = self._free_spaces(run, directions)
        self._projection = ChangeProjection(layers, spaces, remove_preserved, remove_preserved_from_gradient)
        for name in pairs:
            _project_reference(run, name, spaces[name])
        self._projection.start(run.scope)

    def constrain(self, weights: dict[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._projection.constrain(weights, reference)

    def metrics(self, run: EditRun) -> dict[str, float]:
        spaces: list[FreeSpace] = list(self._projection.subspaces.values())
        if not spaces:
            return {}
        metrics = {
            "edit/drift/null_space_rank": sum(space.rank for space in spaces) / len(spaces),
            "edit/drift/null_space_share": sum(space.rank / space.basis.shape[0] for space in spaces) / len(spaces),
        }
        leak = self._projection.leak(run.scope, run.reference)
        return metrics if leak is None else {**metrics, "edit/drift/null_space_leak": leak}

    def state(self) -> dict[str, Any]:
        edits = [[edit.prompt, edit.target] for edit in self._previous.edits]
        return {"subspaces": self._projection.state(), "previous_edits": edits}

    def load_state(self, state: dict[str, Any]) -> None:
        # A resumed run cannot recompute the directions of previous edits, so it restores those of the original run. The
        # next run after a resumed run reads all previous edits again.
        self._projection.load_state(state["subspaces"])
        self._previous = PreviousInputs([Edit(prompt, target) for prompt, target in state["previous_edits"]])

    def finish(self, run: EditRun) -> None:
        if self.sequential:
            self._previous.finish(run.edits)

    def detach(self, run: EditRun) -> None:
        self._projection.stop()
        if not self.sequential:
            # The second moments are large, and a later run computes its own.
            self._previous, self._preserved = PreviousInputs(), {}

    def _directions_of_texts(self, run: EditRun, layers: Mapping[str, LinearLayer]) -> dict[str, Tensor]:
        """Return the directions to preserve for ``texts``. With ``sequential``, only the first run reads the texts."""
        if not self.sequential:
            return self._directions(self._moments(run, layers, self.texts, limit=self.limit, path=self.factors_path))
        if not self._of_texts:
            source = self.texts
            if isinstance(source, Texts):
                tokenizer = run.tokenizer(source.tokenizer)
                self._chosen = source.load(run.edits, limit=self.limit, tokenizer=tokenizer)
                source = replace(source, source=self._chosen, nearest=None)
            self._text_moments = self._moments(run, layers, source, path=self.factors_path)
            self._of_texts = self._directions(self._text_moments)
        elif self._of_texts.keys() != layers.keys():
            raise EditError("sequential=True needs the same scope in every run; create a new NullSpace for each scope.")
        elif self._chosen is not None:
            before = self._text_moments
            self._text_moments, self._chosen = remaining_moments(
                before, self._chosen, self.texts, run, lambda texts: self._moments(run, layers, texts, keep_leaks=True)
            )
            if self._text_moments is not before:
                self._of_texts = self._directions(self._text_moments)
        return self._of_texts

    def _moments(
        self,
        run: EditRun,
        layers: Mapping[str, LinearLayer],
        source: Any,
        *,
        limit: int | None = None,
        path: str | Path | None = None,
        keep_leaks: bool = False,
    ) -> dict[str, SecondMoment]:
        """Return the second moments of the layers' inputs on ``source`` (texts, edits or model inputs)."""
        if holds_model_inputs(source):
            batches = model_input_batches(source, next(run.model.parameters()).device)
            return input_moments(run, layers, run.language_model or run.model, batches)
        if isinstance(source, Texts):
            sequences = source.tokenize(run, edits=() if keep_leaks else None, limit=limit)
        else:
            settings = self._settings()
            sequences = tokenize_edits(run, source, run.tokenizer(settings.tokenizer), settings.max_length)
        return factors_of_texts(
            run, layers, sequences, seed=self._settings().seed, batch_size=self.batch_size, path=path, inputs_only=True
        ).inputs

    def _read_preserve(self) -> tuple[list[Edit], Any]:
        """Return the edits in ``preserve``, and the texts or model inputs in ``preserve``."""
        preserve = self.preserve
        if isinstance(preserve, str | Path):
            preserve = EditDataset.load(preserve)
        if not isinstance(preserve, Texts):
            preserve = list(preserve) if preserve is not None else []
            if not preserve or isinstance(preserve[0], Edit):
                return preserve, None
        if isinstance(preserve, Texts) or holds_model_inputs(preserve):
            return [], preserve
        return [], replace(self._settings(), source=preserve, nearest=None)

    def _settings(self) -> Texts:
        """Return the ``Texts`` whose settings are used to tokenize edits and ``preserve``."""
        return self.texts if isinstance(self.texts, Texts) else Texts([])

    def _directions(
        self, moments: Mapping[str, SecondMoment], start: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the directions to preserve for each weight, [d_in, rank] in fp64.

        ``start`` may contain the directions of an earlier run. If the moments have changed little since then, the
        computation is faster.
        """
        start = start or {}
        return {
            name: principal_directions(moment.mean, energy=self.energy, rank=moment.count, start=start.get(name))
            for name, moment in moments.items()
        }

    def _free_spaces(self, run: EditRun, directions: Mapping[str, Tensor]) -> dict[str, FreeSpace]:
        spaces = {}
        for name, basis in zip(directions, broadcast_from_first(list(directions.values())), strict=True):
            if basis.shape[1] >= basis.shape[0]:
                raise EditError(
                    f"all {basis.shape[0]} input directions of {name} are preserved, so the weight could not move; "
                    f"use a lower energy{', fewer neighbors' * bool(self.neighbors)} or a scope without this layer."
                )
            weight = run.scope[name]
            space = free_space(basis, torch.promote_types(weight.dtype, torch.float32))
            spaces[name] = space._replace(basis=space.basis.to(weight.device))
        return spaces

    def __repr__(self) -> str:
        return f"NullSpace(energy={self.energy}, neighbors={self.neighbors}, sequential={self.sequential})"


def _project_reference(run: EditRun, name: str, space: FreeSpace) -> None:
    """Replace the reference value of a LoRA A factor by its projection."""
    start = wide(run.reference[name])
    projected = remove_preserved(start, space)
    # A resumed run has a projected reference already. A second projection would change its last bits.
    rounding = max(1e-5, torch.finfo(run.reference[name].dtype).eps)
    if total([(start - projected).square()]) > rounding**2 * total([start.square()]):
        run.reference[name] = projected.to(run.reference[name].dtype)
