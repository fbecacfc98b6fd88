"""Use the unedited model to make additional training examples, and to rewrite the targets of edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from kedit_train.arguments import above, check_arguments, integer_from, optional
from kedit_train.augmentation.prefixes import generate_prefixes
from kedit_train.augmentation.replay import ReplayedFacts, read_prompts, replay_facts
from kedit_train.augmentation.rewrites import MIX, RewrittenTargets, rewrite_targets
from kedit_train.augmentation.study import StudyRow, StudyRows, study_rows
from kedit_train.augmentation.study_mixture import mixed_rows
from kedit_train.data import Edit, EditDataset
from kedit_train.data.contradictions import without_overwritten
from kedit_train.data.leaks import LeakCheck, with_prefixes
from kedit_train.data.prompts import PromptFormat
from kedit_train.data.tokenization import context_length
from kedit_train.errors import EditError, reported_by
from kedit_train.evaluation.asking.batching import unwrap_model
from kedit_train.evaluation.asking.probes import PREFIXES

__all__ = [
    "Augmentation",
    "AugmentationOptions",
    "ReplayedFacts",
    "RewrittenTargets",
    "StudyRow",
    "StudyRows",
    "augmentation",
    "generate_prefixes",
    "read_prompts",
    "replay_facts",
    "rewrite_targets",
    "study_rows",
]

# For n prefixes per edit, the model generates POOL * n prefixes. Each edit draws from these prefixes.
POOL = 8


@dataclass(frozen=True)
class AugmentationOptions:
    """Options for additional training examples and rewritten targets: the section ``data.augmentation`` of a recipe.

    ``EditDataModule`` passes these options to :func:`augmentation`, which makes the examples and rewrites the targets.

    Args:
        prefixes: number of pseudo-paraphrases per edit. A pseudo-paraphrase is a short text that the unedited model
            generates, followed by the prompt of the edit.
        replay: prompts about facts that are not edited. They are trained with the answers of the unedited model. Give a
            ``.txt`` file with one prompt per line, a file of edits (only its prompts are used), or "world" for the
            prompts that come with kedit-train.
        replay_limit: maximum number of facts to replay, drawn at random with the seed of the run. None uses the number
            of edits.
        previous_edits: a file of edits that the model has already learned. These edits are trained again. A previous
            edit is left out if it is too similar to an edit of the run (see :func:`augmentation`).
        rewrite: train on targets that the unedited model writes (MixSD). The value is the probability, in [0, 1), that
            the model writes a token without reading the new fact. For all other tokens, the model reads the new fact.
            The MixSD paper uses 0.3 to 0.5. The edits are still evaluated with their own targets. With None, the edits
            are trained with their own targets.
        study: a file of study rows. A study row is a text about a document: a paraphrase, a question with its answer,
            an implication or a continuation. If the file does not exist, the unedited model writes the rows
            (:func:`study_rows`), and its tokenizer needs a chat template. If the file exists, its rows are read and
            nothing is written. With None, there are no study rows.
        study_ratio: number of study tokens per document token, above 0. Rows are drawn with the seed of the run until
            this ratio is reached. None uses all rows.

    Example:
        >>> AugmentationOptions(prefixes=2, replay="world").replay_limit is None
        True
    """

    prefixes: int = 0
    _: KW_ONLY
    replay: str | None = None
    replay_limit: int | None = None
    previous_edits: str | None = None
    rewrite: float | None = None
    study: str | None = None
    study_ratio: float | None = None

    def __post_init__(self) -> None:
        check_numbers(self.prefixes, self.replay_limit, self.rewrite, self.study_ratio)


def check_numbers(prefixes: Any, replay_limit: Any, rewrite: Any, study_ratio: Any = None) -> None:
    """Check the numbers in the options. In a recipe, this check runs before the model is loaded."""
    check_arguments(
        "augmentation",
        prefixes=(prefixes, integer_from(0)),
        replay_limit=(replay_limit, optional(integer_from(1))),
        rewrite=(rewrite, optional(MIX)),
        study_ratio=(study_ratio, optional(above(0))),
    )


@dataclass(frozen=True)
class Augmentation:
    """A callable that takes edits and returns the additional examples to train together with them.

    A pseudo-paraphrase is a prefix followed by the prompt of an edit. A scored prompt is a prompt of the evaluation: a
    rephrase of an edit, or the prompt of a locality or portability question.

    Args:
        prefixes: the texts from which the prefixes are drawn.
        per_edit: number of prefixes per edit, drawn with ``seed``. Each prefix gives one pseudo-paraphrase.
        replay: examples of replayed facts and of previous edits. Every call returns all of these examples.
        seed: seed of the random draws.
        leak_check: finds pseudo-paraphrases that contain a scored prompt of the run. A call leaves these
            pseudo-paraphrases out.
        summary: one line that says how many examples were made and how many were left out.
        rewritten: a dict with the edits whose targets the unedited model has rewritten. The key of a rewritten edit is
            the tuple (prompt, target) of the original edit.
        study: a dict from the prompt of a document to its study rows, which are training examples about the document.
            A call with some of the documents returns only the rows of these documents.
    """

    prefixes: tuple[str, ...]
    per_edit: int
    replay: tuple[Edit, ...]
    seed: int
    leak_check: LeakCheck
    summary: str = ""
    rewritten: Mapping[tuple[str, str], Edit] = field(default_factory=dict)
    study: Mapping[str, tuple[Edit, ...]] = field(default_factory=dict)

    def __call__(self, edits: Sequence[Edit]) -> list[Edit]:
        paraphrases = with_prefixes(self.rewrite(edits), self.prefixes, self.per_edit, self.seed)
        allowed = (example for example in paraphrases if not self.leak_check.contains_scored_prompt(example.prompt))
        return [*allowed, *self.replay, *(row for edit in edits for row in self.study.get(edit.prompt, ()))]

    def rewrite(self, edits: Sequence[Edit]) -> list[Edit]:
        """Return the edits with their rewritten targets. An edit without a rewritten target is returned unchanged.

        Use the result for the training only: rewritten edits have no rephrases and no evaluation questions.
        """
        return [self.rewritten.get((edit.prompt, edit.target), edit) for edit in edits]

    def training_edits(self, edits: Sequence[Edit]) -> list[Edit]:
        """Return all examples to train: the edits (with rewritten targets, if any) and the additional examples."""
        return [*self.rewrite(edits), *self(edits)]

    def __repr__(self) -> str:
        return f"Augmentation(per_edit={self.per_edit}, replay={len(self.replay)}, seed={self.seed})"


def augmentation(
    model: nn.Module,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    prefixes: int = 0,
    replay: str | Path | Sequence[str] | None = None,
    replay_limit: int | None = None,
    previous_edits: str | Path | Sequence[Edit] | None = None,
    rewrite: float | None = None,
    study: str | Path | StudyRows | None = None,
    study_ratio: float | None = None,
    seed: int = 0,
    prompt_format: PromptFormat = "plain",
    batch_size: int = 64,
) -> Augmentation:
    """Use the unedited model to make additional training examples and, with ``rewrite``, new targets for the edits.

    No example contains a scored prompt of the edits: a rephrase, or the prompt of a locality or portability question.
    Call this function once, before the training, and use its result:

    - In your own loop, pass the result as ``ExampleOptions(extra_edits=)``.
    - In TRL, train on ``EditDataset(augmentation(...).training_edits(edits)).to_prompt_completion()``.

    In Lightning, pass ``EditDataModule(augmentation=AugmentationOptions(...))``. The data module then calls this
    function.

    Args:
        model: the unedited model.
        tokenizer: the tokenizer of the model.
        edits: all edits of the run. Examples that contain a scored prompt of these edits are left out.
        prefixes: number of pseudo-paraphrases per edit. A pseudo-paraphrase is a short text that the model generates,
            followed by the prompt of the edit.
        replay: prompts about facts that are not edited. They are trained with the answers of ``model``. Give a list of
            prompts, a ``.txt`` file with one prompt per line, a file of edits (only its prompts are used), or "world"
            for the prompts that come with kedit-train.
        replay_limit: maximum number of facts to replay, drawn with ``seed``. None uses the number of edits.
        previous_edits: edits that the model has already learned, or a file of such edits. These edits are trained again
            with their own targets. A previous edit is left out if its prompt contains a subject or a prompt of
            ``edits``. It is also left out if its prompt and its target together contain a scored prompt of ``edits``.
        rewrite: train the edits on targets that ``model`` writes
            (:func:`~kedit_train.augmentation.rewrites.rewrite_targets`). The value is the probability, in [0, 1), that
            ``model`` writes a token without reading the new fact. For all other tokens, ``model`` reads the new fact.
            With None, the edits are trained with their own targets.
        study: the study rows (training examples about documents), as a result of :func:`study_rows` or as a file. If
            the file does not exist, ``model`` writes the rows, sampled with ``seed``. If a result of :func:`study_rows`
            has rows about documents that are not in ``edits``, these rows are left out.
        study_ratio: number of study tokens per document token, above 0. Rows are drawn with ``seed`` until this ratio
            is reached. If there are too few rows, all are used. None uses all rows.
        seed: seed of all random draws.
        prompt_format: the prompt format of the training: "plain", "chat", "question" or a ``ChatFormat``.
        batch_size: number of prompts per forward pass.

    Raises:
        EditError: an argument is out of range, a file cannot be read, or no prompt is left to replay.

    References:
        - "Model Editing by Standard Fine-Tuning", arXiv 2402.11078, for pseudo-paraphrases.
        - "MixSD: Mixed Contextual Self-Distillation for Knowledge Injection", arXiv 2605.16865, for ``rewrite``.

    Example:
        >>> from kedit_train import world
        >>> model, tokenizer = world.load()
        >>> edits = world.edits(2)
        >>> augment = augmentation(model, tokenizer, edits, prefixes=1, replay="world", replay_limit=3)
        >>> len(augment(edits))
        5
    """
    check_numbers(prefixes, replay_limit, rewrite, study_ratio)
    with reported_by("augmentation"):
        if replay_limit is not None and replay is None:
            raise EditError(
                f"replay_limit={replay_limit} has no effect, because replay is None; set replay to prompts about facts "
                "that are not edited, or remove replay_limit."
            )
        check, summary = LeakCheck(edits), []
        texts: list[str] = []
        if prefixes:
            texts, paraphrases = _prefixes(model, tokenizer, edits, prefixes, check, seed)
            summary.append(paraphrases)
        examples: list[Edit] = []
        if replay is not None:
            facts = replay_facts(
                model,
                tokenizer,
                read_prompts(replay, edits),
                edits,
                limit=replay_limit or len(edits),
                seed=seed,
                prompt_format=prompt_format,
                batch_size=batch_size,
            )
            examples += facts.examples
            summary.append(f"{len(facts.examples)} replayed facts ({facts.describe()})")
        if previous_edits is not None:
            earlier = EditDataset.of(previous_edits) if isinstance(previous_edits, str | Path) else previous_edits
            # If the file has the edits of several days, a later edit may replace an earlier edit.
            kept = [(i, earlier[i]) for i in without_overwritten(earlier)]
            again = [Edit(edit.prompt, edit.target, id=f"earlier {edit.id or i}") for i, edit in kept]
            allowed = [example for example in again if not check.is_leak(example)]
            examples += allowed
            leaked = len(again) - len(allowed)
            summary.append(
                f"{len(allowed)} previous edits ({leaked} others, a fraction of {leaked / len(again):.3f}, were left "
                "out because they contain text of an edit)"
            )
        by_document: dict[str, tuple[Edit, ...]] = {}
        if study_ratio is not None and study is None:
            raise EditError(
                f"study_ratio={study_ratio} has no effect, because study is None; set study to a file, or remove "
                "study_ratio."
            )
        if study is not None:
            if not isinstance(study, StudyRows):
                # An existing file keeps its own seed, so that runs with several seeds can read the same rows.
                new = None if Path(study).exists() else seed
                study = study_rows(model, tokenizer, edits, study, seed=new)
            by_document, mixture = mixed_rows(tokenizer, edits, study, study_ratio, seed, prompt_format)
            summary.append(f"{mixture}; {study.describe()}")
        added = {"replay": examples, "study rows": [row for own in by_document.values() for row in own]}
        _check_lengths(model, tokenizer, added, prompt_format)
        rewritten: dict[tuple[str, str], Edit] = {}
        if rewrite is not None:
            options: dict[str, Any] = {"mix": rewrite, "seed": seed, "prompt_format": prompt_format}
            written = rewrite_targets(model, tokenizer, edits, batch_size=batch_size, **options)
            pairs = zip(edits, written.edits, strict=True)
            rewritten = {(old.prompt, old.target): new for old, new in pairs if new is not old}
            summary.append(written.describe())
    line = "augmentation: " + "; ".join(summary)
    return Augmentation(tuple(texts), prefixes, tuple(examples), seed, check, line, rewritten, by_document)


def _prefixes(
    model: nn.Module, tokenizer: Any, edits: Sequence[Edit], per_edit: int, check: LeakCheck, seed: int
) -> tuple[list[str], str]:
    generated = generate_prefixes(model, tokenizer, POOL * per_edit, seed=seed)
    texts = [
        text
        for text in generated
        if not (check.contains_scored_prompt(text) or check.mentions_edit(text) or text in PREFIXES)
    ]
    if len(texts) < per_edit:
        raise EditError(
            f"prefixes={per_edit} is too high: only {len(texts)} of {len(generated)} generated prefixes can be used. "
            "The others contain text of an edit or of the evaluation; set prefixes to a smaller number."
        )
    paraphrases = with_prefixes(edits, texts, per_edit, seed)
    leaked = sum(check.contains_scored_prompt(example.prompt) for example in paraphrases)
    return texts, (
        f"{len(paraphrases) - leaked} pseudo-paraphrases from {len(texts)} prefixes (left out because they contain "
        f"text of an edit or of the evaluation: {len(generated) - len(texts)} prefixes and {leaked} paraphrases, "
        f"fraction {leaked / len(paraphrases):.3f} of the paraphrases)"
    )


def _check_lengths(
    model: Any, tokenizer: Any, added: Mapping[str, Sequence[Edit]], prompt_format: PromptFormat
) -> None:
    """Raise an error before the training if an example is longer than the context of the model."""
    for name, examples in added.items():
        if examples:
            longest = context_length(unwrap_model(model).config)
            EditDataset(examples, name=name).encode(tokenizer, max_length=longest, prompt_format=prompt_format)
