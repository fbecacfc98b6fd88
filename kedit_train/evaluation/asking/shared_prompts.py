"""``answer_and_score``: read each prompt once, then score its targets and generate the answer from the same cache.

If teacher forcing and generation run separately, the model reads every prompt again for each target and for the answer.
If only a few tokens are generated, reading the prompts is most of the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.data.prompts import PromptFormat, check_format, encode_prompts, end_id, pair_ids
from kedit_train.data.tokenization import context_length, pad_token_id
from kedit_train.evaluation.asking.batching import (
    DivergedError,
    inference_context,
    progress_bar,
    split_into_batches,
    unwrap_model,
)
from kedit_train.evaluation.asking.decoding import PromptBatch, can_pad, continue_greedily
from kedit_train.evaluation.asking.generate import LINE_BREAK, Answer, AnswerEnd
from kedit_train.evaluation.asking.logits import MAX_LOGITS, vocabulary_size
from kedit_train.evaluation.asking.teacher_forced import TeacherForced, score_targets

# Prompts are batched from long to short. Once a batch has SMALL_BATCH prompts, the first prompt that is shorter than
# SHORTEST times the longest prompt of the batch starts a new batch. This limits the padding.
SMALL_BATCH, SHORTEST = 16, 0.75

Scores = dict[tuple[str, str], TeacherForced]


def can_share_prompts(model: nn.Module) -> bool:
    """Return True if the model supports a key-value cache and position ids, which :func:`answer_and_score` needs."""
    return can_pad(unwrap_model(model))


def answer_and_score(
    model: nn.Module,
    tokenizer: Any,
    targets: Mapping[str, Sequence[str]],
    *,
    limits: Mapping[str, int],
    stops: Sequence[str] = LINE_BREAK,
    batch_size: int = 64,
    prompt_format: PromptFormat = "plain",
    progress: bool = False,
) -> tuple[dict[str, Answer], Scores]:
    """Generate the greedy answer to each prompt, and score the prompt's targets under teacher forcing.

    Up to rounding, the results equal those of :func:`~kedit_train.evaluation.asking.generate.generate_answers` and
    :func:`~kedit_train.evaluation.asking.teacher_forced.teacher_forced`. End-of-text after a target is not scored.

    Args:
        model: a causal language model for which :func:`can_share_prompts` is True.
        tokenizer: the model's tokenizer.
        targets: dict from prompt to its targets. A prompt may have no target.
        limits: dict from prompt to the maximum number of tokens of its answer.
        stops: texts that end an answer, in addition to end-of-text.
        batch_size: prompts per forward pass.
        prompt_format: "plain", "chat" or "question"; see :class:`~kedit_train.evaluation.EvaluationOptions`.
        progress: show a progress bar in a terminal.

    Returns:
        A dict from prompt to answer, and a dict from (prompt, target) to the scores of the target.

    Raises:
        EditError: a prompt or a target has no token or is too long for the model's context, or the logits are NaN.
    """
    inner: Any = unwrap_model(model)
    check_format(prompt_format, tokenizer)
    context, pad_id = context_length(inner.config), pad_token_id(tokenizer)
    prompts = list(targets)
    encoded = dict(zip(prompts, encode_prompts(tokenizer, prompts, context, prompt_format), strict=True))
    labels = {
        (prompt, target): _target_ids(tokenizer, prompt, target, prompt_format, context)
        for prompt, own in targets.items()
        for target in own
    }
    is_end = AnswerEnd(inner, tokenizer, stops, prompt_format)
    answers: dict[str, Answer] = {}
    scores: Scores = {}
    order = sorted(prompts, key=lambda prompt: (-len(encoded[prompt]), encoded[prompt]))
    with inference_context(inner), progress_bar(len(order), "answering", progress) as bar:
        for chosen in _batches(order, [len(encoded[prompt]) for prompt in order], batch_size):
            batch = PromptBatch(inner, [encoded[prompt] for prompt in chosen], pad_id)
            first = batch.next_logits()
            _check(first, chosen)
            pairs = [(row, (prompt, t)) for row, prompt in enumerate(chosen) for t in dict.fromkeys(targets[prompt])]
            scores |= _score(batch, first, pairs, labels)
            room = [limits[p] if context is None else min(limits[p], context - len(encoded[p])) for p in chosen]
            for prompt, continuation in zip(chosen, continue_greedily(batch, first, room, is_end), strict=True):
                if continuation.diverged:
                    raise DivergedError(prompt)
                answers[prompt] = is_end.read(continuation)
            bar.update(len(chosen))
    return answers, scores


def _target_ids(
    tokenizer: Any, prompt: str, target: str, prompt_format: PromptFormat, context: int | None
) -> list[int]:
    pair = pair_ids(tokenizer, prompt, target, prompt_format, context)
    has_end = end_id(tokenizer, prompt_format) is not None
    return pair.input_ids[pair.target_start : len(pair.input_ids) - has_end]


def _batches(prompts: Sequence[str], lengths: Sequence[int], batch_size: int) -> Iterator[list[str]]:
    """Split prompts, sorted from long to short, into batches with little padding."""
    batch: list[str] = []
    longest = 0
    for prompt, length in zip(prompts, lengths, strict=True):
        is_full = len(batch) >= batch_size or (len(batch) >= SMALL_BATCH and length < SHORTEST * longest)
        if batch and is_full:
            yield batch
            batch = []
        longest = longest if batch else length
        batch.append(prompt)
    if batch:
        yield batch


def _score(
    batch: PromptBatch,
    first: Tensor,
    pairs: Sequence[tuple[int, tuple[str, str]]],
    labels: Mapping[tuple[str, str], list[int]],
) -> Scores:
    """Score the targets of one batch. Each item of ``pairs`` is (row of the prompt, (prompt, target))."""
    scores: Scores = {}
    for length, group in groupby(sorted(pairs, key=lambda one: len(labels[one[1]])), key=lambda o: len(labels[o[1]])):
        for part in split_into_batches(list(group), max(1, MAX_LOGITS // (length * vocabulary_size(batch.model)))):
            rows, own = [row for row, _ in part], [pair for _, pair in part]
            # The logits after the prompt predict the first token, so a target of one token needs no forward pass.
            logits = first[rows, None]
            if length > 1:
                rest = batch.logits_of_targets(rows, [labels[pair][:-1] for pair in own])
                logits = torch.cat([logits, torch.stack(rest)], dim=1)
            _check(logits.flatten(0, 1), [prompt for prompt, _ in own for _ in range(length)])
            expected = [torch.tensor(labels[pair], device=first.device) for pair in own]
            scores |= zip(own, score_targets(list(logits), expected, has_end=False), strict=True)
    return scores


def _check(logits: Tensor, prompts: Sequence[str]) -> None:
    """Raise an error if the logits of a row are NaN."""
    for prompt, diverged in zip(prompts, logits.isnan().any(dim=-1).tolist(), strict=True):
        if diverged:
            raise DivergedError(prompt)
