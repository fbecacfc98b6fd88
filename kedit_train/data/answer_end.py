"""Decide whether targets end with end-of-text (``append_eos="auto"``).

Many pretrained models continue a text after the answer. If such a model is trained to end the text after every target,
it also learns to stop in the middle of other texts. Therefore, "auto" measures whether the unedited model ends its
completions by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from kedit_train.arguments import Rule
from kedit_train.data.chat_format import PromptFormat
from kedit_train.data.prompts import encode_in_format, end_id
from kedit_train.data.tokenization import context_length, pad_token_id, token_ids
from kedit_train.edit import Edit
from kedit_train.evaluation_mode import evaluation_mode

AppendEos: TypeAlias = bool | Literal["auto"]
APPEND_EOS = Rule('"auto", True or False', lambda value: value == "auto" or isinstance(value, bool))

# With "auto", end-of-text is appended if the model ends its answers with at least this probability.
THRESHOLD = 0.5
# Number of edits on which the probability is measured, and number of edits per forward pass.
EDITS, BATCH = 16, 8


@dataclass(frozen=True)
class EndDecision:
    """Whether targets end with end-of-text.

    Args:
        append: whether end-of-text is appended to every target.
        reason: the reason, as the end of the sentence "append_eos: on, because ...".
        probability: the measured probability that the model ends its answers, or None if it was not measured.
    """

    append: bool
    reason: str
    probability: float | None = None

    @property
    def setting(self) -> str:
        """The setting with its reason, for example "on, because append_eos=True was set"."""
        return f"{'on' if self.append else 'off'}, because {self.reason}"

    def __str__(self) -> str:
        return f"append_eos: {self.setting}"


def decide_append_eos(
    append_eos: AppendEos,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    model: nn.Module | None = None,
    prompt_format: PromptFormat = "plain",
) -> EndDecision:
    """Decide whether targets end with end-of-text.

    With "auto", the first of these cases that applies decides:

    1. The prompts are chats or have the format "question": yes, because models end their answers in these formats.
    2. The tokenizer has no end-of-text token: no.
    3. The tokenizer appends end-of-text to every text: yes.
    4. ``model`` is None: yes.
    5. All other cases: yes if :func:`end_probability` is at least one half.

    Args:
        append_eos: True or False sets the decision. With "auto", this function decides.
        tokenizer: a tokenizer of ``transformers``.
        edits: the edits. :func:`end_probability` uses at most 16 of them.
        model: the unedited model, for :func:`end_probability`, or None.
        prompt_format: the format of the prompts.
    """
    if append_eos != "auto":
        return EndDecision(append_eos, f"append_eos={append_eos} was set")
    if prompt_format != "plain":
        return EndDecision(True, "models end their answers in chats and their answers to questions")
    if end_id(tokenizer) is None:
        return EndDecision(False, "the tokenizer has no end-of-text token")
    if token_ids(tokenizer, "text", special=True)[-1:] == [tokenizer.eos_token_id]:
        return EndDecision(True, "the tokenizer appends end-of-text to every text")
    if model is None:
        return EndDecision(True, "no model was given, so it cannot be measured whether the model ends its answers")
    probability = end_probability(model, tokenizer, edits)
    ends = probability >= THRESHOLD
    reason = "the unedited model ends" + ("" if ends else " only") + f" {probability:.0%} of its completions by itself"
    return EndDecision(ends, reason, probability)


def end_probability(model: nn.Module, tokenizer: Any, edits: Sequence[Edit]) -> float:
    """Return the probability that the model ends a text directly after the target, or after one more token.

    The additional token is the most probable one, for example a full stop. The result is the mean over at most 16
    edits, with two short forward passes per edit. The model and the random state are left unchanged.

    Args:
        model: a causal language model.
        tokenizer: the tokenizer of the model.
        edits: the edits. Their prompts are plain text.

    Example:
        >>> from kedit_train import world
        >>> model, tokenizer = world.load()
        >>> end_probability(model, tokenizer, world.edits(4)) > 0.9
        True
    """
    limit = context_length(getattr(model, "config", None))
    sequences = [encode_in_format(tokenizer, e.prompt, e.target, append_eos=False).input_ids for e in edits[:EDITS]]
    sequences = [ids for ids in sequences if limit is None or len(ids) < limit]
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(declared if isinstance(declared, list | tuple) else [declared])} - {None}
    columns = torch.tensor(sorted(ends))
    total = 0.0
    with torch.no_grad(), evaluation_mode(model):
        for start in range(0, len(sequences), BATCH):
            batch = sequences[start : start + BATCH]
            now = _next_token(model, tokenizer, batch)
            ending = now[:, columns].sum(dim=-1)
            now[:, columns] = 0.0
            best, token = now.max(dim=-1)
            extended = [[*ids, int(t)] for ids, t in zip(batch, token, strict=True)]
            later = _next_token(model, tokenizer, extended)[:, columns].sum(dim=-1)
            total += float((ending + best * later).sum())
    return total / max(1, len(sequences))


def _next_token(model: Any, tokenizer: Any, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the probabilities [batch, vocabulary] of the token after each sequence."""
    device, width = next(model.parameters()).device, max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad_token_id(tokenizer))
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)], mask[row, : len(sequence)] = torch.tensor(sequence), 1
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    last = torch.tensor([len(sequence) - 1 for sequence in sequences], device=logits.device)
    return logits[torch.arange(len(sequences), device=logits.device), last].float().softmax(dim=-1).cpu()
