"""Score every weight entry in the scope, and turn the scores into masks of the entries that may change."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from kedit_train.arguments import check_arguments, integer_from, one_of, optional
from kedit_train.core.drift.fisher import diagonal_fisher, mean_gradient, next_token_examples
from kedit_train.core.fsdp import full_tensor
from kedit_train.core.locality.texts import Texts
from kedit_train.core.run import EditRun
from kedit_train.core.scope.neurons import Granularity, matrix_of, unit_of
from kedit_train.data import EditDataset
from kedit_train.data.tokenization import Encoded, context_length
from kedit_train.errors import EditError
from kedit_train.functional.gradient_masks import fisher_ratio, keep_top, unit_mask, unit_scores

ScoreName = Literal["gradient", "fisher", "fisher_ratio", "magnitude", "random"]


@dataclass(frozen=True)
class MaskScore:
    """The score by which ``GradientMask`` chooses the weight entries to train.

    Args:
        name: one of

            - "gradient": absolute value of the gradient of the mean loss on the edits' target tokens;
            - "fisher": diagonal Fisher information at the target tokens, with labels sampled from the model;
            - "fisher_ratio": the "fisher" score divided by the Fisher information on the ``texts`` of ``GradientMask``;
            - "magnitude": absolute value of the weight before the edit;
            - "random": random numbers.
        limit: maximum number of edits that the score uses. "fisher_ratio" also uses at most ``limit`` token sequences
            of the ``texts``. None means no maximum. Each edit and each sequence costs one backward pass. "magnitude"
            and "random" ignore ``limit``.
        seed: seed for the choice of edits and sequences, for the sampled labels and for the random scores.

    Example:
        >>> MaskScore("random", seed=1)
        MaskScore(name='random', limit=256, seed=1)
    """

    name: ScoreName
    _: KW_ONLY
    limit: int | None = 256
    seed: int = 0

    def __post_init__(self) -> None:
        check_arguments(
            self, name=(self.name, one_of(get_args(ScoreName))), limit=(self.limit, optional(integer_from(1)))
        )

    @classmethod
    def of(cls, value: Any) -> MaskScore:
        """Return ``value`` as a ``MaskScore``.

        Args:
            value: a ``MaskScore``, a name, or a mapping with the arguments (as in YAML).

        Raises:
            EditError: the name or an argument is unknown.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            known = [field.name for field in fields(cls)]
            if unknown := [key for key in value if key not in known]:
                raise EditError(
                    f"unknown argument {unknown[0]!r}; use only {', '.join(known)}.",
                    component="MaskScore",
                )
            return cls(**{"name": "gradient", **value})
        return cls(value)

    @property
    def needs_edits(self) -> bool:
        """Whether the score needs edits and a causal language model."""
        return self.name in ("gradient", "fisher", "fisher_ratio")

    def sample(self, sequences: Sequence[Encoded]) -> Sequence[Encoded]:
        """Return at most ``limit`` sequences, drawn at random with ``seed``, in their original order."""
        if self.limit is None or self.limit >= len(sequences):
            return sequences
        return [sequences[i] for i in sorted(random.Random(self.seed).sample(range(len(sequences)), self.limit))]


def score_entries(
    run: EditRun, score: MaskScore, edits: EditDataset | None, texts: Texts | None
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Compute a score for every entry of the parameters in the scope.

    Args:
        run: the run before its first step.
        score: the kind of score.
        edits: required if the score needs edits.
        texts: required for "fisher_ratio".

    Returns:
        A pair: the scores, and the Fisher information on the texts. Each is a dict from the name of a parameter to a
        tensor of the parameter's shape. The Fisher information is None for every score except "fisher_ratio".
    """
    if score.name == "magnitude":
        return {name: full_tensor(run.reference[name]).float().abs() for name in run.scope}, None
    if score.name == "random":
        generator = torch.Generator().manual_seed(score.seed)
        return {name: torch.rand(p.shape, generator=generator) for name, p in run.scope.items()}, None
    assert edits is not None
    length = context_length(getattr(run.model, "config", None))
    sequences = score.sample(edits.encode(run.tokenizer(), max_length=length))
    if score.name == "gradient":
        return {name: gradient.abs() for name, gradient in _complete(mean_gradient(run, sequences)).items()}, None
    on_edits = _complete(diagonal_fisher(run, sequences, seed=score.seed))
    if score.name == "fisher":
        return on_edits, None
    assert texts is not None
    others = score.sample(next_token_examples(texts.tokenize(run, edits=edits)))
    return on_edits, _complete(diagonal_fisher(run, others, seed=score.seed))


def _complete(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # The entries with the highest scores of a whole tensor are chosen, so each process needs all scores.
    return {name: full_tensor(values) for name, values in scores.items()}


def choose_masks(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    on_texts: Mapping[str, Tensor] | None,
    *,
    density: float,
    granularity: Granularity,
) -> dict[str, Tensor]:
    """Turn scores into masks that make the same fraction of every tensor trainable.

    Args:
        model: the model that contains the parameters.
        scores: name -> scores in the shape of the parameter.
        on_texts: name -> Fisher information on texts, by which the scores are divided. None skips the division.
        density: fraction of the entries, rows or columns that stay trainable.
        granularity: whether a mask selects single entries ("element"), whole rows ("row") or whole columns ("column").
            For rows and columns, the scores and the Fisher information are first averaged over each row or column.

    Returns:
        name -> bool mask, True where the entry may change.

    Raises:
        EditError: the scores of a tensor are all equal or are not finite. The error is also raised if rows or columns
            are requested for a stack of matrices, such as fused experts.
    """
    units = {name: unit_of(model, name, granularity, scores) for name in scores}
    masks: dict[str, Tensor] = {}
    for name, (rule, dim) in units.items():
        if rule != "scored":
            continue
        values = scores[name] if dim is None else unit_scores(scores[name], dim)
        if on_texts is not None:
            values = fisher_ratio(values, on_texts[name] if dim is None else unit_scores(on_texts[name], dim))
        try:
            kept = keep_top(values, density)
        except ValueError as error:
            raise EditError(f"{name}: {error}; choose another score, or remove this weight from the scope.") from error
        masks[name] = kept if dim is None else unit_mask(kept, scores[name].shape, dim)
    for name, (rule, dim) in units.items():
        if rule == "frozen":
            masks[name] = torch.zeros_like(scores[name], dtype=torch.bool)
        elif rule == "as_matrix":
            matrix = masks[matrix_of(name)]
            masks[name] = matrix.movedim(dim or 0, 0).flatten(1)[:, 0].clone()
    return masks
