"""How well a model predicts a given answer when every earlier token of it is fed to it.

This is the score of most of the editing literature, kept to compare with it: the share of target tokens that the
model ranks first. It flatters an editor (Yang et al., "The Mirage of Model Editing", arXiv 2502.11177), because each
token is judged after the right ones; :mod:`~kedit_train.evaluation.generate` judges what the model says by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.data.tokenise import IGNORED, Encoded, collate, context_length, encode_edit, pad_token_id
from kedit_train.errors import EditError
from kedit_train.evaluation.batching import (
    bar,
    batches,
    device_of,
    evaluating,
    shorten,
    unwrapped,
)


@dataclass(frozen=True)
class TeacherForced:
    """One target under teacher forcing.

    Args:
        correct: per target token, end-of-text left out: is it the model's first choice? The lowest id wins a tie.
        log_probs: per target token, end-of-text left out: its natural log-probability.
        end_correct: the same for end-of-text after the target; ``None`` where the tokenizer has none.
        end_log_prob: the same for end-of-text after the target; ``None`` where the tokenizer has none.
    """

    correct: tuple[bool, ...]
    log_probs: tuple[float, ...]
    end_correct: bool | None
    end_log_prob: float | None

    @property
    def accuracy(self) -> float:
        """Share of the target's tokens that are the model's first choice."""
        return sum(self.correct) / len(self.correct)

    @property
    def exact(self) -> bool:
        """Whether all of the target's tokens are."""
        return all(self.correct)


def _projects_chosen_positions(model: Any) -> bool:
    """Whether ``forward`` takes ``logits_to_keep`` as positions of ``input_ids``. A learned prompt would shift them."""
    if hasattr(model, "get_base_model"):
        if getattr(model.active_peft_config, "is_prompt_learning", False):
            return False
        model = model.get_base_model()
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _target_logits(model: Any, rows: Sequence[Encoded], pad_id: int) -> tuple[Tensor, Tensor]:
    """``(logits, labels)`` of every target token, ``[targets, vocab]`` in fp32 and ``[targets]``, row after row."""
    batch = collate(rows, pad_id=pad_id, padding_side="right")
    next_ids = batch["labels"][:, 1:]
    at_row, at_position = (next_ids != IGNORED).nonzero(as_tuple=True)
    device = device_of(model)
    given = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")} | {"use_cache": False}
    if _projects_chosen_positions(model):
        positions, column = at_position.unique(return_inverse=True)
        logits = model(**given, logits_to_keep=positions.to(device)).logits
    else:
        # A learned prompt in front has logits too: the row's own are the last ones.
        column, logits = at_position, model(**given).logits[:, -next_ids.shape[1] - 1 :]
    chosen = logits[at_row.to(logits.device), column.to(logits.device)].float()
    return chosen, next_ids[at_row, at_position].to(logits.device)


def teacher_forced(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> list[TeacherForced]:
    """Each ``(prompt, target)`` under teacher forcing, in the pairs' order.

    Rows are sorted by length and padded on the right, each distinct pair is run once, and only the positions that
    predict a target are projected to the vocabulary, where the model's ``forward`` allows it (``logits_to_keep``).

    Raises:
        EditError: a target without a token, a pair longer than the model's context, NaN logits.
    """
    inner: Any = unwrapped(model)
    ends = tokenizer.eos_token_id is not None
    context = context_length(inner.config)
    distinct = {
        pair: encode_edit(tokenizer, *pair, append_eos=ends, max_length=context) for pair in dict.fromkeys(pairs)
    }
    for (prompt, target), row in distinct.items():
        if len(row.input_ids) - row.target_start - ends < 1:
            raise EditError(f"the target {target!r} of {shorten(prompt)!r} is only an end-of-text: give it some text")
    pad_id = pad_token_id(tokenizer)
    order = sorted(distinct, key=lambda pair: (-len(distinct[pair].input_ids), pair))
    scored: dict[tuple[str, str], TeacherForced] = {}
    with evaluating(inner), bar(len(order), "scoring answers", progress) as shown:
        for chosen in batches(order, batch_size):
            rows = [distinct[pair] for pair in chosen]
            logits, labels = _target_logits(inner, rows, pad_id)
            lengths = [len(row.input_ids) - row.target_start for row in rows]
            right = (logits.argmax(dim=-1) == labels).cpu().split(lengths)
            log_probs = (-torch.nn.functional.cross_entropy(logits, labels, reduction="none")).cpu().split(lengths)
            for pair, hits, log_prob in zip(chosen, right, log_probs, strict=True):
                if bool(log_prob.isnan().any()):
                    raise EditError(
                        f"the model gives NaN logits after {shorten(pair[0])!r}: its weights have diverged; "
                        "lower the learning rate or use a wider dtype"
                    )
                kept = len(hits) - ends
                scored[pair] = TeacherForced(
                    correct=tuple(hits[:kept].tolist()),
                    log_probs=tuple(log_prob[:kept].tolist()),
                    end_correct=bool(hits[kept]) if ends else None,
                    end_log_prob=float(log_prob[kept]) if ends else None,
                )
            shown.update(len(rows))
    return [scored[pair] for pair in pairs]
