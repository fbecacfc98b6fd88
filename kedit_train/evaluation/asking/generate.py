"""``generate_answers``: generate a model's answers to prompts with greedy decoding.

An edit is judged by the text that the model generates freely. Two common shortcuts make edits look more successful than
they are: teacher forcing, and cutting the output at the length of the true answer. These shortcuts nearly triple the
measured success rate (Yang et al., "The Mirage of Model Editing", arXiv 2502.11177).

An answer ends at end-of-text or at the first line break. A full stop does not end an answer, because "St. Louis" is one
answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import groupby
from typing import Any

from torch import nn

from kedit_train.data.chat_format import PromptFormat, check_format, thinks
from kedit_train.data.prompts import encode_prompts, end_id
from kedit_train.data.tokenization import context_length, pad_token_id
from kedit_train.errors import EditError, reported_by
from kedit_train.evaluation.asking.batching import (
    DivergedError,
    inference_context,
    progress_bar,
    split_into_batches,
    unwrap_model,
)
from kedit_train.evaluation.asking.decoding import Continuation, can_pad, decode_greedily
from kedit_train.evaluation.asking.thoughts import after_thoughts

LINE_BREAK = ("\n",)


@dataclass(frozen=True)
class Answer:
    """The answer that a model generated for one prompt.

    Args:
        text: the answer up to end-of-text or the first line break, without surrounding white space.
        ended: True if the model ended the answer. False if ``max_new_tokens`` or the model's context cut the answer.
        margin: the largest logit minus the second largest, at the token where this difference is smallest.
        ids: the token ids of the answer, without the token that ended it.
    """

    text: str
    _: KW_ONLY
    ended: bool
    margin: float = field(default=float("inf"), compare=False, repr=False)
    ids: tuple[int, ...] = field(default=(), compare=False, repr=False)


class AnswerEnd:
    """Decides whether a generated token ends the answer.

    Args:
        model: the model. The end-of-text tokens in its generation config end an answer.
        tokenizer: the model's tokenizer. Its end-of-text token also ends an answer.
        stops: a token that contains one of these texts also ends an answer. Default: a line break.
        prompt_format: with "chat", the token that closes the assistant's turn also ends an answer.
    """

    def __init__(
        self, model: Any, tokenizer: Any, stops: Sequence[str] = LINE_BREAK, prompt_format: PromptFormat = "plain"
    ) -> None:
        self.ids, self.tokenizer, self.cut_at = set(end_token_ids(model, tokenizer)), tokenizer, tuple(stops)
        self.thinks: bool = thinks(prompt_format)
        # Thoughts have several lines, so a line break must not end the generation.
        self.stops = () if self.thinks else self.cut_at
        turn_end = end_id(tokenizer, prompt_format)
        self.ids |= set() if turn_end is None else {turn_end}
        self._has_stop: dict[int, bool] = {}

    def has_stop(self, token: int) -> bool:
        """Return True if the token contains a text that ends the answer."""
        if self.stops and token not in self._has_stop:
            text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
            self._has_stop[token] = any(stop in text for stop in self.stops)
        return bool(self.stops) and self._has_stop[token]

    def __call__(self, token: int) -> bool:
        return token in self.ids or self.has_stop(token)

    def read(self, continuation: Continuation) -> Answer:
        """Convert the generated tokens into an answer."""
        ids = continuation.ids
        shown = ids[:-1] if continuation.ended and ids[-1] in self.ids else ids
        shown = after_thoughts(self.tokenizer, shown, ended=continuation.ended) if self.thinks else shown
        text = self.tokenizer.decode(shown, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text = text.lstrip() if self.thinks else text
        for stop in self.cut_at:
            text = text.split(stop, 1)[0]
        answer_ids = ids[:-1] if continuation.ended else ids
        # Without stops, a line break at the beginning is kept, because it shows that the first line is empty.
        text = text.strip() if self.cut_at else text.strip(" ")
        return Answer(text, ended=continuation.ended, margin=continuation.margin, ids=tuple(answer_ids))


def end_token_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """Return every id that the model or its tokenizer declares as end-of-text, sorted."""
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
    max_new_tokens: int | Mapping[str, int] = 32,
    prompt_format: PromptFormat = "plain",
    stops: Sequence[str] = LINE_BREAK,
    known_starts: Mapping[str, tuple[list[int], float]] | None = None,
    progress: bool = False,
) -> list[Answer]:
    """Generate the model's greedy answer to each prompt.

    Equal prompts run only once. Prompts are sorted by length and padded on the left, with an explicit attention
    mask and explicit position ids. An answer therefore does not depend on the batch size or the tokenizer's padding
    side. There is one exception: if the two largest logits differ by no more than the rounding error of the model's
    dtype, another token may be generated. ``Answer.margin`` shows how close the logits were. The model's own generation
    settings (sampling, penalties, forced tokens) are ignored.

    Args:
        model: a causal language model of transformers, or a PEFT model around one. The model is left unchanged.
        tokenizer: the model's tokenizer. The tokenizer is left unchanged.
        prompts: the texts that the model continues with an answer.
        batch_size: prompts per forward pass.
        max_new_tokens: maximum length of an answer, in tokens. A dict gives each prompt its own maximum. A longer
            answer is cut and gets ``ended=False``.
        prompt_format: "plain", "chat" (the tokenizer's chat template) or "question" (the prompt is framed as a question
            that ends with "A:").
        stops: texts that end an answer, in addition to end-of-text. Default: a line break. With an empty list, an
            answer may have several lines.
        known_starts: dict from prompt to a pair: the first tokens of its answer, which are already known, and the
            smallest margin of these tokens. The method
            :meth:`~kedit_train.evaluation.asking.teacher_forced.TeacherForced.greedy_start` returns such pairs. Known
            tokens are not generated again.
        progress: show a progress bar in a terminal.

    Returns:
        One answer per prompt, in the order of ``prompts``.

    Raises:
        EditError: a prompt is empty or fills the whole context, or the model gives NaN logits.

    Example:
        >>> from kedit_train import world
        >>> from kedit_train.evaluation import generate_answers
        >>> model, tokenizer = world.load()
        >>> edit = world.edits(1)[0]
        >>> [answer] = generate_answers(model, tokenizer, [edit.prompt])
        >>> answer.text == edit.old_target, answer.ended
        (True, True)
    """
    with reported_by("generate_answers"):
        return generate(
            model,
            tokenizer,
            prompts,
            batch_size,
            max_new_tokens,
            prompt_format,
            stops,
            known_starts or {},
            progress,
        )


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    batch_size: int,
    max_new_tokens: int | Mapping[str, int],
    prompt_format: PromptFormat,
    stops: Sequence[str],
    known_starts: Mapping[str, tuple[list[int], float]],
    progress: bool,
) -> list[Answer]:
    """Generate answers like :func:`generate_answers`. Callers put their own name in front of error messages."""
    inner: Any = unwrap_model(model)
    if isinstance(max_new_tokens, int) and max_new_tokens < 1:
        raise EditError(f"max_new_tokens must be >= 1, got {max_new_tokens}.")
    if batch_size < 1:
        raise EditError(f"batch_size must be >= 1, got {batch_size}.")
    if isinstance(prompts, str):
        raise EditError("prompts must be a list of strings, got one string; put the string into a list.")
    check_format(prompt_format, tokenizer)
    context = context_length(inner.config)
    sequences = encode_prompts(tokenizer, prompts, context, prompt_format)
    is_end, pad_id = AnswerEnd(inner, tokenizer, stops, prompt_format), pad_token_id(tokenizer)
    # A known start is an answer without thoughts. A model that thinks generates its thoughts first.
    known_starts = {} if thinks(prompt_format) else known_starts
    prompt_of = dict(zip(sequences, prompts, strict=True))
    limits = {s: max_new_tokens if isinstance(max_new_tokens, int) else max_new_tokens[p] for s, p in prompt_of.items()}
    limits = {s: limit if context is None else min(limit, context - len(s)) for s, limit in limits.items()}
    known = {s: _known_start(known_starts.get(prompt), limits[s], is_end) for s, prompt in prompt_of.items()}
    finished = {s: known[s] for s in prompt_of if known[s].ended or len(known[s].ids) == limits[s]}
    inputs = {s: (*s, *known[s].ids) for s in prompt_of if s not in finished}
    # The longest prompts run first, so that a batch that does not fit into memory fails early and not at the end.
    order = sorted(inputs, key=lambda s: (-len(inputs[s]), inputs[s]))
    padded = can_pad(inner)
    groups = [list(group) for _, group in groupby(order, key=lambda s: 0 if padded else len(inputs[s]))]
    with inference_context(inner), progress_bar(len(order), "generating answers", progress) as bar:
        for batch in (batch for group in groups for batch in split_into_batches(group, batch_size)):
            rest = [limits[s] - len(known[s].ids) for s in batch]
            continuations = decode_greedily(inner, [inputs[s] for s in batch], rest, is_end, pad_id=pad_id)
            for s, new in zip(batch, continuations, strict=True):
                if new.diverged:
                    raise DivergedError(prompt_of[s])
                finished[s] = Continuation([*known[s].ids, *new.ids], new.ended, min(known[s].margin, new.margin))
            bar.update(len(batch))
    return [is_end.read(finished[s]) for s in sequences]


def _known_start(start: tuple[list[int], float] | None, limit: int, is_end: AnswerEnd) -> Continuation:
    if start is None:
        return Continuation()
    ids, margin = start[0][:limit], start[1]
    return Continuation(ids, bool(ids) and is_end(ids[-1]), margin)
