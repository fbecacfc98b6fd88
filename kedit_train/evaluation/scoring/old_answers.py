"""Find the old answers (the answers before the edit) that a model gives, and measure their probability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from kedit_train.data import Edit
from kedit_train.data.prompts import PromptFormat
from kedit_train.errors import EditError
from kedit_train.evaluation.asking.generate import generate_answers
from kedit_train.evaluation.asking.teacher_forced import teacher_forced
from kedit_train.evaluation.scoring.normalize import exact_match
from kedit_train.evaluation.scoring.perplexity import perplexity, text_losses


def find_old_answers(
    model: nn.Module,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    batch_size: int,
    prompt_format: PromptFormat,
    max_new_tokens: int = 32,
) -> tuple[list[Edit], dict[str, str]]:
    """Return copies of the edits, with the model's own answers as targets.

    The model answers each prompt with greedy decoding. An edit is left out if the answer is empty, does not end within
    ``max_new_tokens`` tokens, or is already the new answer. If the edit has an ``old_target``, it is also left out if
    the answer is not ``old_target``.

    Args:
        model: a causal language model.
        tokenizer: the model's tokenizer.
        edits: the edits, with the new answers as targets.
        batch_size: prompts in one forward pass.
        prompt_format: "plain", "chat" or "question"; see :class:`~kedit_train.evaluation.EvaluationOptions`.
        max_new_tokens: maximum length of an answer, in tokens.

    Returns:
        A list of edits with the old answers as targets, and a dict for the edits that are left out. The dict maps the
        id of an edit (or its number, if it has no id) to the reason. The new edits have only a prompt, a target, a
        subject and an id.

    Raises:
        EditError: there are no edits.
    """
    if not len(edits):
        raise EditError("there are no edits; pass at least one edit.")
    options: dict[str, Any] = {"batch_size": batch_size, "prompt_format": prompt_format}
    prompts = [edit.prompt for edit in edits]
    generated = generate_answers(model, tokenizer, prompts, max_new_tokens=max_new_tokens, **options)
    old, left_out = [], {}
    for number, (edit, answer) in enumerate(zip(edits, generated, strict=True)):
        reason = None
        if not answer.text or not answer.ended:
            reason = "the model gives no answer, or does not end its answer"
        elif exact_match(answer.text, edit.answers):
            reason = f"the model already gives the new answer ({answer.text!r})"
        elif edit.old_target is not None and not exact_match(answer.text, (edit.old_target,)):
            reason = f"the model answers {answer.text!r} and not the old answer {edit.old_target!r}"
        if reason is None:
            old.append(Edit(edit.prompt, answer.text, subject=edit.subject, id=edit.id))
        else:
            left_out[edit.id or str(number)] = reason
    return old, left_out


def measure_old_answers(
    model: nn.Module,
    tokenizer: Any,
    old: Sequence[Edit],
    texts: Sequence[str],
    *,
    batch_size: int,
    prompt_format: PromptFormat,
) -> tuple[float, float, float]:
    """Measure how well a model still knows old answers, and its perplexity on texts.

    Args:
        model: a causal language model.
        tokenizer: the model's tokenizer.
        old: edits whose targets are the old answers; see :func:`find_old_answers`.
        texts: the texts for the perplexity.
        batch_size: sequences in one forward pass.
        prompt_format: "plain", "chat" or "question"; see :class:`~kedit_train.evaluation.EvaluationOptions`.

    Returns:
        Three numbers: the mean probability of the old answers, the fraction of old answers whose tokens are all ranked
        first, and the perplexity of the texts. The probability of an answer is the product of its token probabilities.

    Raises:
        EditError: the texts contain no token to predict.
    """
    pairs = [(edit.prompt, edit.target) for edit in old]
    scored = teacher_forced(model, tokenizer, pairs, batch_size=batch_size, prompt_format=prompt_format)
    value = perplexity(text_losses(model, tokenizer, texts, batch_size=batch_size)).value
    if value is None:
        raise EditError("the texts contain no token to predict; pass longer texts.")
    probability = sum(math.exp(sum(one.log_probs)) for one in scored) / len(scored)
    return probability, sum(one.exact for one in scored) / len(scored), value
