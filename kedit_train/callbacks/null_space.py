"""How far may weights move? Not at all along the inputs that given texts send through them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kedit_train.callbacks.base import EditCallback
from kedit_train.core.drift.gradient_projection import project_gradients
from kedit_train.core.drift.linear_layers import LinearMap, linear_maps
from kedit_train.core.drift.second_moments import (
    Batch,
    holds_model_inputs,
    input_moments,
    own_batches,
    same_everywhere,
    share,
    text_batches,
    text_model,
)
from kedit_train.core.locality.consecutive_runs import check_known, goes_on
from kedit_train.core.locality.texts import Texts, TextSource, edit_rows
from kedit_train.core.run import EditRun
from kedit_train.data import Edit, EditDataset
from kedit_train.errors import EditError
from kedit_train.functional.null_space import FreeSpace, free_space, join_directions, principal_directions, project_free
from kedit_train.functional.precision import wide


class NullSpace(EditCallback):
    """After every optimizer step, take out of the whole change what acts on the inputs of given texts.

    The null-space constraint of AlphaEdit (arXiv 2410.02355) for fine-tuning. The unedited model reads the texts once;
    of what each scoped weight multiplies, the directions U that hold ``keep_energy`` of its second moment are kept, and
    each step ends with ``W = W0 + (W - W0)(I - U Uᵀ)``. Projecting gradients instead leaks under Adam, whose step
    divides entry by entry; the difference itself is exact for every optimizer, weight decay included. Gradients are
    projected as well, so that Adam's scales are those of what may move.

    What holds: ``(W - W0) U = 0`` up to the rounding of the stored weights (``edit/drift/null_space_leak``), which in
    fp32 is below 1e-5 of the change for edits of ordinary size. A scope in bf16 or fp16 is trained in fp32 by
    ``ParameterScope``; rounding it at the end leaves 1/256 of each weight, which may be much of a small change.

    Of LoRA, A is projected, so that ``B A U = 0``: before the first step as well, which changes nothing, since B is
    zero there; B is free. With A alone or B alone in the scope, that factor's change is projected like any weight's.
    DoRA is refused: its norms move with every input.

    Together with others: comes before ``NormBall`` and ``GradientMask``. An L2 ball keeps the null space up to
    rounding; clipping ("linf") and masks do not, and what is left is approximate (see the metric).

    Args:
        texts: as of ``KLLocality``; or a list of the model's own inputs (tensors, tuples or mappings of them), for
            modules that read no text.
        keep_energy: share of the inputs' energy that is preserved, in (0, 1]. Of 0.5, 0.8, 0.9 and 0.95, 0.9 is the
            most with which a model of real facts (factlm in tests/benchmarks/constraints.py) learned as many edits as
            without, and it kept 10 points more of the locality; 0.95 learned fewer and kept more. Look at
            ``edit/drift/null_space_rank``: where a model sends a few directions of great size through a layer (first
            tokens), they alone may hold it.
        rank: preserve this many directions of each weight instead.
        preserve: earlier edits (an ``EditDataset``, a sequence of ``Edit``, or a path that ``EditDataset.load`` reads)
            or a list of texts, whose inputs are preserved beside those of ``texts``, by ``keep_energy`` of their own.
        sequential: after each run, add its edits to ``preserve`` for the next run of this instance on the same model;
            a later edit of the same prompt supersedes the earlier one.
        samples: the most texts to read; None reads all. Fewer tokens than a weight has inputs leave the rest free.
        batch_size: texts read together.
        max_length: tokens a text; longer ones are cut into several, none is cut off.
        tokenizer: an object, a name or a path; by default the host's, else the one saved with the model.
        seed: of which ``samples`` are drawn.

    Costs once a pass over the texts and an eigendecomposition [d_in, d_in] in fp64 for each weight; per step
    4 d_out d_in min(rank, d_in - rank) operations.

    Raises:
        EditError: the scope holds anything but weights of ``nn.Linear``, ``Conv1D`` or LoRA factors (ParameterScope
            with ``modules="....weight"`` leaves biases out), a weight is sharded, or nothing would be free to move.
    """

    # After LowCurvature, so that it is the exact one of the two.
    order = 41
    constrains = True
    single = "projecting twice undoes part of the first: give one of them all texts"

    def __init__(
        self,
        texts: TextSource | Texts,
        keep_energy: float = 0.9,
        rank: int | None = None,
        preserve: Any = None,
        sequential: bool = False,
        samples: int | None = None,
        batch_size: int = 8,
        max_length: int = 256,
        tokenizer: Any = None,
        seed: int = 0,
    ) -> None:
        for name, value, good in (
            ("keep_energy", keep_energy, 0.0 < keep_energy <= 1.0),
            ("rank", rank, rank is None or rank > 0),
            ("samples", samples, samples is None or samples > 0),
            ("batch_size", batch_size, batch_size > 0),
            ("max_length", max_length, max_length > 0),
        ):
            if not good:
                bounds = "keep_energy in (0, 1], rank, samples, batch_size and max_length > 0"
                raise EditError(f"NullSpace: {name}={value!r} is out of bounds ({bounds})")
        texts = list(texts) if isinstance(texts, Iterator) else texts
        self._options = {"max_length": max_length, "tokenizer": tokenizer, "seed": seed}
        self.texts = texts if holds_model_inputs(texts) else Texts.of(texts, **self._options)
        self.keep_energy, self.rank, self.preserve, self.sequential = keep_energy, rank, preserve, sequential
        self.samples, self.batch_size, self.max_length = samples, batch_size, max_length
        self.tokenizer, self.seed = tokenizer, seed
        self._earlier: list[Edit] = []
        self._spaces: dict[str, FreeSpace] = {}
        self._handles: list[Any] = []
        self._model: Any = None

    def prepare(self, run: EditRun) -> None:
        if isinstance(self.texts, Texts):
            self.texts.check()
            text_model(run)

    def attach(self, run: EditRun) -> None:
        if self.sequential:
            check_known(run, "sequential=True preserves this run's edits in the next")
            if not goes_on(self._model, run):
                self._earlier = []
        self._model = weakref.ref(run.model)
        self._maps = self._without_free_factors(run, linear_maps(run.model, run.scope))
        directions = self._directions(run, self._batches(run, self.texts))
        if preserved := self._preserved(run):
            for name, more in self._directions(run, self._edit_batches(run, preserved)).items():
                directions[name] = join_directions(directions[name], more)
        self._spaces = {}
        names = list(self._maps)
        for name, found in zip(names, same_everywhere([directions[name] for name in names]), strict=True):
            if found.shape[1] >= found.shape[0]:
                raise EditError(
                    f"NullSpace: the texts use all {found.shape[0]} directions of the inputs of {name}, so it could "
                    "not move; lower keep_energy or set rank="
                )
            weight = run.scope[name]
            space = free_space(found, torch.promote_types(weight.dtype, torch.float32))
            self._spaces[name] = space._replace(basis=space.basis.to(weight.device))
        self._start_factors_within(run)
        self._handles = project_gradients(self._maps, run.scope, lambda name, g: project_free(g, self._spaces[name]))

    def constrain(self, weights: dict[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        projected = dict(weights)
        for name, space in self._spaces.items():
            start = wide(reference[name])
            delta = self._maps[name].as_matrix(wide(weights[name]) - start)
            free = self._maps[name].as_matrix(project_free(delta, space))
            projected[name] = (start + free).to(weights[name].dtype)
        return projected

    def metrics(self, run: EditRun) -> dict[str, float]:
        """Mean number of preserved directions and their mean share; and ``|change U| / |change|`` over the scope."""
        if not self._spaces:
            return {}
        ranks = [space.rank for space in self._spaces.values()]
        shares = [space.rank / space.basis.shape[0] for space in self._spaces.values()]
        found = {
            "edit/drift/null_space_rank": sum(ranks) / len(ranks),
            "edit/drift/null_space_share": sum(shares) / len(shares),
        }
        leaked, moved = 0.0, 0.0
        for name, space in self._spaces.items():
            delta = wide(run.scope[name].detach()) - wide(run.reference[name])
            delta = self._maps[name].as_matrix(delta)
            leaked += float((delta - project_free(delta, space)).double().square().sum())
            moved += float(delta.double().square().sum())
        if moved:
            found["edit/drift/null_space_leak"] = (leaked / moved) ** 0.5
        return found

    def state(self) -> dict[str, Any]:
        spaces = {name: space._asdict() for name, space in self._spaces.items()}
        return {"spaces": spaces, "earlier": [[edit.prompt, edit.target] for edit in self._earlier]}

    def load_state(self, state: dict[str, Any]) -> None:
        # The directions that the run began with: of earlier runs' edits nothing else is left.
        saved = {name: FreeSpace(**space) for name, space in state["spaces"].items()}
        if saved.keys() != self._spaces.keys():
            raise EditError("NullSpace: the checkpoint is of another scope; resume with the same ParameterScope")
        for name, space in saved.items():
            # Copied: tensors out of a file lie at odd addresses, and products of matrices depend on that.
            basis = space.basis.to(self._spaces[name].basis, copy=True)
            self._spaces[name] = space._replace(basis=basis)
        self._earlier = [Edit(prompt, target) for prompt, target in state["earlier"]]

    def finish(self, run: EditRun) -> None:
        if self.sequential:
            prompts = {edit.prompt for edit in run.edits}
            self._earlier = [*(edit for edit in self._earlier if edit.prompt not in prompts), *run.edits]

    def detach(self, run: EditRun) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._spaces = [], {}

    def _directions(self, run: EditRun, batches: tuple[Any, Iterator[Batch]]) -> dict[str, Tensor]:
        """[d_in, r] for each weight, in fp64."""
        moments = input_moments(run, self._maps, *batches)
        return {
            name: principal_directions(moment.mean, energy=self.keep_energy, rank=self.rank)
            for name, moment in moments.items()
        }

    def _batches(self, run: EditRun, texts: Any) -> tuple[Any, Iterator[Batch]]:
        device = next(run.model.parameters()).device
        if holds_model_inputs(texts):
            return run.language_model or run.model, own_batches(texts, device)
        rows = Texts.of(texts, **self._options).tokenize(run, limit=self.samples)
        return text_model(run), text_batches(share(rows), self.batch_size, device)

    def _edit_batches(self, run: EditRun, preserved: Sequence[Any]) -> tuple[Any, Iterator[Batch]]:
        if not isinstance(preserved[0], Edit):
            return self._batches(run, preserved)
        rows = edit_rows(run, preserved, run.tokenizer(self.tokenizer), self.max_length)
        device = next(run.model.parameters()).device
        return text_model(run), text_batches(share(rows), self.batch_size, device)

    def _preserved(self, run: EditRun) -> Sequence[Any]:
        given = self.preserve
        if isinstance(given, str | Path):
            given = EditDataset.load(given)
        given = list(given) if given is not None else []
        if given and not isinstance(given[0], Edit):
            if self._earlier:
                raise EditError("NullSpace: sequential=True adds edits to preserve=, which holds texts; give edits")
            return given
        current = {edit.prompt for edit in run.edits}
        return [edit for edit in [*given, *self._earlier] if edit.prompt not in current]

    def _without_free_factors(self, run: EditRun, maps: dict[str, LinearMap]) -> dict[str, LinearMap]:
        """Of a LoRA pair in the scope A is projected, wholly, and B is free."""
        self._factors = [name for name in maps if ".lora_A." in name and _partner(name) in maps]
        for name in self._factors:
            if bool(run.reference[_partner(name)].any()):
                raise EditError(
                    f"NullSpace: {_partner(name)} is not zero, so the adapter acts already and training both of its "
                    "factors cannot keep it where it is; merge it and start a new one, or train one factor alone"
                )
        for name, module in run.model.named_modules():
            if getattr(module, "lora_magnitude_vector", None) and any(f.startswith(f"{name}.") for f in maps):
                raise EditError(
                    f"NullSpace: {name} is a DoRA adapter, whose norm rescales the answers for every input; use LoRA"
                )
        free = {_partner(name) for name in self._factors}
        return {name: one for name, one in maps.items() if name not in free}

    def _start_factors_within(self, run: EditRun) -> None:
        for name in self._factors:
            start = wide(run.reference[name])
            within = project_free(start, self._spaces[name])
            # Not again after a resume, whose reference lies within already: the last bits would differ.
            rounding = max(1e-5, torch.finfo(run.reference[name].dtype).eps)
            if float((start - within).norm()) > rounding * float(start.norm()):
                run.reference[name] = within.to(run.reference[name].dtype)

    def __repr__(self) -> str:
        kept = f"keep_energy={self.keep_energy}" if self.rank is None else f"rank={self.rank}"
        return f"NullSpace({kept}, sequential={self.sequential})"


def _partner(name: str) -> str:
    return name.replace(".lora_A.", ".lora_B.")
