"""GradientMask: train only a fraction of the entries in the scope, chosen by score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from kedit_train.arguments import check_arguments, one_of, optional, within
from kedit_train.callbacks.base import EditCallback
from kedit_train.core.fingerprint import sample_fingerprint
from kedit_train.core.fsdp import full_tensor, shard_like
from kedit_train.core.locality.consecutive_runs import readable_again
from kedit_train.core.locality.texts import Texts, TextSource
from kedit_train.core.processes import is_distributed
from kedit_train.core.run import EditRun
from kedit_train.core.scope.mask_file import load_masks, save_masks
from kedit_train.core.scope.mask_scores import MaskScore, ScoreName, choose_masks, score_entries
from kedit_train.core.scope.neurons import Granularity
from kedit_train.data import Edit, EditDataset
from kedit_train.errors import EditError
from kedit_train.paths import PATH

_DEFAULTS = ("gradient", 0.3, "element")


class GradientMask(EditCallback):
    """Train a fixed fraction of the entries of every tensor in the scope, and keep all other entries bit for bit.

    The scope contains the parameters that the run may change (see :class:`ParameterScope`).

    The entries with the highest scores are trained, and all other entries are frozen. The choice is made once, before
    the first step. Gradients of frozen entries are set to zero, so gradient clipping counts only the trained entries.
    Momentum, weight decay or existing optimizer state can move an entry even if the gradient is zero. Therefore, after
    every optimizer step, frozen entries are also reset to their values before the edit.

    In a tensor with n entries or neurons (see ``granularity``), ``round(density * n)`` of the entries or neurons are
    trained. If several entries have equal scores, the first of these entries are chosen.

    Args:
        score: how to score an entry: a name, or a :class:`MaskScore` with settings. "gradient" is the absolute value of
            the gradient of the mean loss on the target tokens. "fisher" is the diagonal Fisher information at the
            target tokens, with labels sampled from the model. This score is high for entries that affect the model's
            current answers to the prompts of the edits. "fisher_ratio" is the "fisher" score divided by the Fisher
            information on ``texts``. This score is high for entries that affect these answers strongly, but hardly
            affect the predictions on the texts. "magnitude" is the absolute value of the weight. "random" is a random
            number. "magnitude" and "random" work with any module; the other scores need a causal language model.
        density: fraction of the entries that may change, in (0, 1].
        granularity: the unit that is trained or frozen as a whole. "element" selects single entries. "row" selects
            output neurons with their bias. In an embedding, each row belongs to one token. "column" selects input
            neurons, and freezes the biases of all matrices, because a bias has no input neurons. The score of a neuron
            is the mean of the scores of its entries. In a vector that is not the bias of a matrix, such as the weight
            of a norm layer, each entry counts as a neuron.
        edits: a path or a sequence of edits. Only the prompts and targets are used. None takes the edits of
            ``EditMetrics`` or of the training loop.
        texts: a source of texts or a :class:`Texts`. Only for "fisher_ratio". Texts that contain an evaluation prompt
            of the edits are left out.
        mask_path: a safetensors file with the mask: one bool tensor per parameter in the scope, True where the entry
            may change. With a mask file, no scores are computed and no other argument may be given.
        save_path: path of a safetensors file to write the mask to. None does not write the mask.

    Raises:
        EditError: an argument is invalid, the run does not have the language model or the edits that the score needs,
            all scores of a tensor are equal, or the mask file does not fit the scope.

    References:
        - Overcoming catastrophic forgetting in neural networks (EWC, diagonal Fisher information), arXiv 1612.00796.

    Example:
        >>> import torch
        >>> from kedit_train import EditDataset, EditCollator, editing, world
        >>> from kedit_train.callbacks import GradientMask, ParameterScope
        >>> model, tokenizer = world.load()
        >>> edits = EditDataset.load("world", limit=2)
        >>> mask = GradientMask("gradient", density=0.3, edits=edits)
        >>> callbacks = [ParameterScope(-1, modules="mlp.down_proj"), mask]
        >>> with editing(model, callbacks, tokenizer=tokenizer, log_every_n_steps=1) as edit:
        ...     optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-3)
        ...     edit.before_step()
        ...     batch = EditCollator(tokenizer)(edits.encode(tokenizer))
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        >>> round(edit.history[0]["edit/scope/mask_density"], 3)
        0.3
    """

    # GradientMask comes after every callback that writes into weights, so that the mask holds exactly.
    order = 48
    constrains = True

    def __init__(
        self,
        score: ScoreName | MaskScore = "gradient",
        *,
        density: float = 0.3,
        granularity: Granularity = "element",
        edits: EditDataset | Sequence[Edit] | str | Path | None = None,
        texts: TextSource | Texts | None = None,
        mask_path: str | Path | None = None,
        save_path: str | Path | None = None,
    ) -> None:
        if isinstance(score, str):
            check_arguments(self, score=(score, one_of(get_args(ScoreName))))
        check_arguments(
            self,
            density=(density, within("(0, 1]")),
            granularity=(granularity, one_of(get_args(Granularity))),
            mask_path=(mask_path, optional(PATH)),
            save_path=(save_path, optional(PATH)),
        )
        self.score: MaskScore = MaskScore.of(score)
        self.density = density
        self.granularity: Granularity = granularity
        self.edits: Any = readable_again(edits)
        self.texts: Texts | None = None if texts is None else Texts.of(texts)
        self.mask_path = mask_path
        self.save_path = save_path
        if (texts is None) == (self.score.name == "fisher_ratio"):
            rule = "must be given" if texts is None else "must be None"
            raise EditError(
                f"texts {rule} if score={self.score.name!r}; set texts if and only if score='fisher_ratio'.",
                component="GradientMask",
            )
        chosen = (score, density, granularity) != _DEFAULTS or edits is not None or save_path is not None
        if mask_path is not None and chosen:
            raise EditError(
                "mask_path must not be combined with other arguments, because the file contains the finished mask; "
                "remove score, density, granularity, edits and save_path.",
                component="GradientMask",
            )
        # For each parameter name, a bool tensor: True where the entry keeps its value.
        self._frozen: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def prepare(self, run: EditRun) -> None:
        if self.mask_path is not None:
            load_masks(self.mask_path)
            return
        if not self.score.needs_edits:
            return
        if run.language_model is None:
            raise EditError(
                f"score={self.score.name!r} needs a causal language model, and {type(run.root).__name__} has no "
                'language-model head; use score="magnitude", score="random" or mask_path.'
            )
        if self.edits is not None:
            EditDataset.of(self.edits)
        if self.texts is not None:
            self.texts.check()

    def attach(self, run: EditRun) -> None:
        masks = self._masks(run)
        self._model = None if self.save_path is None else _identity(run, masks)
        for name, parameter in run.scope.items():
            masks[name] = masks[name].to(parameter.device)
            if is_distributed():
                # GPU sums depend on their order. If the processes had different masks, their weights would diverge.
                dist.broadcast(masks[name].view(torch.uint8), src=0)
        trained, total = sum(int(mask.sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())
        if not trained:
            raise EditError(f"the mask freezes all {total} entries of the scope; raise density or use another mask.")
        self._density = trained / total
        self._frozen = {name: shard_like(~mask, run.scope[name]) for name, mask in masks.items()}
        self._save(run)
        for name, parameter in run.scope.items():
            self._handles.append(parameter.register_post_accumulate_grad_hook(_zero_where(self._frozen[name])))

    def constrain(self, weights: dict[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.where(self._frozen[name], reference[name], weight) for name, weight in weights.items()}

    def metrics(self, run: EditRun) -> dict[str, float]:
        """Return the fraction of the entries in the scope that may change."""
        return {"edit/scope/mask_density": self._density} if self._frozen else {}

    def state(self) -> dict[str, Any]:
        return {"frozen": {name: full_tensor(frozen) for name, frozen in self._frozen.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        # The mask of the checkpoint is used, even if new scores would give another mask.
        saved: dict[str, Tensor] = state["frozen"]
        if {n: f.shape for n, f in saved.items()} != {n: f.shape for n, f in self._frozen.items()}:
            raise EditError(
                "the mask in the checkpoint belongs to another scope; resume with the ParameterScope of the run that "
                "wrote the checkpoint.",
                component="GradientMask",
            )
        self._density = 1.0 - sum(int(f.sum()) for f in saved.values()) / sum(f.numel() for f in saved.values())
        for name, frozen in self._frozen.items():
            # In place, because the gradient hooks refer to these tensors.
            frozen.copy_(shard_like(saved[name].to(frozen.device), frozen))

    def finish(self, run: EditRun) -> None:
        self._save(run)

    def detach(self, run: EditRun) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._frozen = [], {}

    def _masks(self, run: EditRun) -> dict[str, Tensor]:
        if self.mask_path is not None:
            shapes = {name: p.shape for name, p in run.scope.items()}
            return load_masks(self.mask_path, shapes, lambda masks: _identity(run, masks))
        edits = self._edits(run) if self.score.needs_edits else None
        scores, on_texts = score_entries(run, self.score, edits, self.texts)
        return choose_masks(run.model, scores, on_texts, density=self.density, granularity=self.granularity)

    def _edits(self, run: EditRun) -> EditDataset:
        edits = self.edits if self.edits is not None else run.edits or run.host.edits()
        if edits is None:
            raise EditError(
                f"score={self.score.name!r} needs edits, and this run ({run.host.name}) has no edits of its own; pass "
                "edits= (a path, a list of Edit or an EditDataset)."
            )
        return EditDataset.of(edits)

    def _save(self, run: EditRun) -> None:
        if self.save_path is not None:
            masks = {name: ~full_tensor(frozen) for name, frozen in self._frozen.items()}
            if run.host.is_main:
                save_masks(self.save_path, masks, self._model)

    def __repr__(self) -> str:
        if self.mask_path is not None:
            return f"GradientMask(mask_path={str(self.mask_path)!r})"
        return f"GradientMask({self.score.name!r}, density={self.density}, granularity={self.granularity!r})"


def _identity(run: EditRun, masks: Mapping[str, Tensor]) -> str:
    """Return a fingerprint of the model that is the same before and after the edit."""
    kept: dict[str, Tensor] = {n: p for n, p in run.model.named_parameters() if n not in run.scope}
    if not kept:
        kept = {n: full_tensor(run.reference[n])[~mask.to(run.reference[n].device)] for n, mask in masks.items()}
    return sample_fingerprint(kept)


def _zero_where(frozen: Tensor) -> Any:
    def zero(parameter: Tensor) -> None:
        gradient = parameter.grad
        # In place, because DDP reduces this tensor. Sparse gradients are not masked here. For parameters with sparse
        # gradients, only constrain() keeps the frozen entries.
        if gradient is not None and gradient.layout == torch.strided:
            gradient.masked_fill_(frozen, 0.0)

    return zero
