"""Choose the protocols of an evaluation by measuring whether the model ends its answers by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from kedit_train.data import Edit
from kedit_train.data.chat_format import describe_format
from kedit_train.evaluation.asking.distributed import split_across_processes
from kedit_train.evaluation.asking.generate import generate
from kedit_train.evaluation.options import EvaluationOptions
from kedit_train.evaluation.scoring.protocols import EXACT, Protocols

# Number of prompts that are answered to find out whether a model ends its answers.
SAMPLE = 16
# The answers may have at least this many tokens. With a lower limit, a model with longer answers would seem not to end
# its answers.
MINIMUM_TOKENS = 32
# If at least this fraction of the answers is cut at the limit, scores of whole answers mean little.
CUT_SHARE = 0.25


def choose_protocols(
    model: nn.Module, tokenizer: Any, edits: Sequence[Edit], options: EvaluationOptions, *, progress: bool = False
) -> Protocols:
    """Return the protocols for ``protocol="auto"``.

    For chat and question prompts, the protocol is "exact", because models end their answers to such prompts. For plain
    prompts, the unedited model first answers up to 16 prompts of the edits. If at least a quarter of these answers are
    cut at the token limit, the protocols are "leading" and "probability". Otherwise, the protocol is "exact".

    Args:
        model: the unedited model.
        tokenizer: the model's tokenizer.
        edits: the edits. The model answers some of their prompts and locality prompts.
        options: how to prompt the model.
        progress: show a progress bar in a terminal.
    """
    if options.asked_format != "plain":
        return Protocols(EXACT.names, f'the prompts are in the format "{describe_format(options.asked_format)}"')
    prompts = _sample(edits)
    tokens = max(options.max_new_tokens, MINIMUM_TOKENS)

    def ask(own: Sequence[str]) -> list[bool]:
        # A line break does not count as an end here, because a model can go on in the next line.
        answers = generate(model, tokenizer, own, options.batch_size, tokens, "plain", (), {}, progress)
        return [answer.ended for answer in answers]

    ended = split_across_processes(ask, prompts, options.distributed)
    cut = len(ended) - sum(ended)
    reason = f"the unedited model ends {sum(ended)} of {len(ended)} sampled answers within {tokens} tokens"
    return Protocols(("leading", "probability") if cut >= CUT_SHARE * len(ended) else EXACT.names, reason)


def _sample(edits: Sequence[Edit]) -> list[str]:
    """Return up to 16 different prompts from evenly spaced edits.

    Each of these edits contributes its own prompt and its first locality prompt.
    """
    prompts: dict[str, None] = {}
    step = max(1, 2 * len(edits) // SAMPLE)
    for edit in edits[::step]:
        prompts[edit.prompt] = None
        probe = next((probe for probes in edit.locality.values() for probe in probes), None)
        if probe is not None:
            prompts[probe.prompt] = None
    return list(prompts)[:SAMPLE]
