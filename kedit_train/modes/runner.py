"""``run_edits``: edit a model in one of four modes, and evaluate the model at checkpoints and at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from kedit_train.data import Edit, EditDataset
from kedit_train.data.contradictions import contradictions
from kedit_train.data.tokenization import shorten
from kedit_train.errors import EditError, reported_by, warn
from kedit_train.evaluation import EvaluationOptions, Report, Score, evaluate, exact_match
from kedit_train.evaluation.asking.batching import progress_bar
from kedit_train.evaluation.reporting.metadata import report_metadata
from kedit_train.evaluation.scoring.bootstrap import NO_SCORE, mean_score
from kedit_train.evaluation.scoring.capability import CapabilityProbe
from kedit_train.evaluation.scoring.metrics import summarize
from kedit_train.evaluation.scoring.probe_results import Judge, ProbeResult
from kedit_train.modes import wandb_curve
from kedit_train.modes.result import Checkpoint, ModeResult
from kedit_train.modes.schedule import Mode, ScheduleStep, make_schedule
from kedit_train.modes.train_loop import TrainLoop
from kedit_train.modes.weight_backup import WeightBackup

CHECKPOINTS = (1, 10, 100, 1000)
Train = Callable[[nn.Module, Sequence[Edit]], None]


def run_edits(
    model: nn.Module,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    mode: Mode,
    train: Train | None = None,
    edits_per_step: int | None = None,
    replay: int | None = None,
    checkpoints: Collection[int] = CHECKPOINTS,
    options: EvaluationOptions | None = None,
    judge: Judge = exact_match,
    capability: CapabilityProbe | None = None,
    wandb_run: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> ModeResult:
    """Edit ``model`` in one of four modes. Evaluate the model at checkpoints and after the last edit.

    - "single": each edit is trained alone on the unedited model and evaluated. Then the original weights are restored
      bit for bit. This mode shows the best case of a method, but it leaves no edited model.
    - "batch": all edits are trained together, in one training run.
    - "sequential": several training runs follow each other. Each run trains the next ``edits_per_step`` edits. Previous
      edits are never trained again.
    - "streaming": several training runs follow each other. Each run trains the next ``edits_per_step`` edits and
      replayed previous edits.

    In the modes "sequential" and "streaming", two edits may have the same prompt and different targets. If both edits
    are in one training run, only the later edit is trained. Once the later edit is trained, the earlier edit counts as
    wrong.

    When you report a result, name the mode, because the scores depend on the mode. For example, the paper under
    "References" compares two ways to fine-tune a model on 1,000 facts (table 1). If the facts are trained in sequence,
    the reliability is 75 %. If they are trained in shuffled batches, it is 99 %.

    Args:
        model: a causal language model. It is edited in place. In the mode "single", its original weights are restored.
        tokenizer: the model's tokenizer.
        edits: the edits.
        mode: "single", "batch", "sequential" or "streaming".
        train: a function ``train(model, edits)`` that changes the model in place. It is called once per training
            run. In the mode "single", each edit has its own training run. None:
            :class:`~kedit_train.modes.TrainLoop` with default arguments.
        edits_per_step: new edits per training run, for "sequential" (default 1) and "streaming" (default 100).
        replay: number of previous edits that "streaming" replays in each training run. None: all previous edits.
        checkpoints: numbers of edits, for "sequential" and "streaming". When a training run reaches one of these
            numbers, the model is evaluated after this run, on all edits that were made until then. The model is always
            evaluated after the last edit.
        options: what to measure and how to prompt. None: ``EvaluationOptions()``.
        judge: ``judge(answer, accepted) -> bool``, used instead of exact match.
        capability: measures general ability before the edits and at each checkpoint. It must be None for "single".
        wandb_run: the run that ``wandb.init`` returned. At each checkpoint, the metrics ``retention/*`` are logged over
            the number of edits (the x-axis). At the end, the curve, the answers and the scores at each token of the
            targets are logged, and the result is saved as artifacts. None: nothing is logged.
        seed: seed for the replay, the bootstrap and torch. Before each training run, torch gets a seed that is computed
            from ``seed``. After each training run, torch's random state is restored.
        progress: show progress bars in a terminal.

    Returns:
        A :class:`~kedit_train.modes.ModeResult`.

    Raises:
        EditError: there are no edits, an argument does not apply to the mode, or ``train`` returned another model. The
            error is also raised if two edits contradict each other in the mode "batch", or if the model cannot be
            restored in the mode "single".

    References:
        "Fine-tuning Done Right in Model Editing", arXiv 2509.22072.

    Example:
        >>> from kedit_train import EditDataset, run_edits, world
        >>> from kedit_train.modes import TrainLoop
        >>> model, tokenizer = world.load()
        >>> edits = EditDataset.load("world", limit=2)
        >>> train = TrainLoop(tokenizer, learning_rate=3e-3)
        >>> result = run_edits(model, tokenizer, edits, mode="batch", train=train, progress=False)
        >>> result.report.metrics["reliability"]["generated"].value
        1.0
    """
    options = options or EvaluationOptions()
    with reported_by("run_edits"):
        if not len(edits):
            raise EditError("edits is empty; give at least one edit.")
        schedule = make_schedule(mode, len(edits), edits_per_step=edits_per_step, replay=replay, seed=seed)
        _check(mode, checkpoints, options, capability, train)
        train = TrainLoop(tokenizer) if train is None else train
        run = _Run(model, tokenizer, with_unique_ids(edits), train, options, judge, seed, progress)
        if mode == "batch":
            run.edits.check_trained_together()
        elif mode != "single":
            _warn_of_overwritten(run.edits)
        unedited = run.evaluate(run.edits)
        ability = capability(model, tokenizer) if capability is not None else None
        meta = {
            "mode": mode,
            "n_edits": len(run.edits),
            "edits_per_step": len(schedule[0].new),
            "replay": None if mode != "streaming" else "all" if replay is None else replay,
            "train": getattr(train, "__qualname__", repr(train)),
            "seed": seed,
        }
        if isinstance(train, TrainLoop):
            # All edits are used to decide whether targets end with end-of-text. Without this call, the first training
            # would make the decision from its own edits alone.
            meta["append_eos"] = train.append_eos(model, run.edits).setting
        copied = ("data_name", "data_hash", "model", "versions", "settings", "date")
        meta |= {name: unedited.meta[name] for name in copied}
        if wandb_run is not None:
            wandb_curve.start_curve(wandb_run, meta)
        reached: list[Checkpoint] = []
        if mode == "single":
            reached.append(run.single(unedited))
            if wandb_run is not None:
                wandb_curve.log_checkpoint(wandb_run, reached[0])
        else:
            pending = sorted({count for count in checkpoints if count <= len(edits)} | {len(edits)})
            seconds = 0.0
            with progress_bar(len(edits), f"{mode}: edits", progress) as bar:
                for step in schedule:
                    seconds += run.train_step(step.trained, seed + step.seen)
                    bar.update(len(step.new))
                    if step.seen < pending[0]:
                        continue
                    pending = [count for count in pending if count > step.seen]
                    report, latest = run.report_so_far(step, unedited)
                    able = capability(model, tokenizer, unedited=ability) if capability is not None else None
                    reached.append(
                        Checkpoint(
                            edits=step.seen, report=report, latest=latest, capability=able, seconds=round(seconds, 3)
                        )
                    )
                    if wandb_run is not None:
                        wandb_curve.log_checkpoint(wandb_run, reached[-1])
        result = ModeResult(mode=mode, unedited=unedited, checkpoints=reached, capability=ability, meta=meta)
        if wandb_run is not None:
            wandb_curve.finish_curve(wandb_run, result)
    return result


def _check(
    mode: Mode,
    checkpoints: Collection[int],
    options: EvaluationOptions,
    capability: CapabilityProbe | None,
    train: Train | None,
) -> None:
    if options.distributed:
        raise EditError("options.distributed must be False, because run_edits runs in one process; set it to False.")
    if any(count < 1 for count in checkpoints):
        raise EditError(
            f"each value in checkpoints must be an integer >= 1 (a number of edits), got {tuple(checkpoints)}; for "
            "example, checkpoints=(1, 10, 100) evaluates the model after 1, 10 and 100 edits."
        )
    if mode != "single":
        return
    if options.prose is not None or capability is not None:
        name = "capability" if options.prose is None else "options.prose"
        raise EditError(
            f"{name} must be None for mode 'single', because each edit gives a different model; remove {name}, or use "
            "another mode."
        )
    callbacks = getattr(train, "callbacks", ())
    # A custom training function may use the attribute ``callbacks`` for something else.
    for callback in callbacks if isinstance(callbacks, list | tuple) else ():
        if getattr(callback, "sequential", False):
            raise EditError(
                f"{type(callback).__name__} must have sequential=False for mode 'single', because each edit starts "
                "from the unedited model; set sequential=False, or use another mode."
            )


def _warn_of_overwritten(edits: EditDataset) -> None:
    """Warn if a later edit contradicts an earlier edit, because the earlier edit then counts as wrong."""
    if pairs := contradictions(edits):
        earlier, later = (shorten(edits[i].id) for i in pairs[0])
        warn(
            f"{len(pairs)} of {len(edits)} edits contradict an earlier edit (the first: {later!r} contradicts "
            f"{earlier!r}). An earlier edit counts as wrong once the later edit is trained; to leave out the earlier "
            "edits, pass edits.latest()."
        )


def with_unique_ids(edits: Sequence[Edit]) -> EditDataset:
    """Return the edits with unique ids, so that the results of each edit can be identified."""
    used: set[str] = set()
    named = []
    for number, edit in enumerate(edits):
        name = edit.id or str(number)
        name = name if name not in used else f"{name} ({number})"
        used.add(name)
        named.append(replace(edit, id=name))
    return EditDataset(named, name=getattr(edits, "name", "edits"))


@dataclass
class _Run:
    """One call of :func:`run_edits`: its arguments as attributes, and methods that train and evaluate."""

    model: nn.Module
    tokenizer: Any
    edits: EditDataset
    train: Train
    options: EvaluationOptions
    judge: Judge
    seed: int
    progress: bool

    def evaluate(self, edits: Sequence[Edit], unedited: Report | None = None, progress: bool | None = None) -> Report:
        return evaluate(
            self.model,
            self.tokenizer,
            edits,
            options=self.options,
            unedited=unedited,
            judge=self.judge,
            seed=self.seed,
            progress=self.progress if progress is None else progress,
        )

    def train_step(self, numbers: Sequence[int], seed: int) -> float:
        """Train on the edits with the indices ``numbers``, and return the training time in seconds."""
        # The later edits of a step replace the earlier edits that they contradict. In the mode "batch", edits that
        # contradict each other are an error.
        part = EditDataset([self.edits[i] for i in numbers], name=self.edits.name).latest()
        devices = sorted({p.device.index for p in self.model.parameters() if p.device.type == "cuda"})
        started = time.perf_counter()
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            returned = self.train(self.model, part)
        if isinstance(returned, nn.Module) and returned is not self.model:
            raise EditError(
                "train(model, edits) must change the model in place, but it returned another model; train the given "
                "model, and return this model or None."
            )
        return time.perf_counter() - started

    def report_so_far(self, step: ScheduleStep, unedited: Report) -> tuple[Report, Score]:
        """Return the report on all edits so far, and the reliability on the newest edits only."""
        part = self.edits[: step.seen]
        report = self.evaluate(part, part_of(unedited, part, self.seed))
        newest = {self.edits[i].id for i in step.new}
        results = [r for r in report.answers if r.question == "reliability" and r.edit in newest]
        return report, mean_score([bool(r.right) for r in results], self.seed)

    def single(self, unedited: Report) -> Checkpoint:
        """Make and evaluate each edit on the unedited model, and restore the model after each edit."""
        backup = WeightBackup(self.model)
        results: list[ProbeResult] = []
        settings: Any = {}
        seconds = 0.0
        started = time.perf_counter()
        with progress_bar(len(self.edits), "single: edits", self.progress) as bar:
            for number in range(len(self.edits)):
                part = self.edits[number : number + 1]
                try:
                    # This is also the seed of the first step in the mode "sequential", so that both modes train the
                    # first edit in the same way.
                    seconds += self.train_step([number], self.seed + 1)
                    # Progress bars for the few probes of one edit would only flicker.
                    report = self.evaluate(part, part_of(unedited, part, self.seed), progress=False)
                finally:
                    backup.restore()
                results += report.answers
                settings = report.meta["settings"]
                bar.update()
        metrics = summarize(results, against_unedited=True, protocols=unedited.protocols, seed=self.seed)
        metrics |= {name: unedited.metrics[name] for name in ("retrieval",) if name in unedited.metrics}
        metrics |= {"perplexity": NO_SCORE, "prose": {}, "weight_drift": {}}
        meta = report_metadata(self.model, self.edits, len(self.edits), results, settings, against_unedited=True)
        meta |= {"protocol_reason": unedited.protocols.reason, "seed": self.seed}
        meta |= {"seconds": round(time.perf_counter() - started, 3)}
        report = Report(metrics=metrics, unedited=unedited.metrics, answers=results, meta=meta)
        return Checkpoint(
            edits=len(self.edits),
            report=report,
            latest=report.metrics["reliability"]["generated"],
            capability=None,
            seconds=round(seconds, 3),
        )


def part_of(unedited: Report, edits: Sequence[Edit], seed: int) -> Report:
    """Return the report on the unedited model for the given edits only."""
    names = {edit.id for edit in edits}
    answers = [result for result in unedited.answers if result.edit in names]
    metrics = summarize(answers, against_unedited=False, protocols=unedited.protocols, seed=seed)
    metrics |= {name: unedited.metrics[name] for name in ("perplexity", "prose", "weight_drift")}
    return replace(unedited, metrics=metrics, answers=answers)
