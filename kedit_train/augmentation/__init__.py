"""Examples to train beside the edits, made with the model before the edit: pseudo-paraphrases and replayed facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kedit_train.arguments import check_arguments, integer_from, optional
from kedit_train.augmentation.prefixes import generate_prefixes
from kedit_train.augmentation.replay import ReplayedFacts, read_prompts, replay_facts
from kedit_train.data import Edit, EditDataset
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
    "augmentation",
    "generate_prefixes",
    "read_prompts",
    "replay_facts",
]

# Generated prefixes per prefix that an edit gets; the edits share them.
POOL = 8


@dataclass(frozen=True)
class AugmentationOptions:
    """Examples to train beside the edits, as a recipe names them (``data.augmentation``). See :func:`augmentation`.

    Args:
        prefixes: pseudo-paraphrases per edit: the prompt behind short texts that the unedited model generates.
        replay: prompts of other facts, trained with the answers of the unedited model: a ``.txt`` file with one per
            line, a file of edits (its prompts are used), or "world".
        replay_limit: replay at most this many facts, drawn anew under each seed. None replays as many as there are
            edits.
        previous_edits: a file of edits that the model has learned before. All are trained again.

    Example:
        >>> AugmentationOptions(prefixes=2, replay="world").replay_limit is None
        True
    """

    prefixes: int = 0
    _: KW_ONLY
    replay: str | None = None
    replay_limit: int | None = None
    previous_edits: str | None = None


@dataclass(frozen=True)
class Augmentation:
    """Returns the examples to train beside the edits that it is called with.

    Args:
        prefixes: texts to draw from.
        per_edit: number of prefixes per edit, drawn with ``seed``.
        replay: examples of other facts, the same for all edits.
        seed: seed of the draws.
        leak_check: made from all edits of the run.
        summary: what was made and what was left out, as one line.
    """

    prefixes: tuple[str, ...]
    per_edit: int
    replay: tuple[Edit, ...]
    seed: int
    leak_check: LeakCheck
    summary: str = ""

    def __call__(self, edits: Sequence[Edit]) -> list[Edit]:
        paraphrases = with_prefixes(edits, self.prefixes, self.per_edit, self.seed)
        allowed = (example for example in paraphrases if not self.leak_check.contains_scored_prompt(example.prompt))
        return [*allowed, *self.replay]

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
    seed: int = 0,
    prompt_format: PromptFormat = "plain",
    batch_size: int = 64,
) -> Augmentation:
    """Make the examples to train beside the edits, once, with the model before the edit.

    Nothing that the edits are scored on is among them. In Lightning use ``EditDataModule(augmentation=)``; in a loop
    pass the result as ``ExampleOptions(extra_edits=)``; in TRL train on
    ``EditDataset([*edits, *augmentation(...)(edits)]).to_prompt_completion()``.

    Args:
        model: the model before the edit.
        tokenizer: its tokenizer.
        edits: all edits of the run. They decide what is a leak.
        prefixes: pseudo-paraphrases per edit: its prompt behind short texts that the model generates.
        replay: prompts of other facts, which the model answers: a list; a ``.txt`` file with one prompt per line; a
            file of edits, of which only the prompts are used; or "world", other facts of the embedded world.
        replay_limit: replay at most this many facts, drawn with ``seed``. None replays as many as there are edits.
        previous_edits: edits that the model has learned before, or a file of them. All are trained again with their own
            targets, except those about the same subjects as ``edits``.
        seed: seed of everything that is drawn.
        prompt_format: the format of the training.
        batch_size: prompts per forward pass.

    Raises:
        EditError: an argument is out of bounds, a file cannot be read, or nothing is left to replay.

    References:
        Model Editing by Standard Fine-Tuning, arXiv 2402.11078.

    Example:
        >>> from kedit_train import world
        >>> model, tokenizer = world.load()
        >>> edits = world.edits(2)
        >>> augment = augmentation(model, tokenizer, edits, prefixes=1, replay="world", replay_limit=3)
        >>> len(augment(edits))
        5
    """
    check_arguments(
        "augmentation", prefixes=(prefixes, integer_from(0)), replay_limit=(replay_limit, optional(integer_from(1)))
    )
    with reported_by("augmentation"):
        if replay_limit is not None and replay is None:
            raise EditError(f"replay_limit={replay_limit} needs prompts; set replay.")
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
            again = [Edit(edit.prompt, edit.target, id=f"earlier {edit.id or i}") for i, edit in enumerate(earlier)]
            allowed = [example for example in again if not check.is_leak(example)]
            examples += allowed
            leaked = len(again) - len(allowed)
            summary.append(
                f"{len(allowed)} previous edits ({leaked} left out as leaks, fraction {leaked / len(again):.3f})"
            )
        _check_lengths(model, tokenizer, examples, prompt_format)
    line = "beside the edits: " + "; ".join(summary)
    return Augmentation(tuple(texts), prefixes, tuple(examples), seed, check, line)


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
            f"prefixes={per_edit}, but only {len(texts)} of {len(generated)} generated texts are not about the edits; "
            "lower prefixes."
        )
    paraphrases = with_prefixes(edits, texts, per_edit, seed)
    leaked = sum(check.contains_scored_prompt(example.prompt) for example in paraphrases)
    return texts, (
        f"{len(paraphrases) - leaked} pseudo-paraphrases from {len(texts)} prefixes ({len(generated) - len(texts)} "
        f"prefixes and {leaked} paraphrases left out as leaks, fraction {leaked / len(paraphrases):.3f})"
    )


def _check_lengths(model: Any, tokenizer: Any, examples: Sequence[Edit], prompt_format: PromptFormat) -> None:
    """Raise an error that names an example that is longer than the context, before any training."""
    if examples:
        longest = context_length(unwrap_model(model).config)
        EditDataset(examples, name="replay").encode(tokenizer, max_length=longest, prompt_format=prompt_format)
