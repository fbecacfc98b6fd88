"""Decide for all processes whether targets end with end-of-text, and describe how the training examples end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from kedit_train.core.processes import is_distributed, rank
from kedit_train.core.run import EditRun
from kedit_train.core.training_format import first_examples, owners_of_examples
from kedit_train.data.answer_end import AppendEos, EndDecision, decide_append_eos
from kedit_train.data.chat_format import PromptFormat
from kedit_train.data.prompts import end_id
from kedit_train.edit import Edit
from kedit_train.errors import warn
from kedit_train.functional.labels import IGNORE_INDEX


def decide_together(
    append_eos: AppendEos,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    model: nn.Module | None,
    prompt_format: PromptFormat,
) -> EndDecision:
    """Decide whether targets end with end-of-text, with the same result on all processes.

    The result is the decision of :func:`~kedit_train.data.answer_end.decide_append_eos` on process 0. Process 0 prints
    the decision if ``append_eos`` is "auto".
    """
    decisions = [decide_append_eos(append_eos, tokenizer, edits, model=model, prompt_format=prompt_format)]
    if is_distributed():
        # Rounding may differ between processes, and processes must train the same tokens.
        dist.broadcast_object_list(decisions, src=0)
    if append_eos == "auto" and rank() == 0:
        # This line is not a result of the program, so it is printed to standard error, like a progress bar.
        print(decisions[0], file=sys.stderr)
    return decisions[0]


def describe_end(run: EditRun, tokenizer: Any, edits: Sequence[Edit], prompt_format: PromptFormat) -> str | None:
    """Return a text that says whether the training examples end with end-of-text, or None if this is unknown.

    If kedit-train has made the examples, the text also says why. Other libraries, such as TRL's ``SFTTrainer``, may add
    end-of-text to the examples although the unedited model usually continues after a target. In the prompt format
    "plain", the function warns about such examples.

    Args:
        run: the run. Its model must be unedited.
        tokenizer: the tokenizer of the examples.
        edits: the edits.
        prompt_format: the format of the training examples.
    """
    # EditDataModule and EditSFTTrainer have decided before the run began.
    for owner in owners_of_examples(run.host):
        if isinstance(decision := getattr(owner, "answer_end", None), EndDecision):
            return str(decision)
    trained = trains_end(first_examples(run.host), end_id(tokenizer, prompt_format))
    if trained is None:
        return None
    if trained and prompt_format == "plain":
        with run.reference_model(), run.host.forward_context():
            measured = decide_append_eos("auto", tokenizer, edits, model=run.model, prompt_format=prompt_format)
        if not measured.append:
            warn(
                f"the training examples end with end-of-text, but {measured.reason}, so the edited model may end texts "
                "too early; train on edits.to_tokens(tokenizer, append_eos=False) instead."
            )
    return f"append_eos: {'on' if trained else 'off'}, as in the training examples"


def trains_end(examples: Sequence[Any], end: int | None) -> bool | None:
    """Return whether most tokenized examples end with the token ``end``, or None if no example has a label."""
    found = []
    for example in examples:
        read = example.get if isinstance(example, dict) else lambda name, e=example: getattr(e, name, None)
        labels = read("labels") if read("labels") is not None else read("input_ids")
        trained = [int(label) for label in labels if int(label) != IGNORE_INDEX] if labels is not None else []
        if trained:
            # A chat template may put a line break after the token that closes the turn.
            found.append(end is not None and end in trained[-2:])
    return None if not found else 2 * sum(found) > len(found)
