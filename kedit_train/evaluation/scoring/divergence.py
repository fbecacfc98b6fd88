"""How far next-token distributions have moved where nothing should have: KL to the unedited model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kedit_train.data.prompts import PromptFormat, end_id, prompt_ids
from kedit_train.data.tokenization import Encoded, context_length, pad_token_id, shorten
from kedit_train.errors import EditError
from kedit_train.evaluation.asking.batching import DivergedError, bar, evaluating, unwrapped
from kedit_train.evaluation.asking.generate import Answer
from kedit_train.evaluation.asking.logits import target_logits
from kedit_train.functional.top_k_divergence import bucket_divergence, top_log_probs

# Tokens of each distribution that are told apart. The rest is one bucket: the divergence of the buckets is at most the
# true one, and equal to it for smaller vocabularies. 12 KiB a position.
KEPT = 1024


@dataclass(frozen=True)
class Distribution:
    """What the unedited model expects while it answers one prompt.

    Args:
        row: the prompt with the unedited model's own answer.
        log_probs: [positions, kept + 1], of its most probable tokens and of all others together, on the CPU.
        tokens: [positions, kept], those tokens.
    """

    row: Encoded
    log_probs: Tensor
    tokens: Tensor


def distributions(
    model: nn.Module,
    tokenizer: Any,
    answers: Mapping[str, Answer],
    *,
    prompt_format: PromptFormat = "plain",
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, Distribution]:
    """Keep what a model expects at every token of its own answers, and where they end.

    Args:
        answers: prompt -> what this model says to it.
    """
    inner: Any = unwrapped(model)
    prompts = list(answers)
    rows = [_row(inner, tokenizer, prompt, answers[prompt], prompt_format) for prompt in prompts]
    found: dict[str, Distribution] = {}
    with evaluating(inner), bar(len(rows), "keeping distributions", progress) as shown:
        for numbers, logits, _ in target_logits(inner, rows, pad_id=pad_token_id(tokenizer), batch_size=batch_size):
            for number, own in zip(numbers, logits, strict=True):
                if bool(own.isnan().any()):
                    raise DivergedError(prompts[number])
                log_probs, tokens = top_log_probs(own, min(KEPT, own.shape[-1]))
                found[prompts[number]] = Distribution(rows[number], log_probs.cpu(), tokens.cpu().int())
            shown.update(len(numbers))
    return {prompt: found[prompt] for prompt in prompts}


def _row(model: Any, tokenizer: Any, prompt: str, answer: Answer, prompt_format: PromptFormat) -> Encoded:
    head = prompt_ids(tokenizer, prompt, prompt_format)
    ids = [*head, *answer.ids]
    # The position after the last token tells whether the answer ends; an answer of no tokens has that one only.
    room = context_length(model.config) or len(ids) + 1
    if (answer.ended or not answer.ids) and len(ids) < room:
        end = end_id(tokenizer, prompt_format)
        ids.append(pad_token_id(tokenizer) if end is None else end)
    return Encoded(ids, len(head))


def divergences(
    model: nn.Module,
    tokenizer: Any,
    reference: Mapping[str, Distribution],
    prompts: Sequence[str],
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, tuple[float, ...]]:
    """KL(unedited || model), in nats, at each token of the unedited model's answer to each prompt.

    Raises:
        EditError: ``reference`` lacks a prompt, or the model gives NaN.
    """
    inner: Any = unwrapped(model)
    prompts = list(dict.fromkeys(prompts))
    for prompt in prompts:
        if prompt not in reference:
            raise EditError(
                f"the report given as before holds no distribution for {shorten(prompt)!r}: evaluate the unedited "
                "model on the same edits with metrics=('kl',) in this process (a report read from a file has none)"
            )
    rows = [reference[prompt].row for prompt in prompts]
    found: dict[str, tuple[float, ...]] = {}
    with evaluating(inner), bar(len(rows), "comparing distributions", progress) as shown:
        for numbers, logits, _ in target_logits(inner, rows, pad_id=pad_token_id(tokenizer), batch_size=batch_size):
            for number, own in zip(numbers, logits, strict=True):
                if bool(own.isnan().any()):
                    raise DivergedError(prompts[number])
                kept = reference[prompts[number]]
                tokens, log_probs = kept.tokens.long().to(own.device), kept.log_probs.to(own.device)
                # Rounding can leave it a little below zero, where no divergence is.
                moved = bucket_divergence(log_probs, tokens, own).clamp(min=0.0)
                found[prompts[number]] = tuple(moved.tolist())
            shown.update(len(numbers))
    return found
