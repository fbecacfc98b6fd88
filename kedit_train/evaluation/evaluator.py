"""Did it take, and what else changed? One evaluator, for the unedited model and for the edited one."""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from kedit_train.core.locality.texts import Texts
from kedit_train.data import Edit
from kedit_train.data.prompts import PromptFormat
from kedit_train.data.tokenization import shorten
from kedit_train.errors import EditError
from kedit_train.evaluation.asking.batching import DivergedError
from kedit_train.evaluation.asking.distributed import shared_out
from kedit_train.evaluation.asking.probes import EXTRAS, PREFIXES, Asked, probes_of
from kedit_train.evaluation.asking.questions import Judge, Settings, ask
from kedit_train.evaluation.options import EvaluationOptions
from kedit_train.evaluation.report import Report
from kedit_train.evaluation.reporting.metadata import meta_of
from kedit_train.evaluation.scoring.bootstrap import Score
from kedit_train.evaluation.scoring.divergence import Distribution, distributions, divergences
from kedit_train.evaluation.scoring.metrics import ProbeResult, summarise
from kedit_train.evaluation.scoring.normalize import exact_match, normalise
from kedit_train.evaluation.scoring.perplexity import perplexity, text_losses
from kedit_train.evaluation.scoring.weight_drift import weight_drift


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    options: EvaluationOptions | None = None,
    before: Report | None = None,
    metrics: Collection[str] = (),
    full: bool = False,
    texts: Any = None,
    reference: Mapping[str, Tensor] | nn.Module | None = None,
    prompt_format: PromptFormat = "plain",
    judge: Judge = exact_match,
    prefixes: Sequence[str] = PREFIXES,
    batch_size: int = 64,
    max_new_tokens: int = 32,
    fluency_tokens: int = 100,
    limit: int | None = None,
    progress: bool = True,
    seed: int = 0,
    distributed: bool = False,
) -> Report:
    """Put every question of ``edits`` to ``model`` and score the answers.

    Reliability is asked with the edit's prompt, generality with each of its rephrasings; portability and locality with
    the probes that the data brings. Each is scored on what the model generates (greedy, to its own end-of-text,
    normalised exact match with any accepted spelling) and, beside it, under teacher forcing on the preferred answer.
    That is the default, and its cost: one forward pass a probe, and generation where the model's answer is not that.

    Run it on the unedited model first and hand that report in as ``before``: then locality means "the same answer as
    before" instead of "the true answer", and the report shows both models side by side::

        before = evaluate(model, tokenizer, edits)
        ...  # train
        evaluate(model, tokenizer, edits, before=before).print()

    Args:
        model: a causal language model of transformers, or a PEFT model around one; left as it was found.
        tokenizer: its tokenizer.
        edits: what to ask.
        before: the unedited model's report on the same edits, with the same settings.
        metrics: what to measure beside the core: ``prefixes`` (generality after neutral sentences: two more
            answers an edit), ``format`` (generality as a question, or as a completion: one more), ``kl`` (of locality,
            to the unedited model: one more forward pass a locality probe, and 12 KiB a token to remember),
            ``resurgence`` (is the old answer still preferred, after its denial, as a choice: three more answers and
            the old answer scored), ``fluency`` (a continuation of ``fluency_tokens`` of every edit's prompt: as much
            as all the rest together).
        full: all of these.
        texts: unrelated texts for the perplexity: a list, or what ``KLLocality`` reads (a path, a dataset, "world").
        reference: the weights before the edit, for the drift: name -> value, or the unedited model.
        prompt_format: ``"plain"``, through the tokenizer's template as a ``"chat"``, or framed as a ``"question"``.
        judge: ``judge(answer, accepted) -> bool`` in place of exact match.
        prefixes: sentences for ``prefixes``, in place of the package's own.
        batch_size: rows at a time; no score depends on it (but see ``meta["near_ties"]``).
        max_new_tokens: where an answer that never ends is cut.
        fluency_tokens: where a continuation is.
        limit: evaluate a seeded sample of so many edits.
        progress: bars in a terminal.
        seed: of that sample, of the prefixes and of the bootstrap.
        distributed: share the edits out over the processes of the default group, each of which holds the whole model
            and calls; every one gets the same report. Without it each process evaluates all that it is given.

    Returns:
        A :class:`Report`. Probes without any accepted answer count in locality against ``before`` only;
        ``meta["unscored"]`` says how many of each question could not be scored. What the edits have no probes for has
        the value ``None``.

    Raises:
        EditError: no edits, a prompt beyond the model's context, NaN logits (the edit is named), a ``before`` that
            does not fit, an unknown metric.
    """
    if options is not None:
        metrics, full, texts = options.extra_metrics, False, options.texts
        prompt_format, batch_size, distributed = options.prompt_format, options.batch_size, options.distributed
        max_new_tokens, fluency_tokens = options.max_new_tokens, options.fluency_tokens
    extras = _extras(metrics, full)
    settings = Settings(batch_size, max_new_tokens, fluency_tokens, prompt_format, judge, progress)
    asked_with = {"max_new_tokens": max_new_tokens, "prompt_format": prompt_format}
    _check(edits, before, asked_with)
    if distributed and any(isinstance(module, FSDPModule) for module in model.modules()):
        raise EditError(
            "distributed=True shares the edits out, and the processes of a sharded model must all run the same "
            "batches: leave it out, and each evaluates everything"
        )
    began = time.perf_counter()
    chosen = _chosen(edits, limit, seed)
    kept: dict[str, Distribution] = {}

    def results_of(part: Sequence[tuple[str, Edit]]) -> list[list[ProbeResult]]:
        asked = [
            list(probes_of(edit, name, extras=extras, prefixes=prefixes, seed=seed, prompt_format=prompt_format))
            for name, edit in part
        ]
        rows = [one for own in asked for one in own]
        try:
            results, answers = ask(model, tokenizer, rows, settings, old="resurgence" in extras)
            near = list(dict.fromkeys(one.prompt for one in rows if one.question == "locality"))
            common: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
            if "kl" in extras and before is None:
                own = {prompt: answers[prompt] for prompt in near}
                kept.update(distributions(model, tokenizer, own, prompt_format=prompt_format, **common))
            elif "kl" in extras and before is not None:
                moved = divergences(model, tokenizer, before.distributions, near, **common)
                results = [replace(r, kl=moved[r.prompt]) if r.question == "locality" else r for r in results]
        except DivergedError as error:
            owner = next((one.edit for one in rows if one.prompt == error.prompt), None)
            raise DivergedError(error.prompt, owner) from error
        left = iter(results)
        return [[next(left) for _ in own] for own in asked]

    results = [result for own in shared_out(results_of, chosen, distributed) for result in own]
    if before is not None:
        results = _compared(results, before, judge)
    found = summarise(results, against_before=before is not None, seed=seed)
    found["perplexity"], found["weight_drift"] = Score(None, 0), {}
    if texts is not None:
        given = Texts.of(texts).load(edits, keep_leaks=True)
        losses = shared_out(
            lambda part: text_losses(model, tokenizer, part, batch_size=batch_size, progress=progress),
            given,
            distributed,
        )
        found["perplexity"] = perplexity(losses, seed)
    if reference is not None:
        found["weight_drift"] = weight_drift(model, reference)
    used = asked_with | {"batch_size": batch_size, "limit": limit, "decoding": "greedy", "metrics": sorted(extras)}
    used |= {"judge": getattr(judge, "__qualname__", type(judge).__name__), "fluency_tokens": fluency_tokens}
    meta = meta_of(model, edits, len(chosen), results, used, against_before=before is not None)
    meta |= {"seed": seed, "seconds": round(time.perf_counter() - began, 3)}
    unedited = before.metrics if before is not None else None
    return Report(metrics=found, unedited=unedited, answers=results, meta=meta, distributions=kept)


def _extras(metrics: Collection[str], full: bool) -> set[str]:
    if isinstance(metrics, str):
        raise EditError(f"metrics={metrics!r} is one string: give a list of {', '.join(EXTRAS)}")
    unknown = sorted(set(metrics) - set(EXTRAS))
    if unknown:
        raise EditError(f"metrics: {unknown[0]!r} is not known: use any of {', '.join(EXTRAS)}")
    return set(EXTRAS) if full else set(metrics)


def _check(edits: Sequence[Edit], before: Report | None, asked_with: Mapping[str, Any]) -> None:
    if not len(edits):
        raise EditError("no edits to evaluate: the data is empty")
    for name, value in asked_with.items() if before is not None else ():
        was = before.meta.get("settings", {}).get(name)  # pyright: ignore[reportOptionalMemberAccess]
        if was != value:
            raise EditError(
                f"the report given as before was made with {name}={was} and this call has {value}: "
                "use the same, or answers would differ by how they were asked for"
            )


def _chosen(edits: Sequence[Edit], limit: int | None, seed: int) -> list[tuple[str, Edit]]:
    numbers: Sequence[int] = range(len(edits))
    if limit is not None and limit < 1:
        raise EditError(f"limit is {limit}: give at least 1, or None for all edits")
    if limit is not None and limit < len(edits):
        numbers = sorted(random.Random(seed).sample(numbers, limit))
    return [(edits[number].id or str(number), edits[number]) for number in numbers]


def _compared(results: Sequence[ProbeResult], before: Report, judge: Judge) -> list[ProbeResult]:
    """Results with what the unedited model said to the same prompts."""
    said = {(result.question == "fluency", result.prompt): result.answer for result in before.answers}
    found = []
    for result in results:
        was = said.get((result.question == "fluency", result.prompt))
        if was is None and not _on_request(result):
            raise EditError(
                f"the report given as before has no answer to {shorten(result.prompt)!r}: evaluate the unedited model "
                "on the same edits, with the same limit and seed"
            )
        if was is not None:
            right = bool(judge(was, result.accepted)) if result.accepted else None
            unchanged = normalise(was) == normalise(result.answer)
            result = replace(result, before=was, right_before=right, unchanged=unchanged)
        found.append(result)
    return found


def _on_request(one: Asked) -> bool:
    """Whether a question is asked on request only, so that the unedited model may not have been asked."""
    return one.question in ("resurgence", "fluency") or (one.question == "generality" and one.kind != "rephrase")
