"""How well a model predicts a given answer when every earlier token of it is fed to it.

This is the score of most of the editing literature, kept to compare with it: the share of target tokens that the
model ranks first. It flatters an editor (Yang et al., "The Mirage of Model Editing", arXiv 2502.11177), because each
token is judged after the right ones; :mod:`~kedit_train.evaluation.asking.generate` judges the model's own text.

The same forward pass says how greedy generation begins: up to and including its first choice that is not the target's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kedit_train.data.prompts import PromptFormat, check_format, end_id, pair_ids
from kedit_train.data.tokenization import context_length, pad_token_id
from kedit_train.evaluation.asking.batching import DivergedError, bar, evaluating, unwrapped
from kedit_train.evaluation.asking.logits import target_logits


@dataclass(frozen=True)
class TeacherForced:
    """One target under teacher forcing.

    Args:
        correct: per target token, end-of-text left out: is it the model's first choice? The lowest id wins a tie.
        log_probs: per target token, end-of-text left out: its natural log-probability.
        end_correct: the same for end-of-text after the target; ``None`` where the tokenizer has none.
        end_log_prob: the same for end-of-text after the target; ``None`` where the tokenizer has none.
        choices: the model's first choice at each of these positions, and margins: how far, in logits, it lies before
            the second.
    """

    correct: tuple[bool, ...]
    log_probs: tuple[float, ...]
    end_correct: bool | None
    end_log_prob: float | None
    choices: tuple[int, ...] = field(default=(), compare=False, repr=False)
    margins: tuple[float, ...] = field(default=(), compare=False, repr=False)

    @property
    def accuracy(self) -> float:
        """Share of the target's tokens that are the model's first choice."""
        return sum(self.correct) / len(self.correct)

    @property
    def exact(self) -> bool:
        """Whether all of the target's tokens are."""
        return all(self.correct)

    @property
    def mean_log_prob(self) -> float:
        """Mean log-probability of the target's tokens: what CounterFact compares (arXiv 2202.05262)."""
        return sum(self.log_probs) / len(self.log_probs)

    def begins(self, stops: Callable[[int], bool]) -> tuple[list[int], float]:
        """How greedy generation begins: its first tokens, and the smallest margin among them.

        They reach to the first token at which generation ``stops``, or that is not the target's.
        """
        right = (*self.correct, *(() if self.end_correct is None else (self.end_correct,)))
        count = 0
        for choice, hit in zip(self.choices, right, strict=True):
            count += 1
            if stops(choice) or not hit:
                break
        return list(self.choices[:count]), min(self.margins[:count])


def teacher_forced(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int = 64,
    progress: bool = False,
    prompt_format: PromptFormat = "plain",
) -> list[TeacherForced]:
    """Each ``(prompt, target)`` under teacher forcing, in the pairs' order; each distinct pair is run once.

    Raises:
        EditError: a target without a token, a pair longer than the model's context, NaN logits.
    """
    inner: Any = unwrapped(model)
    check_format(prompt_format, tokenizer)
    ends = end_id(tokenizer, prompt_format) is not None
    context = context_length(inner.config)
    distinct = list(dict.fromkeys(pairs))
    rows = [pair_ids(tokenizer, *pair, prompt_format, context) for pair in distinct]
    scored: dict[tuple[str, str], TeacherForced] = {}
    with evaluating(inner), bar(len(rows), "scoring answers", progress) as shown:
        for numbers, logits, labels in target_logits(
            inner, rows, pad_id=pad_token_id(tokenizer), batch_size=batch_size
        ):
            found = torch.cat(logits)
            log_probs = -torch.nn.functional.cross_entropy(found, torch.cat(labels), reduction="none")
            top = found.topk(2, dim=-1).values
            lengths = [len(own) for own in labels]
            columns = (found.argmax(dim=-1), log_probs, top[:, 0] - top[:, 1], torch.cat(labels))
            for number, choices, log_prob, margins, wanted in zip(
                numbers, *(column.cpu().split(lengths) for column in columns), strict=True
            ):
                if bool(log_prob.isnan().any()):
                    raise DivergedError(distinct[number][0])
                hits, kept = (choices == wanted).tolist(), len(choices) - ends
                scored[distinct[number]] = TeacherForced(
                    correct=tuple(hits[:kept]),
                    log_probs=tuple(log_prob[:kept].tolist()),
                    end_correct=hits[kept] if ends else None,
                    end_log_prob=float(log_prob[kept]) if ends else None,
                    choices=tuple(choices.tolist()),
                    margins=tuple(margins.tolist()),
                )
            shown.update(len(numbers))
    return [scored[pair] for pair in pairs]
