"""``evaluate``: run a model on all evaluation prompts (probes) of the edits, and score the answers."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from kedit_train.core.gate.gate import find_gate
from kedit_train.core.locality.texts import Texts
from kedit_train.data import Edit
from kedit_train.data.chat_format import describe_format
from kedit_train.errors import EditError, reported_by
from kedit_train.evaluation.asking.batching import DivergedError, unwrap_model
from kedit_train.evaluation.asking.distributed import split_across_processes
from kedit_train.evaluation.asking.generate import Answer
from kedit_train.evaluation.asking.probes import PREFIXES, ProbeRequest, probe_requests
from kedit_train.evaluation.options import EvaluationOptions
from kedit_train.evaluation.report import Report
from kedit_train.evaluation.reporting.metadata import report_metadata
from kedit_train.evaluation.scoring.bootstrap import NO_SCORE
from kedit_train.evaluation.scoring.comparison import compare_with_unedited
from kedit_train.evaluation.scoring.divergence import Distribution, compute_divergences, record_distributions
from kedit_train.evaluation.scoring.metrics import summarize
from kedit_train.evaluation.scoring.normalize import exact_match
from kedit_train.evaluation.scoring.own_endings import choose_protocols
from kedit_train.evaluation.scoring.probe_results import FLUENCY_TOKENS, Judge, ProbeResult, answer_requests
from kedit_train.evaluation.scoring.prose import TextResult, measure_prose, prose_scores
from kedit_train.evaluation.scoring.protocols import EXACT, Protocols
from kedit_train.evaluation.scoring.reachable_targets import warn_unreachable
from kedit_train.evaluation.scoring.retrieval import compare_with_own_answers, retrieval_requests
from kedit_train.evaluation.scoring.weight_drift import BY_TENSOR, norms_by_tensor, tensor_drift, total_drift

# Options that change an answer. They must be equal for the unedited and the edited model.
_ANSWER_SETTINGS = ("max_new_tokens", "prompt_format")


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    options: EvaluationOptions | None = None,
    unedited: Report | None = None,
    reference_weights: Mapping[str, Tensor] | nn.Module | None = None,
    judge: Judge = exact_match,
    prefixes: Sequence[str] = PREFIXES,
    limit: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Run ``model`` on all evaluation prompts (probes) of ``edits``, and score the answers.

    Reliability is measured with the prompt of each edit, and generality with the rephrasings of this prompt.
    Portability and locality are measured with the probes in the data. Each probe has a list of accepted answers. The
    first of them is the preferred answer. Each probe gets two scores:

    - generated: 1 if the model's free answer is right, otherwise 0. The answer is decoded greedily.
      ``options.protocol`` says where an answer ends and how it is compared;
    - teacher-forced: the fraction of the preferred answer's tokens that the model ranks first when it reads all earlier
      tokens of this answer.

    If ``options`` does not set a protocol, the protocol is usually "exact". With this protocol, a probe needs only one
    forward pass if the model gives the preferred answer. For all other probes, the model must also generate tokens one
    by one.

    Evaluate the unedited model first, and pass the resulting report as ``unedited``. Locality is then the fraction of
    answers that equal the unedited model's answer, and the report shows both models. Without ``unedited``, locality is
    the fraction of right answers.

    Args:
        model: a causal language model of transformers, or a PEFT model around one. The model is left unchanged.
        tokenizer: the model's tokenizer.
        edits: the edits to evaluate.
        options: what to measure and how to prompt. Default: ``EvaluationOptions()``.
        unedited: the unedited model's report on the same edits, made with the same options.
        reference_weights: the unedited model, or a dict from parameter name to value before the edit. The report then
            contains the weight drift (the distance from these weights). None: no weight drift.
        judge: ``judge(answer, accepted) -> bool``, which decides whether an answer is right. It replaces the exact
            match of the protocol "exact", and cannot be used with another protocol.
        prefixes: sentences for the metric "prefixes", used instead of the built-in English ones.
        limit: evaluate a random sample of this many edits. None: all edits.
        seed: seed of the sample, the prefixes and the bootstrap.
        progress: show progress bars in a terminal.

    Returns:
        A :class:`~kedit_train.evaluation.Report`. A metric without probes has the value None. A probe without an
        accepted answer gets no score. If ``unedited`` is given, locality probes need no accepted answer, and all of
        them are scored. ``meta["unscored"]`` counts the probes without a score, per metric.

    Raises:
        EditError: there are no edits, a prompt is longer than the model's context, or the logits are NaN. The error is
            also raised if ``unedited`` was made with other edits or options, or if ``judge`` is given with a protocol
            other than "exact".

    References:
        Yang et al., "The Mirage of Model Editing: Revisiting Evaluation in the Wild", arXiv 2502.11177.

    Example:
        >>> from kedit_train import EditDataset, evaluate, world
        >>> model, tokenizer = world.load()
        >>> edits = EditDataset.load("world", limit=2)
        >>> unedited = evaluate(model, tokenizer, edits)
        >>> # ... train the edits into the model here ...
        >>> report = evaluate(model, tokenizer, edits, unedited=unedited)
        >>> score = report.metrics["locality"]["generated"]
        >>> score.value, report.metrics["locality"]["compared_with"]
        (1.0, 'unedited model')
    """
    options = options or EvaluationOptions()
    options = replace(options, prompt_format=options.asked_format)
    started = time.perf_counter()
    with reported_by("evaluate"):
        _check(model, edits, options, unedited)
        sample = _sample(edits, limit, seed)
        protocols = _protocols(model, tokenizer, sample, options, unedited, judge, progress)
        if unedited is None:
            warn_unreachable(sample, protocols, judge)
        evaluation = _Evaluation(model, tokenizer, options, protocols, unedited, judge, prefixes, seed, progress)
        parts = split_across_processes(evaluation.run, sample, options.distributed)
        results = [result for part in parts for result in part]
        if unedited is not None:
            results = compare_with_unedited(results, unedited.answers, protocols, judge)
        metrics = summarize(results, against_unedited=unedited is not None, protocols=protocols, seed=seed)
        if unedited is not None and "retrieval" in unedited.metrics:
            metrics["retrieval"] = unedited.metrics["retrieval"]
        metrics |= evaluation.prose(edits)
        drifts = None if reference_weights is None else tensor_drift(model, reference_weights)
        metrics["weight_drift"] = {} if drifts is None else total_drift(drifts)
    settings = {
        "protocol": str(protocols),
        **{name: getattr(options, name) for name in (*_ANSWER_SETTINGS, "batch_size")},
        "fluency_tokens": FLUENCY_TOKENS,
        "prompt_format": describe_format(options.prompt_format),
        "limit": limit,
        "decoding": "greedy",
        "metrics": sorted(options.extra_metrics),
        "judge": getattr(judge, "__qualname__", type(judge).__name__),
    }
    meta = report_metadata(model, edits, len(sample), results, settings, against_unedited=unedited is not None)
    gate = find_gate(unwrap_model(model))
    meta |= {} if gate is None else {"gate": {"keys": len(gate.radii), "layer": gate.layer}}
    meta |= {} if drifts is None else {BY_TENSOR: norms_by_tensor(drifts)}
    meta |= {"protocol_reason": protocols.reason, "seed": seed, "seconds": round(time.perf_counter() - started, 3)}
    return Report(
        metrics=metrics,
        unedited=None if unedited is None else unedited.metrics,
        answers=results,
        meta=meta,
        distributions=evaluation.distributions,
    )


@dataclass
class _Evaluation:
    """The arguments of one call of :func:`evaluate`, and the next-token distributions that this call records."""

    model: nn.Module
    tokenizer: Any
    options: EvaluationOptions
    protocols: Protocols
    unedited: Report | None
    judge: Judge
    prefixes: Sequence[str]
    seed: int
    progress: bool
    distributions: dict[str, Distribution] = field(default_factory=dict)

    def run(self, edits: Sequence[tuple[str, Edit]]) -> list[list[ProbeResult]]:
        """Return the probe results of each (name, edit) pair."""
        requests = [
            list(
                probe_requests(
                    edit,
                    name,
                    metrics=self.options.extra_metrics,
                    prefixes=self.prefixes,
                    seed=self.seed,
                    prompt_format=self.options.asked_format,
                )
            )
            for name, edit in edits
        ]
        flat = [request for own in requests for request in own]
        try:
            results, answers = self._answer(flat)
            results = self._add_divergences(results, answers)
            baseline = self._retrieval(dict(edits), results)
        except DivergedError as error:
            name = next((request.edit for request in flat if request.prompt == error.prompt), None)
            raise DivergedError(error.prompt, name) from error
        remaining = iter(results)
        return [
            [*(next(remaining) for _ in own), *baseline.get(name, ())]
            for (name, _), own in zip(edits, requests, strict=True)
        ]

    def _answer(self, requests: Sequence[ProbeRequest]) -> tuple[list[ProbeResult], dict[str, Answer]]:
        return answer_requests(
            self.model,
            self.tokenizer,
            requests,
            self.options,
            protocols=self.protocols,
            judge=self.judge,
            progress=self.progress,
        )

    def _retrieval(self, edits: Mapping[str, Edit], results: Sequence[ProbeResult]) -> dict[str, list[ProbeResult]]:
        """Return the results of the retrieval baseline, by edit name. For an edited model, return an empty dict."""
        by_edit: dict[str, list[ProbeResult]] = {}
        if "retrieval" not in self.options.extra_metrics or self.unedited is not None:
            return by_edit
        requests = retrieval_requests(edits, results)
        with_fact, _ = self._answer([request for _, request in requests])
        base = [results[index] for index, _ in requests]
        for result in compare_with_own_answers(base, with_fact, self.protocols, self.judge):
            by_edit.setdefault(result.edit, []).append(result)
        return by_edit

    def _add_divergences(self, results: list[ProbeResult], answers: Mapping[str, Answer]) -> list[ProbeResult]:
        """If the metric "kl" is requested, add the KL divergence from the unedited model to the locality results.

        For the unedited model itself, record its next-token distributions instead. The evaluation of the edited model
        compares that model with these distributions.
        """
        if "kl" not in self.options.extra_metrics:
            return results
        settings: dict[str, Any] = {"batch_size": self.options.batch_size, "progress": self.progress}
        prompts = list(dict.fromkeys(result.prompt for result in results if result.question == "locality"))
        if self.unedited is None:
            own_answers = {prompt: answers[prompt] for prompt in prompts}
            settings["prompt_format"] = self.options.asked_format
            self.distributions.update(record_distributions(self.model, self.tokenizer, own_answers, **settings))
            return results
        kl = compute_divergences(self.model, self.tokenizer, self.unedited.distributions, prompts, **settings)
        return [replace(r, kl=kl[r.prompt]) if r.question == "locality" else r for r in results]

    def prose(self, edits: Sequence[Edit]) -> dict[str, Any]:
        """Return a dict with the scores on the texts in ``options.prose``.

        The value of "perplexity" is the perplexity of these texts. The value of "prose" is a dict of scores that
        compare the model with the unedited model. This dict is empty if there is no report on the unedited model.
        """
        options = self.options
        if options.prose is None:
            return {"perplexity": NO_SCORE, "prose": {}}
        reference = None if self.unedited is None else self.unedited.distributions

        def read(texts: Sequence[str]) -> list[TextResult]:
            settings: dict[str, Any] = {"batch_size": options.batch_size, "progress": self.progress}
            results, recorded = measure_prose(self.model, self.tokenizer, texts, reference=reference, **settings)
            self.distributions.update(recorded)
            return results

        texts = Texts.of(options.prose).load(edits, keep_leaks=True, tokenizer=self.tokenizer)
        scores = prose_scores(split_across_processes(read, texts, options.distributed), self.seed)
        return {"perplexity": scores.pop("perplexity"), "prose": scores if self.unedited is not None else {}}


def _check(model: nn.Module, edits: Sequence[Edit], options: EvaluationOptions, unedited: Report | None) -> None:
    if not len(edits):
        raise EditError("edits is empty; give at least one edit.")
    if options.distributed and any(isinstance(module, FSDPModule) for module in model.modules()):
        raise EditError(
            "distributed must be False for a model that FSDP2 shards, got True. All processes must take part in each "
            "forward pass of such a model, so every process must evaluate all edits; set distributed=False."
        )
    if unedited is None:
        return
    settings: Mapping[str, Any] = unedited.meta.get("settings", {})
    for name in _ANSWER_SETTINGS:
        before, now = settings.get(name), getattr(options, name)
        now = describe_format(now) if name == "prompt_format" else now
        if before != now:
            raise EditError(
                f"the report passed as unedited= was made with {name}={before!r}, but options.{name} is {now!r}; "
                f"evaluate the unedited and the edited model with the same {name}."
            )


def _sample(edits: Sequence[Edit], limit: int | None, seed: int) -> list[tuple[str, Edit]]:
    """Return the edits to evaluate, each with its name in the results."""
    numbers: Sequence[int] = range(len(edits))
    if limit is not None and limit < 1:
        raise EditError(f"limit must be >= 1 or None, got {limit}.")
    if limit is not None and limit < len(edits):
        numbers = sorted(random.Random(seed).sample(numbers, limit))
    return [(edits[number].id or str(number), edits[number]) for number in numbers]


def _protocols(
    model: nn.Module,
    tokenizer: Any,
    edits: Sequence[tuple[str, Edit]],
    options: EvaluationOptions,
    unedited: Report | None,
    judge: Judge,
    progress: bool,
) -> Protocols:
    """Return the protocols of the evaluation.

    The first rule that applies decides:

    - If the unedited model's report is given, its protocols are used.
    - If ``options.protocol`` is not "auto", it sets the protocols.
    - If a judge is given, the protocol is "exact".
    - If none of these rules applies, :func:`choose_protocols` chooses the protocols.

    Raises:
        EditError: a judge is given, but ``options.protocol`` is neither "auto" nor "exact". The error is also raised if
            the protocols of ``unedited`` do not fit ``options`` or the judge.
    """
    given = None if options.protocols is None else Protocols(options.protocols)
    if judge is not exact_match:
        given = given or Protocols(EXACT.names, "judge is given")
        if given.names != EXACT.names:
            raise EditError(
                f'judge needs protocol="exact", got protocol="{given}"; a judge compares whole answers. '
                'Remove judge, or set EvaluationOptions(protocol="exact").'
            )
    if unedited is None:
        if given is not None:
            return given
        try:
            return choose_protocols(model, tokenizer, [edit for _, edit in edits], options, progress=progress)
        except DivergedError as error:
            name = next((name for name, edit in edits if edit.prompt == error.prompt), None)
            raise DivergedError(error.prompt, name) from error
    known = unedited.protocols
    if given is not None and given.names != known.names:
        raise EditError(
            f'the report passed as unedited= was made with protocol="{known}", but the protocol is now "{given}"; '
            "evaluate the unedited and the edited model with the same protocol."
        )
    return known
