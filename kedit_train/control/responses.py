"""Responses on which a value function is trained: sampled from the model, or given by the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.arguments import above, check_arguments, integer_from
from kedit_train.data.chat_format import PromptFormat
from kedit_train.data.prompts import encode_in_format, encode_prompts, end_id
from kedit_train.data.tokenization import context_length, pad_token_id
from kedit_train.evaluation.asking.batching import (
    DivergedError,
    inference_context,
    split_into_batches,
    unwrap_model,
)
from kedit_train.evaluation.asking.decoding import Continuation, PromptBatch, can_pad
from kedit_train.evaluation.asking.generate import AnswerEnd


@dataclass(frozen=True)
class Response:
    """A response to a prompt, as text and as tokens.

    Args:
        prompt: the prompt as the user gave it.
        text: the response.
        prompt_ids: the token ids from which the model generates.
        ids: the token ids of the response, including its end token if it has one.
    """

    prompt: str
    text: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How responses are sampled from the model.

    Args:
        samples: number of responses per prompt.
        temperature: the logits are divided by this number, > 0.
        max_new_tokens: maximum length of a response, in tokens.
        batch_size: number of responses per forward pass.
        seed: seed of the random numbers. The random numbers of a response do not depend on ``batch_size``. However,
            ``batch_size`` can change the rounding of the logits, and this can change a response.

    Example:
        >>> SamplingOptions(samples=2).temperature
        1.0
    """

    samples: int = 4
    temperature: float = 1.0
    max_new_tokens: int = 64
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        check_arguments(
            self,
            samples=(self.samples, integer_from(1)),
            temperature=(self.temperature, above(0)),
            max_new_tokens=(self.max_new_tokens, integer_from(1)),
            batch_size=(self.batch_size, integer_from(1)),
            seed=(self.seed, integer_from(0)),
        )


def encode_responses(
    model: nn.Module, tokenizer: Any, records: Sequence[Mapping[str, str]], prompt_format: PromptFormat = "plain"
) -> list[Response]:
    """Tokenize given responses. Each response gets an end token if the tokenizer has one.

    Args:
        model: the language model. A prompt with its response must not be longer than the context of the model.
        tokenizer: its tokenizer.
        records: mappings with the keys ``prompt`` and ``response``.
        prompt_format: "plain", "chat", "question" or a ``ChatFormat``.

    Raises:
        EditError: a response has no tokens, or is too long for the context.
    """
    longest, ends = context_length(unwrap_model(model).config), end_id(tokenizer, prompt_format) is not None
    responses = []
    for number, record in enumerate(records, 1):
        prompt, text = record["prompt"], record["response"]
        pair = encode_in_format(
            tokenizer, prompt, text, prompt_format, append_eos=ends, max_length=longest, where=f"response {number}"
        )
        ids, start = pair.input_ids, pair.target_start
        responses.append(Response(prompt, text, tuple(ids[:start]), tuple(ids[start:])))
    return responses


def sample_responses(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    options: SamplingOptions,
    prompt_format: PromptFormat = "plain",
    *,
    first: int = 0,
) -> list[Response]:
    """Sample one response for each prompt. To get several responses to a prompt, pass the prompt several times.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompts: the prompts.
        options: temperature, length, batch size and seed. ``options.samples`` is not used.
        prompt_format: "plain", "chat", "question" or a ``ChatFormat``.
        first: number of the first response. The next responses are numbered first + 1, first + 2 and so on. The random
            numbers of a response depend only on its number and on the seed.

    Returns:
        One response per prompt, in the same order.

    Raises:
        DivergedError: the model gives logits that are NaN or infinite.
    """
    inner: Any = unwrap_model(model)
    context = context_length(inner.config)
    sequences = encode_prompts(tokenizer, prompts, context, prompt_format)
    is_end = AnswerEnd(inner, tokenizer, (), prompt_format)
    limits = [min(options.max_new_tokens, (context or 10**9) - len(s)) for s in sequences]
    draws = [_uniform(options.seed, first + i, limit) for i, limit in enumerate(limits)]
    order = sorted(range(len(prompts)), key=lambda i: -len(sequences[i]))
    padded = can_pad(inner)
    groups = [list(group) for _, group in groupby(order, key=lambda i: 0 if padded else len(sequences[i]))]
    found: dict[int, list[int]] = {}
    with inference_context(inner):
        for batch in (batch for group in groups for batch in split_into_batches(group, options.batch_size)):
            rows = PromptBatch(inner, [sequences[i] for i in batch], pad_token_id(tokenizer))
            given, texts = [draws[i] for i in batch], [prompts[i] for i in batch]
            sampled = _sample(rows, texts, given, is_end, options.temperature, len(tokenizer))
            found |= dict(zip(batch, sampled, strict=True))
    responses = []
    for i, prompt in enumerate(prompts):
        ended = is_end(found[i][-1])
        text = is_end.read(Continuation(found[i], ended)).text
        responses.append(Response(prompt, text.strip(), sequences[i], tuple(found[i])))
    return responses


def _uniform(seed: int, number: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**64)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _sample(
    batch: PromptBatch,
    prompts: Sequence[str],
    draws: Sequence[Tensor],
    is_end: AnswerEnd,
    temperature: float,
    vocabulary: int,
) -> list[list[int]]:
    """Sample a continuation of each row, token by token, with the given uniform random numbers."""
    found: list[list[int]] = [[] for _ in draws]
    active = list(range(len(draws)))
    while True:
        # The head may have more outputs than the tokenizer has tokens.
        logits = batch.next_logits()[:, :vocabulary].cpu().double()
        cumulative = (logits / temperature).softmax(-1).cumsum(-1)
        # The sum is NaN if a logit is NaN or +inf. A logit of -inf is a probability of 0.
        if not bool((finite := cumulative[:, -1].isfinite()).all()):
            raise DivergedError(prompts[active[int(finite.long().argmin())]])
        uniform = torch.stack([draws[i][len(found[i])] for i in active])[:, None]
        # Because of rounding, the last cumulative sum can be below 1, and a drawn number can be above it. The division
        # by the last sum makes it exactly 1.
        tokens = torch.searchsorted(cumulative / cumulative[:, -1:], uniform, right=True).squeeze(-1)
        tokens = tokens.clamp(max=logits.shape[1] - 1)
        for i, token in zip(active, tokens.tolist(), strict=True):
            found[i].append(token)
        batch.append(tokens)
        rows = [r for r, i in enumerate(active) if len(found[i]) < len(draws[i]) and not is_end(found[i][-1])]
        if not rows:
            return found
        if len(rows) < len(active):
            batch.keep(rows)
            active = [active[r] for r in rows]
