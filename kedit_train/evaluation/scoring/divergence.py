"""Measure the KL divergence from the unedited model at every token of the unedited model's own answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kedit_train.data.prompts import PromptFormat, end_id, prompt_ids
from kedit_train.data.tokenization import Encoded, context_length, pad_token_id, shorten
from kedit_train.errors import EditError
from kedit_train.evaluation.asking.batching import DivergedError, inference_context, progress_bar, unwrap_model
from kedit_train.evaluation.asking.generate import Answer
from kedit_train.evaluation.asking.logits import target_logits
from kedit_train.functional.top_k_divergence import bucket_divergence, top_log_probs

# Number of most probable tokens that are stored for each distribution. All other tokens are summed into one bucket. The
# divergence that is computed from the stored values is never larger than the true divergence. If the vocabulary has at
# most this many tokens, the computed and the true divergence are equal. The stored values take 12 KiB per position.
KEPT_TOKENS = 1024


@dataclass(frozen=True)
class Distribution:
    """The unedited model's next-token distributions along its answer to one prompt, or along a text.

    Only the k most probable tokens of each position are stored.

    Args:
        sequence: token ids: the prompt and the unedited model's answer, or a part of a text.
        log_probs: [positions, k + 1] on the CPU: the log-probabilities of ``tokens``. The last column is the
            log-probability of all other tokens together.
        tokens: [positions, k] on the CPU: the ids of the k most probable tokens.
    """

    sequence: Encoded
    log_probs: Tensor
    tokens: Tensor


def record_distributions(
    model: nn.Module,
    tokenizer: Any,
    answers: Mapping[str, Answer],
    *,
    prompt_format: PromptFormat = "plain",
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, Distribution]:
    """Record a model's next-token distributions at every token of its own answers, including the end token.

    Args:
        model: the unedited model.
        tokenizer: the model's tokenizer.
        answers: dict from prompt to the unedited model's answer.
        prompt_format: "plain", "chat" or "question"; see :class:`~kedit_train.evaluation.EvaluationOptions`.
        batch_size: sequences per forward pass.
        progress: show a progress bar in a terminal.
    """
    inner: Any = unwrap_model(model)
    prompts = list(answers)
    sequences = [_with_answer(inner, tokenizer, prompt, answers[prompt], prompt_format) for prompt in prompts]
    recorded: dict[str, Distribution] = {}
    pad_id = pad_token_id(tokenizer)
    with inference_context(inner), progress_bar(len(sequences), "recording distributions", progress) as bar:
        for numbers, logits, _ in target_logits(inner, sequences, pad_id=pad_id, batch_size=batch_size):
            for number, own in zip(numbers, logits, strict=True):
                if bool(own.isnan().any()):
                    raise DivergedError(prompts[number])
                log_probs, tokens = top_log_probs(own, min(KEPT_TOKENS, own.shape[-1]))
                recorded[prompts[number]] = Distribution(sequences[number], log_probs.cpu(), tokens.cpu().int())
            bar.update(len(numbers))
    return {prompt: recorded[prompt] for prompt in prompts}


def _with_answer(model: Any, tokenizer: Any, prompt: str, answer: Answer, prompt_format: PromptFormat) -> Encoded:
    start = prompt_ids(tokenizer, prompt, prompt_format)
    ids = [*start, *answer.ids]
    # The position after the last token shows whether the answer ends. An empty answer has only this position.
    room = context_length(model.config) or len(ids) + 1
    if (answer.ended or not answer.ids) and len(ids) < room:
        end = end_id(tokenizer, prompt_format)
        ids.append(pad_token_id(tokenizer) if end is None else end)
    return Encoded(ids, len(start))


def compute_divergences(
    model: nn.Module,
    tokenizer: Any,
    reference: Mapping[str, Distribution],
    prompts: Sequence[str],
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, tuple[float, ...]]:
    """Compute KL(unedited || model), in nats, at each token of the unedited model's answer to each prompt.

    Args:
        model: the edited model.
        tokenizer: the model's tokenizer.
        reference: dict from prompt to the unedited model's distributions.
        prompts: the prompts to compare.
        batch_size: sequences per forward pass.
        progress: show a progress bar in a terminal.

    Raises:
        EditError: a prompt is missing in ``reference``, or the model gives NaN logits.
    """
    inner: Any = unwrap_model(model)
    prompts = list(dict.fromkeys(prompts))
    for prompt in prompts:
        if prompt not in reference:
            raise EditError(
                f"the result passed as unedited= has no distribution for {shorten(prompt)!r} (a saved file has "
                "none); in this process, measure the unedited model on the same prompts without unedited=, and pass "
                'the result. With evaluate, set EvaluationOptions(metrics=["kl"]) for both models.'
            )
    sequences = [reference[prompt].sequence for prompt in prompts]
    divergences: dict[str, tuple[float, ...]] = {}
    pad_id = pad_token_id(tokenizer)
    with inference_context(inner), progress_bar(len(sequences), "comparing distributions", progress) as bar:
        for numbers, logits, _ in target_logits(inner, sequences, pad_id=pad_id, batch_size=batch_size):
            for number, own in zip(numbers, logits, strict=True):
                if bool(own.isnan().any()):
                    raise DivergedError(prompts[number])
                kept = reference[prompts[number]]
                tokens, log_probs = kept.tokens.long().to(own.device), kept.log_probs.to(own.device)
                # Rounding can give a value slightly below zero if the two distributions are equal.
                divergence = bucket_divergence(log_probs, tokens, own).clamp(min=0.0)
                divergences[prompts[number]] = tuple(divergence.tolist())
            bar.update(len(numbers))
    return divergences
