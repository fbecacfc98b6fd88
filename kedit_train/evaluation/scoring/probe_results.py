"""The result of one evaluation prompt (probe), and the function that runs a model on all probes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from kedit_train.evaluation.asking.batching import unwrap_model
from kedit_train.evaluation.asking.generate import Answer, AnswerEnd, generate_answers
from kedit_train.evaluation.asking.probes import ProbeRequest
from kedit_train.evaluation.asking.teacher_forced import TeacherForced, teacher_forced
from kedit_train.evaluation.options import EvaluationOptions
from kedit_train.evaluation.scoring.normalize import contains

Judge = Callable[[str, Sequence[str]], bool]


@dataclass(frozen=True, kw_only=True)
class ProbeResult(ProbeRequest):
    """One evaluation prompt (probe) with the model's answer and scores.

    Args:
        answer: the generated answer.
        ended: True if the model ended the answer itself.
        margin: the smallest difference between the two largest logits, over all tokens of the answer. None if no token
            was generated.
        right: True if the answer equals one of the ``accepted`` answers. None if ``accepted`` is empty.
        contained: True if the answer contains one of the ``accepted`` answers. None if ``accepted`` is empty.
        before: the unedited model's answer. None without a report on the unedited model.
        right_before: True if the unedited model's answer was right.
        unchanged: True if ``answer`` and ``before`` are equal after normalization, even if both are wrong.
        tokens_right: for each token of the preferred answer, True if the token is ranked first under teacher forcing.
        token_log_probs: for each token of the preferred answer, the log-probability under teacher forcing.
        old_log_prob: mean log-probability of the old answer's tokens, if the metric "resurgence" was measured.
        kl: KL(unedited || this model), in nats, for each token of the unedited model's answer. Empty if the metric "kl"
            was not measured.
    """

    answer: str
    ended: bool
    margin: float | None = None
    right: bool | None = None
    contained: bool | None = None
    before: str | None = None
    right_before: bool | None = None
    unchanged: bool | None = None
    tokens_right: tuple[bool, ...] = ()
    token_log_probs: tuple[float, ...] = ()
    old_log_prob: float | None = None
    kl: tuple[float, ...] = ()

    @property
    def token_accuracy(self) -> float | None:
        """The fraction of the preferred answer's tokens that are ranked first under teacher forcing."""
        return sum(self.tokens_right) / len(self.tokens_right) if self.tokens_right else None

    @property
    def log_prob(self) -> float | None:
        """The mean log-probability of the preferred answer's tokens."""
        return sum(self.token_log_probs) / len(self.token_log_probs) if self.token_log_probs else None

    @property
    def says_old(self) -> bool | None:
        """True if the answer contains the old answer and is not right.

        A right answer can contain the old answer. For example, the new answer "Paris, Texas" contains "Paris".
        """
        return None if self.old_target is None else not self.right and contains(self.answer, [self.old_target])

    @property
    def prefers_old(self) -> float | None:
        """1 if the old answer is more probable per token than the new answer, 0 if less probable, 0.5 if equal."""
        if self.old_log_prob is None or self.log_prob is None:
            return None
        return 0.5 * (1 + (self.old_log_prob > self.log_prob) - (self.old_log_prob < self.log_prob))


def answer_requests(
    model: nn.Module,
    tokenizer: Any,
    requests: Sequence[ProbeRequest],
    options: EvaluationOptions,
    *,
    judge: Judge,
    progress: bool,
) -> tuple[list[ProbeResult], dict[str, Answer]]:
    """Generate the model's answer to every probe, and score the preferred answer under teacher forcing.

    The teacher-forced pass gives the beginning of the generated answer, up to and including the first token that
    differs from the preferred answer. Only the tokens after this token are generated. If a probe has no accepted
    answer, all tokens are generated, and the probe has no teacher-forced score.

    Args:
        model: the model. It is left unchanged.
        tokenizer: the model's tokenizer.
        requests: the probes.
        options: how to prompt the model. With the metric "resurgence", the old answers are also scored.
        judge: decides whether an answer is right.
        progress: show progress bars in a terminal.

    Returns:
        One result per probe, and a dict from prompt to answer. The dict does not contain the continuations for
        "fluency".
    """
    settings: dict[str, Any] = {"batch_size": options.batch_size, "prompt_format": options.asked_format}
    settings["progress"] = progress
    with_old = "resurgence" in options.extra_metrics
    pairs = [(r.prompt, r.accepted[0]) for r in requests if r.accepted]
    if with_old:
        pairs += [(r.prompt, r.old_target) for r in requests if r.old_target is not None]
    forced = dict(zip(pairs, teacher_forced(model, tokenizer, pairs, **settings), strict=True))
    is_end = AnswerEnd(unwrap_model(model), tokenizer, prompt_format=options.asked_format)
    starts: dict[str, tuple[list[int], float]] = {}
    for (prompt, _), scores in forced.items():
        ids, margin = scores.greedy_start(is_end)
        if prompt not in starts or len(ids) > len(starts[prompt][0]):
            starts[prompt] = (ids, margin)
    prompts = [r.prompt for r in requests if r.question != "fluency"]
    generated = generate_answers(
        model, tokenizer, prompts, max_new_tokens=options.max_new_tokens, known_starts=starts, **settings
    )
    answers = dict(zip(prompts, generated, strict=True))
    open_prompts = [r.prompt for r in requests if r.question == "fluency"]
    texts: dict[str, Answer] = {}
    if open_prompts:
        settings |= {"max_new_tokens": options.fluency_tokens, "single_line": False}
        texts = dict(zip(open_prompts, generate_answers(model, tokenizer, open_prompts, **settings), strict=True))
    results = [
        _result(r, (texts if r.question == "fluency" else answers)[r.prompt], forced, judge, with_old) for r in requests
    ]
    return results, answers


def _result(
    request: ProbeRequest,
    answer: Answer,
    forced: Mapping[tuple[str, str], TeacherForced],
    judge: Judge,
    with_old: bool,
) -> ProbeResult:
    scores = forced[request.prompt, request.accepted[0]] if request.accepted else None
    old = forced[request.prompt, request.old_target] if with_old and request.old_target is not None else None
    return ProbeResult(
        **{field.name: getattr(request, field.name) for field in fields(request)},
        answer=answer.text,
        ended=answer.ended,
        margin=answer.margin if answer.margin != float("inf") else None,
        right=bool(judge(answer.text, request.accepted)) if request.accepted else None,
        contained=contains(answer.text, request.accepted) if request.accepted else None,
        tokens_right=scores.correct if scores else (),
        token_log_probs=scores.log_probs if scores else (),
        old_log_prob=old.mean_log_prob if old else None,
    )
