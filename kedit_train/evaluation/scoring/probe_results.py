"""The result of one evaluation prompt (probe), and the function that runs a model on all probes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from kedit_train.data.tokenization import encode_continuation
from kedit_train.evaluation.asking.batching import unwrap_model
from kedit_train.evaluation.asking.generate import Answer, AnswerEnd, generate_answers
from kedit_train.evaluation.asking.probes import ProbeRequest
from kedit_train.evaluation.asking.shared_prompts import Scores, answer_and_score, can_share_prompts
from kedit_train.evaluation.asking.teacher_forced import TeacherForced, teacher_forced
from kedit_train.evaluation.options import EvaluationOptions
from kedit_train.evaluation.scoring.normalize import contains
from kedit_train.evaluation.scoring.protocols import END, EXACT, MARGIN, MINIMUM_KEPT, Protocols, is_right

Judge = Callable[[str, Sequence[str]], bool]

# Maximum length of the continuations for "fluency", in tokens, as in CounterFact (arXiv 2202.05262).
FLUENCY_TOKENS = 100
# Questions whose answers are open texts. A line break does not end such an answer.
OPEN = ("fluency", "overlap")


@dataclass(frozen=True, kw_only=True)
class ProbeResult(ProbeRequest):
    """One evaluation prompt (probe) with the model's answer and scores.

    The fields of :class:`ProbeRequest` come first. One of them, ``accepted``, contains all answers that count as right.
    Its first entry is called the preferred answer.

    Args:
        answer: the generated answer.
        ended: True if the model ended the answer itself.
        margin: the largest logit minus the second largest logit, at the token of the answer where this difference is
            smallest. None if no token was generated.
        right: True if the answer is right under the report's first protocol. None if ``accepted`` is empty.
        contained: True if the answer contains one of the ``accepted`` answers. None if ``accepted`` is empty.
        before: the unedited model's answer. None without a report on the unedited model.
        right_before: True if the unedited model's answer was right.
        unchanged: True if the report's first protocol counts the answer as equal to the unedited model's answer, even
            if both answers are wrong.
        tokens_right: for each token of the preferred answer, True if the token is ranked first under teacher forcing.
        token_log_probs: for each token of the preferred answer, the log-probability under teacher forcing.
        choices: the id of the token that is ranked first at each position of the preferred answer. Empty unless the
            probe is a locality probe and the protocols include "teacher_forced".
        first_tokens: the ids of the answer's first tokens, only on locality probes. Their number is the length of the
            preferred answer in tokens, but at least 3. If the answer ends earlier, -1 marks its end.
        tokens_kept: the fraction of the unedited model's ``first_tokens`` that come before the first difference between
            both models.
        choices_kept: the fraction of ``choices`` that are equal to the unedited model's choices.
        same_answer: True if the whole answers of both models are equal after normalization. None if the protocols do
            not generate whole answers.
        old_log_prob: mean log-probability of the old answer's tokens, if the evaluation used the metric "resurgence"
            or the protocol "probability".
        new_log_prob: on locality probes with the protocol "probability", the mean log-probability of ``new_target``.
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
    choices: tuple[int, ...] = ()
    first_tokens: tuple[int, ...] = ()
    tokens_kept: float | None = None
    choices_kept: float | None = None
    same_answer: bool | None = None
    old_log_prob: float | None = None
    new_log_prob: float | None = None
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
    def rival_log_prob(self) -> float | None:
        """The mean log-probability of the answer that competes with the preferred answer.

        This is ``new_log_prob``. If ``new_log_prob`` is None, it is ``old_log_prob``.
        """
        return self.old_log_prob if self.new_log_prob is None else self.new_log_prob

    @property
    def magnitude(self) -> float | None:
        """The difference between the probabilities per token of two answers, as in CounterFact.

        This is P(preferred answer) - P(old answer). On locality probes, it is P(preferred answer) - P(new answer of the
        edit). The probability per token is exp(mean log-probability).
        """
        if self.log_prob is None or self.rival_log_prob is None:
            return None
        return math.exp(self.log_prob) - math.exp(self.rival_log_prob)

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
    protocols: Protocols,
    judge: Judge,
    progress: bool,
) -> tuple[list[ProbeResult], dict[str, Answer]]:
    """Generate the model's answer to every probe, and score the preferred answer under teacher forcing.

    If "exact" is the only protocol, or if ``can_share_prompts(model)`` is False, the model reads each prompt twice:
    once to score the preferred answer, and once to generate its own answer. Otherwise, it reads each prompt once. A
    probe without an accepted answer has no teacher-forced score.

    Args:
        model: the model. It is left unchanged.
        tokenizer: the model's tokenizer.
        requests: the probes.
        options: how to prompt the model. With the metric "resurgence", the old answers are also scored.
        protocols: the protocols. They decide how many tokens are generated, and which answers are scored.
        judge: decides whether an answer is right under the protocol "exact".
        progress: show progress bars in a terminal.

    Returns:
        One result per probe, and a dict from prompt to answer. The dict does not contain the texts for
        "fluency" and "overlap".
    """
    settings: dict[str, Any] = {"batch_size": options.batch_size, "prompt_format": options.asked_format}
    settings["progress"] = progress
    asked = [r for r in requests if r.question not in OPEN]
    pairs = [(r.prompt, r.accepted[0]) for r in asked if r.accepted]
    pairs += [(r.prompt, rival) for r in asked if (rival := _rival(r, options, protocols)) is not None]
    prompts = list(dict.fromkeys(r.prompt for r in asked))
    if protocols.whole_answers:
        limits = dict.fromkeys(prompts, options.max_new_tokens)
    else:
        limits = _short_limits(tokenizer, asked)
    # If "exact" is the only protocol, each prompt is read twice. Reading it once would be faster, but rounding could
    # then give other answers than in reports of earlier versions.
    share = protocols.names != EXACT.names and can_share_prompts(model)
    ask = _ask_together if share else _ask_separately
    answers, forced = ask(model, tokenizer, prompts, pairs, limits, protocols, settings)
    texts: dict[tuple[str, str], Answer] = {}
    for question in OPEN:
        if limits := _open_limits(tokenizer, [r for r in requests if r.question == question]):
            generated = generate_answers(model, tokenizer, list(limits), max_new_tokens=limits, stops=(), **settings)
            texts |= {(question, prompt): answer for prompt, answer in zip(limits, generated, strict=True)}
    results = []
    for request in requests:
        answer = texts.get((request.question, request.prompt)) or answers[request.prompt]
        result = _result(request, answer, forced, _rival(request, options, protocols), protocols)
        results.append(replace(result, right=is_right(protocols.headline, result, judge)))
    return results, answers


def _ask_separately(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    limits: Mapping[str, int],
    protocols: Protocols,
    settings: dict[str, Any],
) -> tuple[dict[str, Answer], Scores]:
    """Score the targets in a first pass over the prompts, and generate the answers in a second pass."""
    forced = dict(zip(pairs, teacher_forced(model, tokenizer, pairs, **settings), strict=True))
    is_end = AnswerEnd(unwrap_model(model), tokenizer, protocols.stops, settings["prompt_format"])
    # The first pass already shows the greedy answer up to and including the first token that differs from the target.
    # So only the tokens after it are generated.
    starts: dict[str, tuple[list[int], float]] = {}
    for (prompt, _), scores in forced.items():
        ids, margin = scores.greedy_start(is_end)
        if prompt not in starts or len(ids) > len(starts[prompt][0]):
            starts[prompt] = (ids, margin)
    generated = generate_answers(
        model, tokenizer, prompts, max_new_tokens=limits, known_starts=starts, stops=protocols.stops, **settings
    )
    return dict(zip(prompts, generated, strict=True)), forced


def _ask_together(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    limits: Mapping[str, int],
    protocols: Protocols,
    settings: dict[str, Any],
) -> tuple[dict[str, Answer], Scores]:
    """Score the targets and generate the answers in one pass over the prompts."""
    targets: dict[str, list[str]] = {prompt: [] for prompt in prompts}
    for prompt, target in pairs:
        targets[prompt].append(target)
    return answer_and_score(model, tokenizer, targets, limits=limits, stops=protocols.stops, **settings)


def _rival(request: ProbeRequest, options: EvaluationOptions, protocols: Protocols) -> str | None:
    """Return the answer that should be less probable than the preferred answer, or None."""
    if "probability" in protocols.names and request.accepted:
        if request.new_target not in (None, request.accepted[0]):
            return request.new_target
        if request.question in ("reliability", "generality"):
            return request.old_target
    return request.old_target if "resurgence" in options.extra_metrics else None


def _short_limits(tokenizer: Any, requests: Sequence[ProbeRequest]) -> dict[str, int]:
    """Return how many tokens to generate for each prompt, for protocols that need only the beginning of an answer."""
    lengths: dict[str, int] = {}
    limits: dict[str, int] = {}
    for request in requests:
        for answer in request.accepted:
            if answer not in lengths:
                lengths[answer] = len(encode_continuation(tokenizer, f" {answer}"))
        longest = max((lengths[answer] for answer in request.accepted), default=0)
        limits[request.prompt] = max(limits.get(request.prompt, MINIMUM_KEPT), longest + MARGIN if longest else 0)
    return limits


def _open_limits(tokenizer: Any, requests: Sequence[ProbeRequest]) -> dict[str, int]:
    """Return how many tokens to generate for each prompt of the metrics "fluency" and "overlap"."""
    limits: dict[str, int] = {}
    for request in requests:
        lengths = [len(encode_continuation(tokenizer, f" {answer}")) + MARGIN for answer in request.accepted]
        limits[request.prompt] = max([limits.get(request.prompt, 0), *(lengths or [FLUENCY_TOKENS])])
    return limits


def _result(
    request: ProbeRequest,
    answer: Answer,
    forced: Mapping[tuple[str, str], TeacherForced],
    rival: str | None,
    protocols: Protocols,
) -> ProbeResult:
    scores = forced[request.prompt, request.accepted[0]] if request.accepted else None
    rival_log_prob = None if rival is None else forced[request.prompt, rival].mean_log_prob
    is_locality = "locality" in (request.question, request.kind)
    kept = max(MINIMUM_KEPT, len(scores.correct) if scores else 0)
    first = (*answer.ids, *((END,) if answer.ended else ()))[:kept]
    with_choices = is_locality and scores is not None and "teacher_forced" in protocols.names
    return ProbeResult(
        **{field.name: getattr(request, field.name) for field in fields(request)},
        answer=answer.text,
        ended=answer.ended,
        margin=answer.margin if answer.margin != float("inf") else None,
        contained=contains(answer.text, request.accepted) if request.accepted else None,
        tokens_right=scores.correct if scores else (),
        token_log_probs=scores.log_probs if scores else (),
        choices=scores.choices[: len(scores.correct)] if with_choices and scores else (),
        first_tokens=first if is_locality else (),
        old_log_prob=rival_log_prob if request.new_target is None else None,
        new_log_prob=rival_log_prob if request.new_target is not None else None,
    )
