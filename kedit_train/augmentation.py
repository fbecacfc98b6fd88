"""Examples to train beside the edits, made with the model before the edit: pseudo-paraphrases and replayed facts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kedit_train import world
from kedit_train.arguments import check_arguments, integer_from, optional
from kedit_train.core.locality.texts import Texts
from kedit_train.data import Edit, EditDataset
from kedit_train.data.leaks import LeakCheck, with_prefixes
from kedit_train.data.prompts import PromptFormat
from kedit_train.data.readers.files import SUFFIXES
from kedit_train.data.tokenization import context_length, token_ids
from kedit_train.errors import EditError, reported_by
from kedit_train.evaluation import generate_answers
from kedit_train.evaluation.asking.batching import inference_context, model_device, unwrap_model
from kedit_train.evaluation.asking.probes import PREFIXES

# Generated prefixes per prefix that an edit gets; the edits share them.
POOL = 8
# First words of generated texts if the tokenizer has no begin-of-text token.
OPENINGS = ("The", "In", "It", "When", "A", "We", "There", "This")


@torch.no_grad()
def generate_prefixes(
    model: nn.Module, tokenizer: Any, n: int, lengths: Sequence[int] = (5, 10), seed: int = 0
) -> list[str]:
    """Return ``n`` different short texts that the model samples from its begin-of-text token, at temperature 1.

    If the tokenizer has no such token, the texts start with common words. Special tokens are not sampled. A text
    without punctuation at its end gets a full stop. The same seed gives the same texts on the same device. The global
    random state of torch is not used.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        n: number of texts.
        lengths: numbers of tokens; each length gets an equal share of the texts.
        seed: seed of the samples.

    Raises:
        EditError: the model repeats itself, so that there are fewer than ``n`` different texts.

    Example:
        >>> from kedit_train import world
        >>> model, tokenizer = world.load()
        >>> len(generate_prefixes(model, tokenizer, 4))
        4
    """
    inner, generator = unwrap_model(model), torch.Generator().manual_seed(seed)
    distinct: dict[str, None] = {}
    with inference_context(inner):
        for _ in range(8):
            for length in lengths:
                texts = _sample(inner, tokenizer, -(-n // len(lengths)), length, generator)
                distinct.update(dict.fromkeys(text for text in texts if text.strip(" .")))
            if len(distinct) >= n:
                # A random choice, so that each length keeps its share.
                return random.Random(seed).sample(list(distinct), n)
    raise EditError(
        f"n={n} different texts are needed and the model generated only {len(distinct)}; ask for fewer.",
        component="generate_prefixes",
    )


def _sample(model: Any, tokenizer: Any, n: int, length: int, generator: torch.Generator) -> list[str]:
    begin = tokenizer.bos_token_id
    starts = [[begin]] if begin is not None else [token_ids(tokenizer, word, special=False)[:1] for word in OPENINGS]
    ids = torch.tensor([starts[i % len(starts)] for i in range(n)], device=model_device(model))
    special = torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.long)
    for _ in range(length):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1].float().cpu()
        # The head may have more outputs than the tokenizer has tokens.
        logits[:, len(tokenizer) :] = -torch.inf
        logits[:, special[special < logits.shape[1]]] = -torch.inf
        sampled = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, sampled.to(ids.device)], dim=1)
    texts = (" ".join(tokenizer.decode(text, skip_special_tokens=True).split()) for text in ids)
    return [text if text[-1:] in tuple(".!?:。！？") else f"{text}." for text in texts]


@dataclass(frozen=True)
class ReplayedFacts:
    """Facts that are not edited, as training examples.

    Args:
        examples: prompts with the answers of the model before the edit.
        prompts: number of different prompts that were considered.
        leaked: prompts left out because an edit is scored on them or is about the same subject.
        empty: prompts left out because the model generated nothing.
        cut_off: prompts left out because the model did not end its answer within ``max_new_tokens``.
    """

    examples: tuple[Edit, ...]
    prompts: int
    leaked: int
    empty: int = 0
    cut_off: int = 0

    def describe(self) -> str:
        """Return the counts as one phrase."""
        fraction = self.leaked / max(1, self.prompts)
        return (
            f"of {self.prompts} prompts {self.leaked} left out as leaks (fraction {fraction:.3f}), {self.empty} "
            f"without an answer, {self.cut_off} with an answer that did not end"
        )


def replay_facts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    edits: Sequence[Edit],
    *,
    limit: int | None = None,
    seed: int = 0,
    prompt_format: PromptFormat = "plain",
    batch_size: int = 64,
    max_new_tokens: int = 32,
) -> ReplayedFacts:
    """Return prompts with the model's own greedy answers, as training examples beside ``edits``.

    Prompts that the edits are scored on or that are about an edit are left out
    (:meth:`~kedit_train.data.leaks.LeakCheck.is_leak`), as are prompts that the model does not answer.

    Args:
        model: the model before the edit.
        tokenizer: its tokenizer.
        prompts: prompts of other facts. Duplicates count once.
        edits: the edits of the run.
        limit: at most this many examples, in an order drawn with ``seed``. None takes all.
        seed: seed of the order.
        prompt_format: the format of the training.
        batch_size: prompts per forward pass.
        max_new_tokens: longest answer.

    Raises:
        EditError: no example is left.

    Example:
        >>> from kedit_train import world
        >>> model, tokenizer = world.load()
        >>> edits = world.edits(2)
        >>> facts = replay_facts(model, tokenizer, world.other_prompts(exclude=edits)[:20], edits, limit=3)
        >>> len(facts.examples)
        3
    """
    check, order = LeakCheck(edits), list(dict.fromkeys(prompts))
    random.Random(seed).shuffle(order)
    allowed = [prompt for prompt in order if not check.is_leak(Edit(prompt, ""))]
    leaked, empty, cut_off = len(order) - len(allowed), 0, 0
    examples: list[Edit] = []
    wanted = len(allowed) if limit is None else limit
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "prompt_format": prompt_format}
    for start in range(0, len(allowed), batch_size):
        if len(examples) >= wanted:
            break
        batch = allowed[start : start + batch_size]
        answers = generate_answers(model, tokenizer, batch, batch_size=batch_size, **options)
        for prompt, answer in zip(batch, answers, strict=True):
            example = Edit(prompt, answer.text, id=f"replayed {prompt!r}")
            if not answer.text:
                empty += 1
            elif not answer.ended:
                cut_off += 1
            elif check.is_leak(example):
                leaked += 1
            else:
                examples.append(example)
    facts = ReplayedFacts(tuple(examples[:wanted]), len(order), leaked, empty, cut_off)
    if not examples:
        raise EditError(f"no prompt is left to replay: {facts.describe()}; give prompts of other facts.")
    return facts


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


def read_prompts(source: str | Path | Sequence[str], edits: Sequence[Edit]) -> list[str]:
    """Read the prompts of ``augmentation(replay=)``.

    Args:
        source: a list, a ``.txt`` file, a file of edits, or "world".
        edits: the edits of the run. With "world", facts that depend on them are left out.

    Raises:
        EditError: there is no such file, or its kind is unknown.

    Example:
        >>> read_prompts(["The capital of France is"], [])
        ['The capital of France is']
    """
    if world.is_world(source):
        return world.other_prompts(exclude=edits)
    if not isinstance(source, str | Path):
        return list(source)
    path, kinds = Path(source), ", ".join(SUFFIXES)
    if not path.is_file():
        raise EditError(
            f"replay: there is no file {str(path)!r} in {Path.cwd()}; give a .txt file with one prompt per line, or a "
            f"file of edits ({kinds})."
        )
    if path.suffix.lower() not in (".txt", *SUFFIXES):
        raise EditError(
            f"replay: {path} must be a .txt file with one prompt per line, or a file of edits ({kinds}); rename or "
            "convert it."
        )
    if path.suffix.lower() == ".txt":
        return [line.strip() for line in Texts(source).load()]
    return [edit.prompt for edit in EditDataset.load(source)]
