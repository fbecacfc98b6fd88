"""Single, batch, sequential, streaming: the ways in which edits meet a model, each named for what it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kedit_train.data import Edit, EditDataset
from kedit_train.errors import EditError
from kedit_train.evaluation import Report, evaluate
from kedit_train.evaluation.asking.batching import bar
from kedit_train.evaluation.reporting.metadata import meta_of
from kedit_train.evaluation.scoring.bootstrap import EditMean, Score
from kedit_train.evaluation.scoring.capability import CapabilityProbe
from kedit_train.evaluation.scoring.metrics import ProbeResult, summarise
from kedit_train.modes import wandb_curve as logged
from kedit_train.modes.result import Checkpoint, ModeResult
from kedit_train.modes.schedule import Mode, rounds
from kedit_train.modes.train_loop import TrainLoop
from kedit_train.modes.weight_backup import KeptWeights

CHECKPOINTS = (1, 10, 100, 1000)
Train = Callable[[nn.Module, Sequence[Edit]], None]
# What run_edits gives to evaluate itself, or what would make its scores those of something else.
_OWN = {"before": "run_edits makes it", "limit": "every mode asks everything", "distributed": "run it in one process"}


def run_edits(
    model: nn.Module,
    tokenizer: Any,
    edits: Sequence[Edit],
    mode: Mode,
    *,
    train: Train | None = None,
    checkpoints: Collection[int] = CHECKPOINTS,
    round_size: int | None = None,
    replay: int | None = None,
    capability: CapabilityProbe | None = None,
    wandb_run: Any = None,
    progress: bool = True,
    seed: int = 0,
    **evaluation: Any,
) -> ModeResult:
    """Edit ``model`` in one of four ways, and say what it knows of all its edits at the end and on the way.

    - ``single``: each edit on the unedited model, asked at once; after each the model is the unedited one again, bit
      for bit. What a method can do at best, and nothing that anybody would ship.
    - ``batch``: all the edits in one training (breadth-first).
    - ``sequential``: one training after the other, each of the next ``round_size`` edits (1), old ones never again.
    - ``streaming``: edits come ``round_size`` at a time (100), and each training gets the new ones with ``replay``
      earlier ones (all).

    One is never reported as another: the same fine-tuning of the same 1,000 facts has a reliability of 75 % in sequence
    and of 99 % breadth-first ("Fine-tuning Done Right in Model Editing", arXiv 2509.22072, table 1).

    Args:
        model, tokenizer, edits: as :func:`~kedit_train.evaluate` takes them. Except after ``single``, ``model`` is
            the edited one afterwards.
        mode: one of the four.
        train: ``train(model, edits)``, changes the model in place; by default :class:`TrainLoop`. Called once a round.
        checkpoints: of ``sequential`` and ``streaming``: after how many edits to ask all edits so far, with all their
            probes, once the round that reaches that many is over. The end is always one.
        round_size, replay: see :func:`~kedit_train.modes.rounds`.
        capability: what to measure beside the edits, before them and at each checkpoint; not in ``single``.
        wandb_run: what ``wandb.init`` returned. It gets ``retention/*`` over the number of edits at each checkpoint,
            and at the end the curve as chart and table, the answers, the targets token by token, and the result as
            artifact.
        progress: a bar over the edits, and the evaluation's own.
        seed: of replay, of the bootstrap, and of torch in each round: a round's training does not depend on how many
            random numbers were drawn before it. The random state outside is left as it was.
        evaluation: further arguments of :func:`~kedit_train.evaluate`: ``metrics``, ``full``, ``prompt_format``, ...

    Raises:
        EditError: no edits, arguments that the mode has no use for, a training that returns another model, or, in
            ``single``, one that leaves a model which cannot be restored.
    """
    if not len(edits):
        raise EditError("run_edits: no edits: the data is empty")
    plan = rounds(mode, len(edits), round_size, replay, seed)
    callbacks = getattr(train, "callbacks", ())
    # A training of the caller's may mean something else by that name.
    _check(mode, checkpoints, capability, evaluation, callbacks if isinstance(callbacks, (list, tuple)) else ())
    named = _named(edits)
    train = TrainLoop(tokenizer) if train is None else train
    asking: dict[str, Any] = evaluation | {"progress": progress, "seed": seed}
    before = evaluate(model, tokenizer, named, **asking)
    able = capability(model, tokenizer) if capability is not None else None
    meta = {
        "mode": mode,
        "n_edits": len(named),
        "round_size": len(plan[0].new),
        "replay": None if mode != "streaming" else "all" if replay is None else replay,
        "train": getattr(train, "__qualname__", repr(train)),
        "seed": seed,
        **{name: before.meta[name] for name in ("data_name", "data_hash", "model", "versions", "settings", "date")},
    }
    if wandb_run is not None:
        logged.begin(wandb_run, meta)
    if mode == "single":
        found = [_single(model, tokenizer, named, train, before, asking)]
        if wandb_run is not None:
            logged.point(wandb_run, found[0])
        return _finished(ModeResult(mode, before, found, None, meta), wandb_run)
    found, spent = [], 0.0
    left = sorted({count for count in checkpoints if count <= len(named)} | {len(named)})
    with bar(len(named), f"{mode}: edits", progress) as shown:
        for one in plan:
            spent += _trained(model, named, one.trained, train, seed + one.seen)
            shown.update(len(one.new))
            if one.seen < left[0]:
                continue
            left = [count for count in left if count > one.seen]
            part = named[: one.seen]
            report = evaluate(model, tokenizer, part, before=_part(before, part, seed), **asking)
            latest = _latest(report, {named[i].id for i in one.new}, seed)
            now = capability(model, tokenizer, before=able) if capability is not None else None
            found.append(Checkpoint(one.seen, report, latest, now, round(spent, 3)))
            if wandb_run is not None:
                logged.point(wandb_run, found[-1])
    return _finished(ModeResult(mode, before, found, able, meta), wandb_run)


def _finished(result: ModeResult, wandb_run: Any) -> ModeResult:
    if wandb_run is not None:
        logged.end(wandb_run, result)
    return result


def _check(
    mode: Mode,
    checkpoints: Collection[int],
    capability: CapabilityProbe | None,
    evaluation: dict[str, Any],
    callbacks: Sequence[Any],
) -> None:
    for name, reason in _OWN.items():
        if name in evaluation:
            raise EditError(f"run_edits: {name} is not for the caller to give ({reason}): leave it out")
    if any(count < 1 for count in checkpoints):
        raise EditError(f"run_edits: checkpoints={tuple(checkpoints)} are numbers of edits: give 1 or more")
    if mode == "single":
        given = [name for name in ("texts", "reference") if evaluation.get(name) is not None]
        given += ["capability"] if capability is not None else []
        if given:
            raise EditError(
                f"run_edits: {given[0]} is of one edited model, and single has one for each edit: leave it out"
            )
        for callback in callbacks:
            if getattr(callback, "sequential", False):
                raise EditError(
                    f"run_edits: {type(callback).__name__}(sequential=True) goes on from edit to edit, and single "
                    "edits the unedited model every time: leave sequential out"
                )


def _named(edits: Sequence[Edit]) -> EditDataset:
    """The edits, each with an id of its own, so that results of any part of them can be told apart."""
    taken: set[str] = set()
    named = []
    for number, edit in enumerate(edits):
        name = edit.id or str(number)
        name = name if name not in taken else f"{name} ({number})"
        taken.add(name)
        named.append(replace(edit, id=name))
    return EditDataset(named, name=getattr(edits, "name", "edits"))


def _trained(model: nn.Module, edits: EditDataset, numbers: Sequence[int], train: Train, seed: int) -> float:
    """Train some edits; the seconds that took."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    began = time.perf_counter()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        returned = train(model, EditDataset([edits[i] for i in numbers], name=edits.name))
    if isinstance(returned, nn.Module) and returned is not model:
        raise EditError(
            "run_edits: train(model, edits) returned another model; it has to change the given one in place"
        )
    return time.perf_counter() - began


def _single(
    model: nn.Module, tokenizer: Any, edits: EditDataset, train: Train, before: Report, asking: dict[str, Any]
) -> Checkpoint:
    kept = KeptWeights(model)
    # A bar for each edit's few questions would only flicker.
    quietly: dict[str, Any] = asking | {"progress": False}
    results: list[ProbeResult] = []
    settings: Any = {}
    spent, seed = 0.0, asking["seed"]
    began = time.perf_counter()
    with bar(len(edits), "single: edits", asking["progress"]) as shown:
        for number in range(len(edits)):
            part = edits[number : number + 1]
            try:
                # The seed of a sequence's first round: its first edit and a single one are the same training.
                spent += _trained(model, edits, [number], train, seed + 1)
                own = evaluate(model, tokenizer, part, before=_part(before, part, seed), **quietly)
            finally:
                kept.restore()
            results += own.answers
            settings = own.meta["settings"]
            shown.update()
    metrics = summarise(results, against_before=True, seed=seed)
    metrics |= {"perplexity": Score(None, 0), "weight_drift": {}}
    meta = meta_of(model, edits, len(edits), results, settings, against_before=True)
    meta |= {"seed": seed, "seconds": round(time.perf_counter() - began, 3)}
    report = Report(metrics=metrics, unedited=before.metrics, answers=results, meta=meta)
    return Checkpoint(len(edits), report, report.metrics["reliability"]["generated"], None, round(spent, 3))


def _part(before: Report, edits: Sequence[Edit], seed: int) -> Report:
    """The unedited model's report on some of its edits."""
    names = {edit.id for edit in edits}
    answers = [result for result in before.answers if result.edit in names]
    metrics = summarise(answers, against_before=False, seed=seed)
    metrics |= {name: before.metrics[name] for name in ("perplexity", "weight_drift")}
    return replace(before, metrics=metrics, answers=answers)


def _latest(report: Report, names: Collection[str], seed: int) -> Score:
    """Reliability of the edits of the last round alone: did they take at all, whatever became of the earlier ones?"""
    rows = [r for r in report.answers if r.question == "reliability" and r.edit in names]
    mean = EditMean(len(rows), seed=seed, sync_on_compute=False)
    mean.update(range(len(rows)), [bool(r.right) for r in rows])
    return mean.score()
