"""Where may the model change? Within the scope, the entries that matter most for the edits, and no other by one bit."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from kedit_train.callbacks.base import EditCallback
from kedit_train.core.drift.fisher import diagonal_fisher, mean_gradient, next_token_examples
from kedit_train.core.fsdp import placed_like, whole
from kedit_train.core.locality.texts import Texts, TextSource
from kedit_train.core.processes import is_distributed
from kedit_train.core.run import EditRun
from kedit_train.core.scope.mask_file import load_masks, save_masks
from kedit_train.core.scope.neurons import Granularity, matrix_of, place
from kedit_train.data import EditDataset
from kedit_train.data.tokenization import Encoded, context_length
from kedit_train.errors import EditError
from kedit_train.functional.gradient_masks import fisher_ratio, keep_top, unit_mask, unit_scores

Score = Literal["gradient", "fisher", "fisher_ratio", "magnitude", "random"]
_DEFAULTS = ("gradient", 0.3, "element")


class GradientMask(EditCallback):
    """Let a share of the scope's entries change, chosen once by score; after every step the rest is what it was.

    The rest is written back from the reference: a gradient of zero holds no weight still under momentum, weight decay
    or a warm optimizer. Gradients outside of the mask are zeroed as well, so that clipping sees what is trained. Every
    tensor keeps its own share, ``round(density * n)`` of its n entries (or neurons); of equal scores the first.

    Args:
        score: "gradient", the size of the targets' mean gradient; "fisher", the true diagonal Fisher information at
            the targets' positions (arXiv 1612.00796), whose labels are drawn from the model: what its present answers
            there depend on, not the new ones; "fisher_ratio", that over the Fisher information on ``texts``: high
            where the edits need a weight and other texts do not; "magnitude", the size of the weight; "random". The
            first three ask a language model, the others take any module.
        density: share of the entries that may change, above 0 and at most 1. Of 0.05, 0.1, 0.2, 0.3 and 0.5, 0.3 is the
            least that learned 90 % of both models' edits in tests/benchmarks/constraints.py; with 0.05, published for
            larger models, 83 % of the embedded world's were learned and 3 % of factlm's.
        granularity: "element"; "row", whole output neurons, biases with them; or "column", whole input neurons, where
            biases of matrices stay as they are. A neuron's score is the mean of its entries'. Entries of other vectors
            (norms) count as neurons; an embedding's row is a token.
        edits: a path or edits; by default those that ``EditMetrics`` or a data module holds. Only prompts and targets
            are read.
        texts: for "fisher_ratio", as in ``KLLocality``; those with a prompt that the edits are scored on are left out.
        mask: a safetensors file with a bool tensor for every name in scope, true where it may change; then nothing is
            scored, and ``score``, ``density`` and ``granularity`` keep their defaults.
        save_to: where to write such a file.
        samples: edits, and windows of texts, to score, drawn with ``seed``; None takes all. Each costs one backward
            pass by itself: the Fisher information is a mean of squares, not the square of a batch's mean.
        max_length: tokens a window of the texts.
        tokenizer: an object, a name or a path; by default the host's, else the one saved with the model.
        seed: of what is drawn: samples, labels, random scores.
    """

    order = 48
    constrains = True

    def __init__(
        self,
        score: Score = "gradient",
        density: float = 0.3,
        granularity: Granularity = "element",
        edits: Any = None,
        texts: TextSource | Texts | None = None,
        mask: str | Path | None = None,
        save_to: str | Path | None = None,
        samples: int | None = 256,
        max_length: int = 256,
        tokenizer: Any = None,
        seed: int = 0,
    ) -> None:
        for name, value, good in (
            ("score", score, score in ("gradient", "fisher", "fisher_ratio", "magnitude", "random")),
            ("density", density, 0.0 < density <= 1.0),
            ("granularity", granularity, granularity in ("element", "row", "column")),
            ("samples", samples, samples is None or samples > 0),
            ("max_length", max_length, max_length > 1),
        ):
            if not good:
                bounds = (
                    "score gradient|fisher|fisher_ratio|magnitude|random, 0 < density <= 1, "
                    "granularity element|row|column, samples > 0, max_length > 1"
                )
                raise EditError(f"GradientMask: {name}={value!r} is out of bounds ({bounds})")
        if (texts is None) == (score == "fisher_ratio"):
            given = "needs texts=" if texts is None else f"does not read texts=; score={score!r} does without"
            raise EditError(f"GradientMask: score={score!r} {given}, the general texts of score='fisher_ratio'")
        if mask is not None and (
            (score, density, granularity) != _DEFAULTS or edits is not None or save_to is not None
        ):
            raise EditError("GradientMask: mask= is the mask; leave out score, density, granularity, edits and save_to")
        self.score: Score = score
        self.granularity: Granularity = granularity
        self.density = density
        # Read more than once: by prepare, by attach, and by a second run of the same instance.
        self.edits = list(edits) if isinstance(edits, Iterator) else edits
        self.texts = None if texts is None else Texts.of(texts, max_length=max_length, tokenizer=tokenizer, seed=seed)
        self.mask, self.save_to, self.samples = mask, save_to, samples
        self.tokenizer, self.seed = tokenizer, seed
        self._held: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def prepare(self, run: EditRun) -> None:
        if self.mask is not None:
            load_masks(self.mask)
        if self.mask is not None or self.score in ("magnitude", "random"):
            return
        if run.language_model is None:
            raise EditError(
                f"GradientMask: score={self.score!r} asks a causal language model for answers, and "
                f"{type(run.root).__name__} has no language-model head; use score='magnitude', 'random' or mask="
            )
        if self.edits is not None:
            EditDataset.of(self.edits)
        if self.texts is not None:
            self.texts.check()

    def attach(self, run: EditRun) -> None:
        if self.mask is not None:
            masks = load_masks(self.mask, {name: p.shape for name, p in run.scope.items()})
        else:
            masks = self._masks(run)
        for name, parameter in run.scope.items():
            masks[name] = masks[name].to(parameter.device)
            if is_distributed():
                # Sums on a GPU depend on their order; a mask of its own on each process would let weights diverge.
                dist.broadcast(masks[name].view(torch.uint8), src=0)
        kept, total = sum(int(mask.sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())
        if not kept:
            raise EditError(
                f"GradientMask: the mask holds all {total} entries of the scope; raise density or take others"
            )
        self._density = kept / total
        self._held = {name: placed_like(~mask, run.scope[name]) for name, mask in masks.items()}
        self._save(run)
        for name, parameter in run.scope.items():
            self._handles.append(parameter.register_post_accumulate_grad_hook(_zero_where(self._held[name])))

    def constrain(self, weights: dict[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.where(self._held[name], reference[name], weight) for name, weight in weights.items()}

    def metrics(self, run: EditRun) -> dict[str, float]:
        """Share of the scope's entries that may change."""
        return {"edit/scope/mask_density": self._density} if self._held else {}

    def state(self) -> dict[str, Any]:
        return {"held": {name: whole(held) for name, held in self._held.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        # The mask that the run began with, to the last bit, although the same scores should have given the same one.
        saved: dict[str, Tensor] = state["held"]
        if {n: h.shape for n, h in saved.items()} != {n: h.shape for n, h in self._held.items()}:
            raise EditError(
                "GradientMask: the checkpoint's mask is of another scope; resume with the same ParameterScope"
            )
        self._density = 1.0 - sum(int(h.sum()) for h in saved.values()) / sum(h.numel() for h in saved.values())
        for name, held in self._held.items():
            # In place, where the hooks look.
            held.copy_(placed_like(saved[name].to(held.device), held))

    def finish(self, run: EditRun) -> None:
        self._save(run)

    def detach(self, run: EditRun) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._held = [], {}

    def _save(self, run: EditRun) -> None:
        if self.save_to is not None:
            masks = {name: ~whole(held) for name, held in self._held.items()}
            if run.host.is_main:
                save_masks(self.save_to, masks)

    # -- from scores to masks

    def _masks(self, run: EditRun) -> dict[str, Tensor]:
        # On plain tensors: what is sharded now was whole when the mask has to be chosen.
        scores, general = self._scores(run)
        places = {name: place(run.model, name, self.granularity, run.scope) for name in run.scope}
        masks = {}
        for name, (kind, dim) in places.items():
            if kind != "own":
                continue
            found = scores[name] if dim is None else unit_scores(scores[name], dim)
            if general is not None:
                other = general[name] if dim is None else unit_scores(general[name], dim)
                found = fisher_ratio(found, other)
            try:
                units = keep_top(found, self.density)
            except ValueError as error:
                raise EditError(
                    f"GradientMask: {name}, score={self.score!r}: {error}; take another score, or leave it out of the "
                    "scope"
                ) from error
            masks[name] = units if dim is None else unit_mask(units, scores[name].shape, dim)
        for name, (kind, dim) in places.items():
            if kind == "held":
                masks[name] = torch.zeros_like(scores[name], dtype=torch.bool)
            elif kind == "follows":
                matrix = masks[matrix_of(name)]
                masks[name] = matrix.movedim(dim or 0, 0).flatten(1)[:, 0].clone()
        return masks

    def _scores(self, run: EditRun) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """Scores of every entry, and for a ratio those that they are compared with."""
        if self.score == "magnitude":
            return {name: whole(run.reference[name]).float().abs() for name in run.scope}, None
        if self.score == "random":
            source = torch.Generator().manual_seed(self.seed)
            return {name: torch.rand(p.shape, generator=source) for name, p in run.scope.items()}, None
        edits = self._find_edits(run)
        length = context_length(getattr(run.model, "config", None))
        rows = self._sample(edits.encode(run.tokenizer(self.tokenizer), max_length=length))
        if self.score == "gradient":
            gradient = mean_gradient(run, rows)
            return {name: g.abs() for name, g in gradient.items()}, None
        fisher = diagonal_fisher(run, rows, seed=self.seed)
        if self.score == "fisher":
            return fisher, None
        assert self.texts is not None
        general = self._sample(next_token_examples(self.texts.tokenize(run, edits=edits)))
        return fisher, diagonal_fisher(run, general, seed=self.seed)

    def _find_edits(self, run: EditRun) -> EditDataset:
        edits = self.edits if self.edits is not None else run.edits or run.host.edits()
        if edits is None:
            raise EditError(
                f"GradientMask: score={self.score!r} needs the edits, and this {run.host.name} run holds none of its "
                "own; give edits=, a path or an EditDataset"
            )
        return EditDataset.of(edits)

    def _sample(self, rows: Sequence[Encoded]) -> Sequence[Encoded]:
        if self.samples is None or self.samples >= len(rows):
            return rows
        return [rows[i] for i in sorted(random.Random(self.seed).sample(range(len(rows)), self.samples))]

    def __repr__(self) -> str:
        if self.mask is not None:
            return f"GradientMask(mask={str(self.mask)!r})"
        return f"GradientMask(score={self.score!r}, density={self.density}, granularity={self.granularity!r})"


def _zero_where(held: Tensor) -> Any:
    def zero(parameter: Tensor) -> None:
        gradient = parameter.grad
        # In place, for DDP reduces this very tensor. A sparse gradient is left as it is: the weights are held anyway.
        if gradient is not None and gradient.layout == torch.strided:
            gradient.masked_fill_(held, 0.0)

    return zero
