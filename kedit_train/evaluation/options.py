"""The settings of an evaluation: what to measure, and how to prompt the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kedit_train.arguments import Rule, check_arguments, integer_from, optional
from kedit_train.data.chat_format import PROMPT_FORMAT, PromptFormat, read_format
from kedit_train.evaluation.scoring.protocols import PROTOCOLS, Protocol

ExtraMetric = Literal["prefixes", "format", "kl", "resurgence", "fluency", "retrieval", "overlap"]
EXTRA_METRICS: tuple[ExtraMetric, ...] = get_args(ExtraMetric)

_METRICS = Rule(
    '"all", or a list such as ["kl"] with names from ' + ", ".join(f'"{name}"' for name in EXTRA_METRICS),
    lambda value: value == "all" or (not isinstance(value, str) and set(value) <= set(EXTRA_METRICS)),
)

_PROTOCOL = Rule(
    '"auto", one of ' + ", ".join(f'"{name}"' for name in PROTOCOLS) + ", or a list of these names without repetition",
    lambda value: (
        value in ("auto", *PROTOCOLS)
        if isinstance(value, str)
        else isinstance(value, Sequence)
        and bool(value)
        and set(value) <= set(PROTOCOLS)
        and len(set(value)) == len(value)
    ),
)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Settings of an evaluation, for :func:`~kedit_train.evaluation.evaluate` and the callback ``EditMetrics``.

    Evaluate the unedited and the edited model with the same options. ``evaluate`` raises an error if ``protocol``,
    ``max_new_tokens`` or ``prompt_format`` differs between the two models, because these settings change the answers.

    Args:
        metrics: what to measure in addition to reliability, generality, portability and locality: "all", or a list of

            - "prefixes" measures generality with a neutral sentence in front of the prompt. It needs two more answers
              per edit.
            - "format" measures generality with the prompt in another form: an incomplete sentence becomes a question,
              and a question becomes an incomplete sentence. It needs one more answer per edit.
            - "kl" measures the KL divergence from the unedited model on the locality prompts. It needs one more
              forward pass per prompt, and 12 KiB of memory per token of the answers.
            - "resurgence" measures whether the old answer comes back when the prompt denies it or offers it as a
              choice. It needs three more answers per edit.
            - "fluency" measures entropy and repetition of a longer continuation of each edit's prompt. It costs as
              much as all other metrics together.
            - "retrieval" measures a baseline: the unedited model answers all prompts, with the new fact written in
              front of each prompt. It doubles the cost of the unedited model's evaluation.
            - "overlap" measures the ROUGE-L overlap of the generated text with the whole target, for each edit's prompt
              and its rephrases. It is meant for targets of several sentences, such as documents. For each prompt and
              each rephrase, it needs one more answer, which is about as long as the target.
        protocol: how answers are judged: "leading", "exact", "contains", "wild", "teacher_forced" or "probability", or
            a list of them. :mod:`kedit_train.evaluation.scoring.protocols` explains each protocol. In a list, the
            first protocol gives the headline scores (the scores that a report shows first). For chat and question
            prompts, "auto" means "exact". For plain prompts, the unedited model first answers up to 16 of the prompts.
            If at least a quarter of these answers do not end by themselves, "auto" means ["leading", "probability"].
            Otherwise, it means "exact".
        batch_size: prompts per forward pass. The scores do not depend on the batch size.
        max_new_tokens: maximum length of an answer, in tokens. It is used if ``protocol`` contains "exact", "contains"
            or "wild". Otherwise, the maximum is the length of the longest accepted answer plus three tokens.
        prose: unrelated texts, as a list of strings, a path, a dataset, or "world" (the bundled texts). Three values
            are measured on the texts: the perplexity, the KL divergence from the unedited model, and the agreement with
            the unedited model. None: not measured.
        tokenizer: used by ``EditMetrics`` only: a tokenizer, a name or a path. None: the trainer's tokenizer.
        prompt_format: "plain" (the prompt as it is), "chat" (the tokenizer's chat template), "question" (the prompt is
            framed as a question that ends with "A:") or a :class:`~kedit_train.ChatFormat`. Use the format that was
            used in training. None: ``EditMetrics`` uses the format of the training examples, and ``evaluate`` uses
            "plain".
        distributed: True splits the edits across the processes of the default group. False evaluates all edits on
            each process. ``distributed`` must be False for a model that FSDP2 shards, because all processes must take
            part in each forward pass of such a model.

    Raises:
        EditError: an argument is out of range.

    Example:
        >>> from kedit_train.evaluation import EvaluationOptions
        >>> options = EvaluationOptions(metrics=["kl", "resurgence"], max_new_tokens=16)
        >>> sorted(options.extra_metrics)
        ['kl', 'resurgence']
        >>> EvaluationOptions(batch_size=0)
        Traceback (most recent call last):
        ...
        kedit_train.errors.EditError: EvaluationOptions: batch_size must be an integer >= 1, got 0.
    """

    metrics: Sequence[ExtraMetric] | Literal["all"] = ()
    protocol: Protocol | Literal["auto"] | Sequence[Protocol] = "auto"
    batch_size: int = 64
    max_new_tokens: int = 32
    prose: Any = None
    tokenizer: Any = None
    prompt_format: PromptFormat | None = None
    distributed: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_format", read_format(self.prompt_format))
        check_arguments(
            self,
            metrics=(self.metrics, _METRICS),
            protocol=(self.protocol, _PROTOCOL),
            batch_size=(self.batch_size, integer_from(1)),
            max_new_tokens=(self.max_new_tokens, integer_from(1)),
            prompt_format=(self.prompt_format, optional(PROMPT_FORMAT)),
        )

    @property
    def asked_format(self) -> PromptFormat:
        """The format in which the model is prompted: ``prompt_format``, or "plain" if it is None."""
        return self.prompt_format or "plain"

    @property
    def protocols(self) -> tuple[Protocol, ...] | None:
        """The names in ``protocol``, or None if ``protocol`` is "auto". The first one gives the headline scores."""
        if self.protocol == "auto":
            return None
        return (self.protocol,) if isinstance(self.protocol, str) else tuple(self.protocol)

    @property
    def extra_metrics(self) -> frozenset[str]:
        """The names in ``metrics``, or all names if ``metrics`` is "all"."""
        return frozenset(EXTRA_METRICS if self.metrics == "all" else self.metrics)
