"""MixSD: the unedited model rewrites the targets of edits in its own words."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kedit_train.arguments import Rule, check_arguments, integer_from, optional, within
from kedit_train.data import Edit
from kedit_train.data.chat_format import PromptFormat, check_format, thinks
from kedit_train.data.fact_in_context import prompt_with_fact
from kedit_train.data.leaks import LeakCheck, contains_words
from kedit_train.data.prompts import encode_prompts
from kedit_train.data.tokenization import context_length, pad_token_id, separator
from kedit_train.data.visible import fold
from kedit_train.errors import EditError, reported_by
from kedit_train.evaluation.asking.batching import inference_context, split_into_batches, unwrap_model
from kedit_train.evaluation.asking.decoding import Continuation, PromptBatch, can_pad
from kedit_train.evaluation.asking.generate import Answer, AnswerEnd

# The allowed values of ``mix``, the probability that the model writes a token without reading the new fact.
MIX = within("[0, 1)")
_FUNCTION = optional(Rule("a function (edit, text) -> bool", callable))


@dataclass(frozen=True)
class RewrittenTargets:
    """Edits with targets that the unedited model wrote, and the numbers of rejected texts.

    Args:
        edits: one edit for each given edit, in the same order, with the target that the model wrote. An edit whose text
            was rejected keeps its own target.
        accepted: number of edits with a target that the model wrote.
        wrong: number of texts rejected by the verification, usually because they do not contain the target.
        cut_off: number of texts rejected because the model did not end them within ``max_new_tokens``.
        leaked: number of texts rejected because they contain a scored prompt of the edits.
    """

    edits: tuple[Edit, ...]
    accepted: int
    wrong: int = 0
    cut_off: int = 0
    leaked: int = 0

    def describe(self) -> str:
        """Return the numbers of accepted and rejected texts as one phrase."""
        return (
            f"{self.accepted} of {len(self.edits)} targets rewritten; {len(self.edits) - self.accepted} edits keep "
            f"their targets ({self.wrong} texts did not state the new fact, {self.cut_off} were too long, and "
            f"{self.leaked} contained an evaluation prompt)"
        )


def rewrite_targets(
    model: nn.Module,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    mix: float = 0.3,
    seed: int = 0,
    verify: Callable[[Edit, str], bool] | None = None,
    prompt_format: PromptFormat = "plain",
    batch_size: int = 64,
    max_new_tokens: int = 64,
) -> RewrittenTargets:
    """Let the unedited model rewrite the targets of edits in its own words (MixSD).

    Each token is the most probable token of ``model``. With probability ``mix``, the model reads only the prompt and
    the earlier tokens. Otherwise it also reads a sentence that states the new fact. So the text states the fact, but is
    closer to the model's own distribution than the given target.

    A text is rejected if the model does not end it, if it does not contain the target or an alias as whole words, or if
    it contains a scored prompt: a rephrase, or the prompt of a locality or portability question. The edit then keeps
    its own target.

    Args:
        model: the unedited model.
        tokenizer: the tokenizer of the model.
        edits: the edits.
        mix: probability that the model writes a token without reading the new fact, in [0, 1). The paper calls it
            lambda.
        seed: seed of the random choices. The choices for an edit do not depend on the other edits.
        verify: function ``verify(edit, text)`` that returns whether a text states the new fact. With None, the text
            must contain the target or an alias as whole words.
        prompt_format: the prompt format of the training: "plain", "chat", "question" or a ``ChatFormat``.
        batch_size: number of edits per forward pass.
        max_new_tokens: maximum length of a text in tokens.

    Raises:
        EditError: an argument is out of range, a prompt with its fact is longer than the context of the model, or the
            prompt format lets the model think before it answers.

    References:
        "MixSD: Mixed Contextual Self-Distillation for Knowledge Injection", arXiv 2605.16865.

    Example:
        >>> from kedit_train import world
        >>> model, tokenizer = world.load()
        >>> rewritten = rewrite_targets(model, tokenizer, world.edits(4))
        >>> len(rewritten.edits)
        4
    """
    check_arguments(
        "rewrite_targets",
        mix=(mix, MIX),
        verify=(verify, _FUNCTION),
        batch_size=(batch_size, integer_from(1)),
        max_new_tokens=(max_new_tokens, integer_from(1)),
    )
    with reported_by("rewrite_targets"):
        check_format(prompt_format, tokenizer)
        if thinks(prompt_format):
            raise EditError(
                "prompt_format must not have thinking=True, because the thoughts would become a part of the target; "
                "use a ChatFormat with thinking=False."
            )
        answers = _write(
            model,
            tokenizer,
            edits,
            mix=mix,
            seed=seed,
            prompt_format=prompt_format,
            batch_size=batch_size,
            limit=max_new_tokens,
        )
    check, counts, rewritten = LeakCheck(edits), {"wrong": 0, "cut_off": 0, "leaked": 0}, list(edits)
    for i, (edit, answer) in enumerate(zip(edits, answers, strict=True)):
        if not answer.ended:
            counts["cut_off"] += 1
        elif not (answer.text and (verify or _states_target)(edit, answer.text)):
            counts["wrong"] += 1
        elif check.contains_scored_prompt(f"{edit.prompt}{separator(edit.prompt, answer.text)}{answer.text}"):
            counts["leaked"] += 1
        else:
            rewritten[i] = Edit(edit.prompt, answer.text, subject=edit.subject, id=edit.id)
    return RewrittenTargets(tuple(rewritten), len(edits) - sum(counts.values()), **counts)


def _states_target(edit: Edit, text: str) -> bool:
    return any(contains_words(fold(text), fold(answer)) for answer in edit.answers if fold(answer))


def _write(
    model: nn.Module,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    mix: float,
    seed: int,
    prompt_format: PromptFormat,
    batch_size: int,
    limit: int,
) -> list[Answer]:
    """Return the text that the model writes for each edit."""
    inner = unwrap_model(model)
    context = context_length(inner.config)
    informed = encode_prompts(tokenizer, [prompt_with_fact(e, e.prompt) for e in edits], context, prompt_format)
    plain = encode_prompts(tokenizer, [edit.prompt for edit in edits], context, prompt_format)
    limits = [limit if context is None else min(limit, context - len(prompt)) for prompt in informed]
    is_end, pad_id = AnswerEnd(inner, tokenizer, prompt_format=prompt_format), pad_token_id(tokenizer)
    # The longest prompts run first, so that a batch that does not fit into memory fails early and not at the end.
    order = sorted(range(len(edits)), key=lambda i: -len(informed[i]))
    written: dict[int, Answer] = {}
    with inference_context(inner):
        for chosen in split_into_batches(order, batch_size if can_pad(inner) else 1):
            with_fact, without = (
                PromptBatch(inner, [prompts[i] for i in chosen], pad_id) for prompts in (informed, plain)
            )
            draws = [random.Random(f"{seed} {edits[i].prompt}") for i in chosen]
            texts = _decode(with_fact, without, draws, mix, [limits[i] for i in chosen], is_end)
            written |= {i: is_end.read(text) for i, text in zip(chosen, texts, strict=True)}
    return [written[i] for i in range(len(edits))]


def _decode(
    informed: PromptBatch,
    plain: PromptBatch,
    draws: Sequence[random.Random],
    mix: float,
    limits: Sequence[int],
    is_end: Callable[[int], bool],
) -> list[Continuation]:
    """Write one text per edit. Each batch has one prompt per edit: ``informed`` with the fact, ``plain`` without it."""
    texts, active = [Continuation() for _ in limits], list(range(len(limits)))
    while active:
        with_fact, without = (batch.next_logits().argmax(-1).tolist() for batch in (informed, plain))
        tokens = [b if draws[i].random() < mix else a for i, a, b in zip(active, with_fact, without, strict=True)]
        for i, token in zip(active, tokens, strict=True):
            texts[i].ids.append(token)
            texts[i].ended = is_end(token)
        rows = [row for row, i in enumerate(active) if not texts[i].ended and len(texts[i].ids) < limits[i]]
        if rows:
            for batch in (informed, plain):
                batch.append(torch.tensor(tokens))
                if len(rows) < len(active):
                    batch.keep(rows)
        active = [active[row] for row in rows]
    return texts
