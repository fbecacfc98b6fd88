"""``teacher_forced``: score a given answer token by token, while the model reads the correct earlier tokens.

Most of the editing literature reports this score, so it is kept for comparison. Teacher forcing overestimates the
success of an edit (Yang et al., "The Mirage of Model Editing", arXiv 2502.11177), because each token is predicted after
the correct earlier tokens. In :mod:`~kedit_train.evaluation.asking.generate`, the model generates its answers freely.

A teacher-forced pass also gives the first tokens of the greedy answer, up to and including the first token that differs
from the target. An evaluation does not generate these tokens again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.data.prompts import PromptFormat, check_format, end_id, pair_ids
from kedit_train.data.tokenization import context_length, pad_token_id
from kedit_train.evaluation.asking.batching import DivergedError, inference_context, progress_bar, unwrap_model
from kedit_train.evaluation.asking.logits import target_logits


@dataclass(frozen=True)
class TeacherForced:
    """The scores of one target under teacher forcing.

    Args:
        correct: for each target token except end-of-text, True if the model ranks the token first. If two tokens are
            equally probable, the token with the lower id ranks first.
        log_probs: for each target token except end-of-text, the log-probability of the token, in nats.
        end_correct: True if the model ranks end-of-text first after the target. None without an end-of-text token.
        end_log_prob: log-probability of end-of-text after the target, in nats. None without an end-of-text token.
        choices: the token that the model ranks first at each position.
        margins: the difference between the two largest logits at each position.
    """

    correct: tuple[bool, ...]
    log_probs: tuple[float, ...]
    end_correct: bool | None
    end_log_prob: float | None
    choices: tuple[int, ...] = field(default=(), compare=False, repr=False)
    margins: tuple[float, ...] = field(default=(), compare=False, repr=False)

    @property
    def accuracy(self) -> float:
        """The fraction of the target's tokens that the model ranks first."""
        return sum(self.correct) / len(self.correct)

    @property
    def exact(self) -> bool:
        """True if the model ranks all tokens of the target first."""
        return all(self.correct)

    @property
    def mean_log_prob(self) -> float:
        """The mean log-probability of the target's tokens, as CounterFact computes it (arXiv 2202.05262)."""
        return sum(self.log_probs) / len(self.log_probs)

    def greedy_start(self, is_end: Callable[[int], bool]) -> tuple[list[int], float]:
        """Return the first tokens of the greedy answer, and the smallest of their ``margins``.

        The tokens are read from ``choices``. Reading stops after a token that differs from the target. It also stops
        after a token for which ``is_end`` returns True.
        """
        correct = (*self.correct, *(() if self.end_correct is None else (self.end_correct,)))
        count = 0
        for choice, hit in zip(self.choices, correct, strict=True):
            count += 1
            if is_end(choice) or not hit:
                break
        return list(self.choices[:count]), min(self.margins[:count])


def teacher_forced(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int = 64,
    prompt_format: PromptFormat = "plain",
    progress: bool = False,
) -> list[TeacherForced]:
    """Score each (prompt, target) pair under teacher forcing.

    Args:
        model: a causal language model. The model is left unchanged.
        tokenizer: the model's tokenizer.
        pairs: the (prompt, target) pairs. Equal pairs run only once.
        batch_size: pairs per forward pass.
        prompt_format: "plain", "chat" (the tokenizer's chat template) or "question" (the prompt is framed as a question
            that ends with "A:").
        progress: show a progress bar in a terminal.

    Returns:
        One :class:`TeacherForced` per pair, in the order of ``pairs``.

    Raises:
        EditError: a target has no token, a pair is longer than the model's context, or the logits are NaN.
    """
    inner: Any = unwrap_model(model)
    check_format(prompt_format, tokenizer)
    has_end = end_id(tokenizer, prompt_format) is not None
    context = context_length(inner.config)
    distinct = list(dict.fromkeys(pairs))
    sequences = [pair_ids(tokenizer, *pair, prompt_format, context) for pair in distinct]
    scores: dict[tuple[str, str], TeacherForced] = {}
    with inference_context(inner), progress_bar(len(sequences), "scoring answers", progress) as bar:
        for numbers, logits, labels in target_logits(
            inner, sequences, pad_id=pad_token_id(tokenizer), batch_size=batch_size
        ):
            for number, own in zip(numbers, score_targets(logits, labels, has_end), strict=True):
                if any(value != value for value in own.log_probs):
                    raise DivergedError(distinct[number][0])
                scores[distinct[number]] = own
            bar.update(len(numbers))
    return [scores[pair] for pair in pairs]


def score_targets(logits: Sequence[Tensor], labels: Sequence[Tensor], has_end: bool) -> list[TeacherForced]:
    """Compute the scores of targets from the logits that predict their tokens.

    Args:
        logits: [tokens, vocabulary] in fp32 for each target.
        labels: [tokens] for each target.
        has_end: True if the last label of each target is an end-of-text token.
    """
    all_logits, all_labels = torch.cat(list(logits)), torch.cat(list(labels))
    log_probs = -torch.nn.functional.cross_entropy(all_logits, all_labels, reduction="none")
    top = all_logits.topk(2, dim=-1).values
    lengths = [len(own) for own in labels]
    columns = (all_logits.argmax(dim=-1), log_probs, top[:, 0] - top[:, 1], all_labels)
    scores = []
    for choices, log_prob, margins, expected in zip(*(column.cpu().split(lengths) for column in columns), strict=True):
        correct, length = (choices == expected).tolist(), len(choices) - has_end
        scores.append(
            TeacherForced(
                correct=tuple(correct[:length]),
                log_probs=tuple(log_prob[:length].tolist()),
                end_correct=correct[length] if has_end else None,
                end_log_prob=float(log_prob[length]) if has_end else None,
                choices=tuple(choices.tolist()),
                margins=tuple(margins.tolist()),
            )
        )
    return scores
