"""What a model answers, in its own words: greedy, to its own end-of-text.

Success of an edit is judged on what the model says when nobody feeds it the answer (Yang et al., "The Mirage of Model
Editing", arXiv 2502.11177: teacher forcing and cutting at the truth's length nearly triple the measured success).
An answer ends at end-of-text or at the first line break, never at a full stop: "St. Louis" is one answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from torch import nn

from kedit_train.data.prompts import PromptFormat, check_format, encode_prompts, end_id
from kedit_train.data.tokenization import context_length, pad_token_id
from kedit_train.errors import EditError
from kedit_train.evaluation.asking.batching import DivergedError, bar, batches, evaluating, unwrapped
from kedit_train.evaluation.asking.decoding import Decoded, decode, may_pad


@dataclass(frozen=True)
class Answer:
    """What the model said after a prompt.

    Args:
        text: up to end-of-text or the first line break, without surrounding white space.
        ended: whether the model ended it; ``False`` where ``max_new_tokens`` or the context's end cut it.
        margin: the smallest distance, in logits, between the first choice and the second on the way.
        ids: its tokens, without those that ended it.
    """

    text: str
    ended: bool
    margin: float = field(default=float("inf"), compare=False, repr=False)
    ids: tuple[int, ...] = field(default=(), compare=False, repr=False)


class Ending:
    """Where an answer ends: end-of-text, or a line break in a token. Each id is decoded once, when it first comes up.

    Args:
        lines: whether a line break ends it.
        prompt_format: in a chat, what closes the assistant's turn ends it, too.
    """

    def __init__(self, model: Any, tokenizer: Any, lines: bool = True, prompt_format: PromptFormat = "plain") -> None:
        self.ids, self.tokenizer, self.lines = set(end_token_ids(model, tokenizer)), tokenizer, lines
        closing = end_id(tokenizer, prompt_format)
        self.ids |= set() if closing is None else {closing}
        self._breaks: dict[int, bool] = {}

    def breaks(self, token: int) -> bool:
        """Whether the token has a line break in it that ends the answer."""
        if self.lines and token not in self._breaks:
            self._breaks[token] = "\n" in self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return self.lines and self._breaks[token]

    def __call__(self, token: int) -> bool:
        return token in self.ids or self.breaks(token)

    def read(self, row: Decoded) -> Answer:
        """The answer in a row's new tokens."""
        kept = row.ids[:-1] if row.ended and row.ids[-1] in self.ids else row.ids
        text = self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        said = row.ids[:-1] if row.ended else row.ids
        text = text.split("\n", 1)[0] if self.lines else text
        return Answer(text.strip(), row.ended, row.margin, tuple(said))


def end_token_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """Every id that the model or its tokenizer calls the end of a text, sorted."""
    found: set[int] = set()
    for owner in (getattr(model, "generation_config", None), tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        found.update(() if ids is None else [ids] if isinstance(ids, int) else [int(i) for i in ids])
    return sorted(found)


def generate_answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 32,
    progress: bool = False,
    prompt_format: PromptFormat = "plain",
    lines: bool = True,
    begun: Mapping[str, tuple[list[int], float]] | None = None,
) -> list[Answer]:
    """The model's greedy answer to each prompt, in the prompts' order.

    Rows are sorted by length, padded on the left with explicit mask and positions, and each distinct prompt is
    generated once, so that an answer depends neither on the batch size nor on the tokenizer's padding side, up to ties
    within rounding of the model's dtype: ``Answer.margin`` says how close the closest choice was. The model's own
    generation settings (sampling, penalties, forced tokens) do not take part; modes, gradients and the tokenizer are
    left as they were found.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        tokenizer: its tokenizer.
        prompts: texts up to where the answer begins.
        batch_size: rows at a time.
        max_new_tokens: after so many tokens, or at the context's end, an answer is cut, with ``ended=False``.
        progress: a bar in a terminal.
        prompt_format: ``"plain"``, through the tokenizer's template as a ``"chat"``, or framed as a ``"question"``.
        lines: whether a line break ends an answer.
        begun: prompt -> how its answer is known to begin, and the smallest margin there
            (:meth:`~kedit_train.evaluation.asking.teacher_forced.TeacherForced.begins`).

    Raises:
        EditError: an empty prompt or one that fills the whole context, or the model gives NaN.
    """
    inner: Any = unwrapped(model)
    if max_new_tokens < 1:
        raise EditError(f"max_new_tokens is {max_new_tokens}: give at least 1")
    if isinstance(prompts, str):
        raise EditError("prompts is one string: give a list of prompts")
    check_format(prompt_format, tokenizer)
    context = context_length(inner.config)
    asked = encode_prompts(tokenizer, prompts, context, prompt_format)
    stops, pad_id = Ending(inner, tokenizer, lines, prompt_format), pad_token_id(tokenizer)
    names = dict(zip(asked, prompts, strict=True))
    most = {row: max_new_tokens if context is None else min(max_new_tokens, context - len(row)) for row in names}
    known = {row: _known((begun or {}).get(prompt), most[row], stops) for row, prompt in names.items()}
    found = {row: known[row] for row in names if known[row].ended or len(known[row].ids) == most[row]}
    left = {row: (*row, *known[row].ids) for row in names if row not in found}
    # The longest first: a batch that does not fit into memory fails at once rather than at the end.
    order = sorted(left, key=lambda row: (-len(left[row]), left[row]))
    padded = may_pad(inner)
    groups = [list(g) for _, g in groupby(order, key=lambda row: 0 if padded else len(left[row]))]
    with evaluating(inner), bar(len(order), "generating answers", progress) as shown:
        for rows in (rows for group in groups for rows in batches(group, batch_size)):
            rest = [most[row] - len(known[row].ids) for row in rows]
            for row, new in zip(rows, decode(inner, [left[r] for r in rows], rest, stops, pad_id=pad_id), strict=True):
                if new.diverged:
                    raise DivergedError(names[row])
                ids, margin = [*known[row].ids, *new.ids], min(known[row].margin, new.margin)
                found[row] = Decoded(ids, new.ended, margin)
            shown.update(len(rows))
    batches((), batch_size)  # refuses a size below 1 where nothing was left to generate, too
    return [stops.read(found[row]) for row in asked]


def _known(begun: tuple[list[int], float] | None, most: int, stops: Ending) -> Decoded:
    if begun is None:
        return Decoded()
    ids, margin = begun[0][:most], begun[1]
    return Decoded(ids, bool(ids) and stops(ids[-1]), margin)
