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

from kedit_train.data.tokenise import Encoded, encode_edit, pad_token_id
from kedit_train.errors import EditError
from kedit_train.evaluation.batching import (
    bar,
    batches,
    context_length,
    device_of,
    evaluating,
    padded,
    require_batch_size,
    shorten,
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


def _target_logits(model: Any, rows: Sequence[Encoded], pad_id: int) -> Tensor:
    """The logits that predict each target token, ``[targets of all rows, vocab]`` in fp32, row after row."""
    ids, mask = padded([row.input_ids for row in rows], pad_id, side="right")
    at_row = torch.tensor([i for i, row in enumerate(rows) for _ in range(row.target_start, len(row.input_ids))])
    at_position = torch.tensor([t - 1 for row in rows for t in range(row.target_start, len(row.input_ids))])
    device = device_of(model)
    given = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
    if _projects_chosen_positions(model):
        positions, column = at_position.unique(return_inverse=True)
        logits = model(**given, logits_to_keep=positions.to(device)).logits
    else:
        column, logits = at_position, model(**given).logits[:, -ids.shape[1] :]
    return logits[at_row.to(logits.device), column.to(logits.device)].float()


def _encoded(model: nn.Module, tokenizer: Any, prompt: str, target: str) -> Encoded:
    row = encode_edit(tokenizer, prompt, target, append_eos=tokenizer.eos_token_id is not None)
    ends = tokenizer.eos_token_id is not None
    context = context_length(model)
    if len(row.input_ids) - row.target_start - ends < 1 or row.target_start < 1:
        raise EditError(
            f"prompt {shorten(prompt)!r} with target {shorten(target)!r} leaves no target token to predict: "
            "give both some text"
        )
    if context is not None and len(row.input_ids) > context:
        raise EditError(
            f"prompt {shorten(prompt)!r} with its answer has {len(row.input_ids)} tokens and the model's context is "
            f"{context}: shorten it or leave it out"
        )
    return row


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
    require_batch_size(batch_size)
    distinct = {pair: _encoded(model, tokenizer, *pair) for pair in dict.fromkeys(pairs)}
    ends = tokenizer.eos_token_id is not None
    pad_id = pad_token_id(tokenizer)
    order = sorted(distinct, key=lambda pair: (-len(distinct[pair].input_ids), pair))
    scored: dict[tuple[str, str], TeacherForced] = {}
    with evaluating(model), bar(len(order), "scoring answers", progress) as shown:
        for part in batches(range(len(order)), batch_size):
            chosen = [order[i] for i in part]
            rows = [distinct[pair] for pair in chosen]
            logits = _target_logits(model, rows, pad_id)
            labels = torch.tensor([t for row in rows for t in row.input_ids[row.target_start :]], device=logits.device)
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
