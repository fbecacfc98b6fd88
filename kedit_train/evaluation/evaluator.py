"""Did it take, and what else changed? One evaluator, for the unedited model and for the edited one."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import transformers
from torch import nn

from kedit_train.data import Edit, Probe
from kedit_train.errors import EditError
from kedit_train.evaluation.batching import shorten
from kedit_train.evaluation.generate import generate_answers
from kedit_train.evaluation.metrics import ProbeResult, summarise
from kedit_train.evaluation.normalise import exact_match, normalise
from kedit_train.evaluation.report import Report
from kedit_train.evaluation.teacher_forced import teacher_forced


def probes_of(edit: Edit) -> Iterator[tuple[str, str, Probe]]:
    """Everything that an edit is asked: ``(question, kind, probe)``, the edit's own prompt first."""
    yield "reliability", "prompt", Probe(edit.prompt, edit.answers)
    for rephrase in edit.rephrases:
        yield "generality", "rephrase", Probe(rephrase, edit.answers)
    for question, by_kind in (("portability", edit.portability), ("locality", edit.locality)):
        for kind, probes in by_kind.items():
            for probe in probes:
                yield question, kind, probe


def _chosen(edits: Sequence[Edit], limit: int | None, seed: int) -> list[tuple[int, Edit]]:
    numbers: Sequence[int] = range(len(edits))
    if limit is not None and limit < 1:
        raise EditError(f"limit is {limit}: give at least 1, or None for all edits")
    if limit is not None and limit < len(edits):
        numbers = sorted(random.Random(seed).sample(numbers, limit))
    return [(number, edits[number]) for number in numbers]


def _data_hash(edits: Sequence[Edit]) -> str:
    own = getattr(edits, "hash", None)
    if isinstance(own, str):
        return own
    text = json.dumps([asdict(edit) for edit in edits], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _with_before(result: ProbeResult, before: dict[str, str]) -> ProbeResult:
    if result.prompt not in before:
        raise EditError(
            f"the report given as before has no answer to {shorten(result.prompt)!r}: evaluate the unedited model on "
            "the same edits, with the same limit and seed"
        )
    said = before[result.prompt]
    return replace(
        result,
        before=said,
        right_before=exact_match(said, result.accepted) if result.accepted else None,
        unchanged=normalise(said) == normalise(result.answer),
    )


def _own_version() -> str:
    try:
        return version("kedit-train")
    except PackageNotFoundError:
        return "not installed (run from a checkout)"


def _meta(model: nn.Module, edits: Sequence[Edit], n: int, results: Sequence[ProbeResult], settings: dict) -> dict:
    config = getattr(model, "config", None)
    return {
        "n_edits": n,
        "n_edits_in_data": len(edits),
        "n_probes": len(results),
        "data_name": getattr(edits, "name", None) or "edits",
        "data_hash": _data_hash(edits),
        "model": getattr(config, "name_or_path", "") or type(model).__name__,
        "settings": settings,
        "versions": {
            "kedit_train": _own_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    before: Report | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 32,
    limit: int | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Report:
    """Put every question of ``edits`` to ``model`` and score the answers.

    Reliability is asked with the edit's prompt, generality with each of its rephrasings; portability and locality with
    the probes that the data brings. Each is scored on what the model generates (greedy, to its own end-of-text,
    normalised exact match with any accepted spelling) and, beside it, under teacher forcing on the preferred answer.

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
        batch_size: rows at a time; no score depends on it.
        max_new_tokens: where an answer that never ends is cut.
        limit: evaluate a seeded sample of so many edits.
        progress: bars in a terminal.
        seed: of that sample.

    Returns:
        A :class:`Report`. Probes without any accepted answer count in locality against ``before`` only;
        ``meta["unscored"]`` says how many of each question could not be scored.

    Raises:
        EditError: no edits, a prompt beyond the model's context, NaN logits, a ``before`` that does not fit.
    """
    if not len(edits):
        raise EditError("no edits to evaluate: the data is empty")
    if before is not None and before.meta.get("settings", {}).get("max_new_tokens") != max_new_tokens:
        raise EditError(
            f"the report given as before was made with max_new_tokens="
            f"{before.meta.get('settings', {}).get('max_new_tokens')} and this call has {max_new_tokens}: "
            "use the same, or answers would differ by where they were cut"
        )
    began = time.perf_counter()
    chosen = _chosen(edits, limit, seed)
    asked = [(n, edit, *probe) for n, edit in chosen for probe in probes_of(edit)]
    answers = generate_answers(
        model,
        tokenizer,
        [probe.prompt for *_, probe in asked],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    pairs = [(probe.prompt, probe.answers[0]) for *_, probe in asked if probe.answers]
    forced = iter(teacher_forced(model, tokenizer, pairs, batch_size=batch_size, progress=progress))
    results = []
    for (n, edit, question, kind, probe), answer in zip(asked, answers, strict=True):
        tokens = next(forced) if probe.answers else None
        results.append(
            ProbeResult(
                edit=edit.id or str(n),
                question=question,
                kind=kind,
                prompt=probe.prompt,
                accepted=tuple(probe.answers),
                answer=answer.text,
                ended=answer.ended,
                right=exact_match(answer.text, probe.answers) if probe.answers else None,
                token_accuracy=tokens.accuracy if tokens else None,
                tokens_right=tokens.correct if tokens else (),
                old_target=edit.old_target if question == "reliability" else None,
            )
        )
    if before is not None:
        said = {result.prompt: result.answer for result in before.answers}
        results = [_with_before(result, said) for result in results]
    settings = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "limit": limit, "decoding": "greedy"}
    meta = _meta(model, edits, len(chosen), results, settings)
    against_before = before is not None
    meta["unscored"] = _unscored(results, against_before)
    meta |= {"seed": seed, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    meta["seconds"] = round(time.perf_counter() - began, 3)
    return Report(
        metrics=summarise(results, against_before=against_before),
        unedited=before.metrics if before is not None else None,
        answers=results,
        meta=meta,
    )


def _unscored(results: Sequence[ProbeResult], against_before: bool) -> dict[str, int]:
    """Probes without an accepted answer, per question: they have no generated score (locality against before has)."""
    found: dict[str, int] = {}
    for result in results:
        if result.right is None and not (against_before and result.question == "locality"):
            found[result.question] = found.get(result.question, 0) + 1
    return found
