"""What a model answers, in its own words: greedy, to its own end-of-text.

Success of an edit is judged on what the model says when nobody feeds it the answer (Yang et al., "The Mirage of Model
Editing", arXiv 2502.11177: teacher forcing and cutting at the truth's length nearly triple the measured success).
An answer ends at end-of-text or at the first line break, never at a full stop: "St. Louis" is one answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from kedit_train.data.tokenise import Encoded, collate, context_length, encode_prompt, pad_token_id
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
class Answer:
    """What the model said after a prompt.

    Args:
        text: up to end-of-text or the first line break, without surrounding white space.
        ended: whether the model ended it; ``False`` where ``max_new_tokens`` or the context's end cut it.
    """

    text: str
    ended: bool


class _LineBreaks(StoppingCriteria):
    """Ends a row at the first token with a line break in it. Each id is decoded once, when it first comes up."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[int, bool] = {}

    def breaks(self, token: int) -> bool:
        if token not in self.known:
            self.known[token] = "\n" in self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return self.known[token]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        found = [self.breaks(token) for token in input_ids[:, -1].tolist()]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)


class _NotANumber(LogitsProcessor):
    """Remembers, on the device, which rows had a NaN logit; greedy search itself would pick one and go on."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.found = torch.zeros(rows, dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self.found |= scores.isnan().any(dim=-1)
        return scores


@contextmanager
def _neutral(model: nn.Module) -> Iterator[None]:
    """The model without generation settings of its own.

    transformers 5 fills whatever the given config leaves at ``None`` from ``model.generation_config``
    (``_prepare_generation_config``), so a penalty or forced token there would join a greedy call unseen.
    """
    owners = [module for module in model.modules() if "generation_config" in vars(module)]
    own = [vars(module)["generation_config"] for module in owners]
    try:
        for module in owners:
            vars(module)["generation_config"] = GenerationConfig()
        yield
    finally:
        for module, config in zip(owners, own, strict=True):
            vars(module)["generation_config"] = config


def end_token_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """Every id that the model or its tokenizer calls the end of a text, sorted."""
    found: set[int] = set()
    for owner in (getattr(model, "generation_config", None), tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        found.update(() if ids is None else [ids] if isinstance(ids, int) else [int(i) for i in ids])
    return sorted(found)


def _read(tokenizer: Any, new_ids: list[int], ends: set[int], lines: _LineBreaks) -> Answer:
    for at, token in enumerate(new_ids):
        if token in ends or lines.breaks(token):
            kept, ended = new_ids[: at if token in ends else at + 1], True
            break
    else:
        kept, ended = new_ids, False
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Answer(text.split("\n", 1)[0].strip(), ended)


def _encoded(tokenizer: Any, prompts: Sequence[str], context: int | None) -> list[tuple[int, ...]]:
    rows = []
    for prompt in prompts:
        ids = tuple(encode_prompt(tokenizer, prompt))
        if context is not None and len(ids) >= context:
            raise EditError(
                f"prompt {shorten(prompt)!r} has {len(ids)} tokens and the model's context is {context}: "
                "nothing can be generated after it; shorten it or leave it out"
            )
        rows.append(ids)
    return rows


def generate_answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 32,
    progress: bool = False,
) -> list[Answer]:
    """The model's greedy answer to each prompt, in the prompts' order.

    Rows are sorted by length, padded on the left with an explicit attention mask, and each distinct prompt is generated
    once, so that an answer depends neither on the batch size nor on the tokenizer's padding side (up to ties within
    rounding of the model's dtype). The model's own generation settings (sampling, penalties, forced tokens) are set
    aside and put back; modes, gradients and the tokenizer are left as they were found.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        tokenizer: its tokenizer.
        prompts: texts up to where the answer begins.
        batch_size: rows at a time.
        max_new_tokens: after so many tokens, or at the context's end, an answer is cut, with ``ended=False``.
        progress: a bar in a terminal.

    Raises:
        EditError: an empty prompt or one that fills the whole context, or the model gives NaN.
    """
    inner: Any = unwrapped(model)
    if max_new_tokens < 1:
        raise EditError(f"max_new_tokens is {max_new_tokens}: give at least 1")
    if isinstance(prompts, str):
        raise EditError("prompts is one string: give a list of prompts")
    context = context_length(inner.config)
    asked = _encoded(tokenizer, prompts, context)
    ends = end_token_ids(inner, tokenizer)
    pad_id = pad_token_id(tokenizer)
    lines = _LineBreaks(tokenizer)
    device = device_of(inner)
    answers: dict[tuple[int, ...], Answer] = {}

    def room(ids: tuple[int, ...]) -> int:
        """New tokens that a row may have. Only rows with equal room share a batch: a neighbour must not cut it."""
        return max_new_tokens if context is None else min(max_new_tokens, context - len(ids))

    # The longest first: a batch that does not fit into memory fails at once rather than at the end.
    distinct = sorted(set(asked), key=lambda ids: (-len(ids), ids))
    with evaluating(inner), _neutral(inner), bar(len(distinct), "generating answers", progress) as shown:
        for budget, group in groupby(distinct, key=room):
            greedy = GenerationConfig(
                max_new_tokens=budget, do_sample=False, use_cache=True, pad_token_id=pad_id, eos_token_id=ends or None
            )
            for rows in batches(list(group), batch_size):
                batch = collate([Encoded(list(r), len(r)) for r in rows], pad_id=pad_id, padding_side="left")
                nan = _NotANumber(len(rows), device)
                output = inner.generate(
                    input_ids=batch["input_ids"].to(device),
                    attention_mask=batch["attention_mask"].to(device),
                    generation_config=greedy,
                    logits_processor=LogitsProcessorList([nan]),
                    stopping_criteria=StoppingCriteriaList([lines]),
                )
                if bool(nan.found.any()):
                    prompt = prompts[asked.index(rows[int(nan.found.nonzero()[0, 0])])]
                    raise EditError(
                        f"the model gives NaN logits after {shorten(prompt)!r}: its weights have diverged; "
                        "lower the learning rate or use a wider dtype"
                    )
                for row, new_ids in zip(rows, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                    answers[row] = _read(tokenizer, new_ids, set(ends), lines)
                shown.update(len(rows))
    return [answers[ids] for ids in asked]
