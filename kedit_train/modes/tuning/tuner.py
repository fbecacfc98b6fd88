"""``tune``: find settings of ``NullSpace``, ``PolyakStep`` and ``KLLocality``, and evaluate them on held-out edits."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import nn

from kedit_train.arguments import above, check_arguments, optional
from kedit_train.core.locality.texts import Texts, TextSource
from kedit_train.data import Edit, EditDataset
from kedit_train.errors import EditError, reported_by
from kedit_train.evaluation import EvaluationOptions
from kedit_train.evaluation.asking.batching import progress_bar
from kedit_train.modes.runner import with_unique_ids
from kedit_train.modes.tuning.halving import Rung, Trial, pick, plan_rungs, rank, split_edits
from kedit_train.modes.tuning.result import TuneResult
from kedit_train.modes.tuning.runs import TuneRuns
from kedit_train.modes.tuning.settings import RECOMMENDED, TuneGrid, TuneSetting
from kedit_train.paths import check_path


def tune(
    model: nn.Module,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    keep: TextSource | Texts,
    grid: TuneGrid | None = None,
    budget: float | None = None,
    folder: str | Path | None = None,
    options: EvaluationOptions | None = None,
    seed: int = 0,
    progress: bool = True,
) -> TuneResult:
    """Find settings for a model: try a grid by successive halving, and evaluate the best setting on held-out edits.

    The edits are split into a tuning half and a held-out half. The first round tries every setting of the grid on a few
    edits of the tuning half. The second round tries the best third of the settings on more edits. The last round tries
    the best third of these settings on the complete tuning half. Each run starts from the unedited model. If the grid
    contains the setting of the recipe ``kedit_default``, every round tries this setting, even if it is not in the
    best third.

    The score of a setting is the harmonic mean of generality and locality. Among the settings with a reliability of at
    least 0.95, the setting with the highest score is picked. If the setting of ``kedit_default`` reaches this
    reliability, another setting is picked only if its score is higher by at least 0.05, because smaller differences are
    often random. If no setting has a reliability of at least 0.95, the setting with the highest reliability is picked.

    The picked setting is then tried once on the held-out half. Report only the scores of this last run, because the
    other scores were used to pick the setting.

    All runs use :class:`~kedit_train.callbacks.PolyakStep`, so no learning rate is needed.

    Args:
        model: a causal language model in fp32. It is trained in place, and its original weights are restored bit for
            bit after each run.
        tokenizer: the model's tokenizer.
        edits: the edits, with rephrases and locality probes. Edits with the same subject are put into the same half.
        keep: texts on which predictions should stay the same: a file, a list, a dataset, "world" (the bundled texts) or
            a ``Texts``. Texts that contain an evaluation prompt of the edits are left out.
        grid: the settings to try. None: ``TuneGrid()``.
        budget: time in seconds. Each round and the run on the held-out half get an equal share. When the share of a
            round is spent, no more runs of this round are started. A very small budget is exceeded, because at least
            one setting is tried, and the run on the held-out half is always made. None: no limit.
        folder: a folder for the results and for the statistics of the texts. If ``tune`` is called again with the
            same folder, it does not repeat finished runs. None: a temporary folder that is removed at the end.
        options: how the runs are evaluated. Its ``prompt_format`` is also the format of the training examples. None:
            ``EvaluationOptions()``.
        seed: seed of the split, the training and the bootstrap.
        progress: show a progress bar in a terminal.

    Returns:
        A :class:`~kedit_train.modes.tuning.result.TuneResult` with all trials, the picked trial and the held-out
        scores. Its methods write a recipe and a W&B sweep file.

    Raises:
        EditError: the edits have fewer than two subjects, have neither rephrases nor locality probes, or contradict
            each other. The error is also raised if the texts cannot be read, a scope matches no weight, the model is
            sharded, or all runs of the first round fail.

    References:
        Non-stochastic Best Arm Identification and Hyperparameter Optimization (successive halving), arXiv 1502.07943.

    Example:
        >>> from kedit_train import EditDataset, tune, world
        >>> from kedit_train.modes import TuneGrid
        >>> model, tokenizer = world.load()
        >>> edits = EditDataset.load("world", limit=4)
        >>> texts = world.locality_texts(exclude=edits, n=32)
        >>> grid = TuneGrid(layers=[0.7], step_sizes=[0.1], energies=[0.9], kl_weights=[0])
        >>> result = tune(model, tokenizer, edits, keep=texts, grid=grid, progress=False)
        >>> result.picked.setting.step_size, result.held_out.edits
        (0.1, 2)
    """
    started = time.perf_counter()
    options = options or EvaluationOptions()
    grid = grid or TuneGrid()
    with reported_by("tune"), _work_folder(folder) as work:
        check_arguments("tune", budget=(budget, optional(above(0))))
        if options.distributed:
            raise EditError("options.distributed must be False, because tune runs in one process; set it to False.")
        edits = with_unique_ids(edits)
        edits.check_trained_together()
        tuning, held_out = (_subset(edits, half) for half in split_edits(edits, seed))
        runs = TuneRuns.start(model, tokenizer, edits, keep, grid, work, options, seed)
        plan = plan_rungs(len(grid.settings()), len(tuning))
        # Each round, and the run on the held-out half, has an equal share of the budget.
        share = float("inf") if budget is None else budget / (len(plan) + 1)
        deadlines = [started + share * number for number in range(1, len(plan) + 1)]
        with progress_bar(sum(rung.settings for rung in plan) + 1, "tuning", progress) as bar:
            trials, cut_off = _halve(runs, grid.settings(), tuning, plan, deadlines, bar)
            best, rule = _pick_last(trials)
            bar.set_description("held-out edits")
            final = runs.measure(best.setting, held_out)
        if final.error:
            raise EditError(
                f"the picked setting ({best.setting}) failed on the held-out edits; remove this setting from the "
                f"grid. The message of the failed run is: {final.error}"
            )
        settings = {name: runs.unedited.meta["settings"][name] for name in ("prompt_format", "max_new_tokens")}
        meta = {
            "model": runs.unedited.meta["model"],
            "data_name": edits.name,
            "data_hash": edits.hash,
            "protocol": str(runs.unedited.protocols),
            "protocol_reason": runs.unedited.protocols.reason,
            "append_eos": runs.append_eos,
            **settings,
            "seed": seed,
            "budget": budget,
            "seconds": round(time.perf_counter() - started, 3),
            "versions": runs.unedited.meta["versions"],
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
    return TuneResult(
        grid=grid, trials=trials, cut_off=cut_off, picked=best, rule=rule, held_out=final,
        halves=(tuning, held_out), meta=meta,
    )  # fmt: skip


def _halve(
    runs: TuneRuns,
    settings: list[TuneSetting],
    tuning: EditDataset,
    plan: list[Rung],
    deadlines: list[float],
    bar: Any,
) -> tuple[list[Trial], list[tuple[int, TuneSetting]]]:
    """Run successive halving. Return the trials, and the runs that were left out because the budget was spent.

    Each run that was left out is a pair: the number of edits, and the setting.
    """
    trials: list[Trial] = []
    cut_off: list[tuple[int, TuneSetting]] = []
    for rung, deadline in zip(plan, deadlines, strict=True):
        part, current = tuning[: rung.edits], []
        chosen = settings[: rung.settings]
        if RECOMMENDED in settings:
            # The settings of kedit_default run in every round, in addition to the best settings. So the picked setting
            # is at least as good on the tuning half.
            chosen = [RECOMMENDED, *(setting for setting in chosen if setting != RECOMMENDED)]
        bar.total += len(chosen) - len(settings[: rung.settings])
        for setting in chosen:
            bar.set_description(f"{rung.edits} edits, {setting}")
            spent = time.perf_counter() > deadline and runs.known(setting, part) is None
            if spent and trials + current:
                cut_off.append((rung.edits, setting))
            else:
                current.append(runs.measure(setting, part))
            bar.update()
        failed = [trial for trial in current if trial.error]
        if not trials and len(failed) == len(current):
            raise EditError(f"all runs failed. The message of the first failed run is: {failed[0].error}")
        trials += current
        settings = [trial.setting for trial in rank(current) if not trial.error]
    return trials, cut_off


def _pick_last(trials: Sequence[Trial]) -> tuple[Trial, str]:
    """Pick the best trial of the last round in which a trial succeeded."""
    measured = [trial for trial in trials if not trial.error]
    most = max(trial.edits for trial in measured)
    return pick([trial for trial in measured if trial.edits == most])


def _subset(edits: EditDataset, numbers: Sequence[int]) -> EditDataset:
    return EditDataset([edits[number] for number in numbers], name=edits.name)


@contextmanager
def _work_folder(folder: str | Path | None) -> Iterator[Path]:
    """Create ``folder``. If it is None, create a temporary folder that is removed at the end."""
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    check_path(folder)
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EditError(f"folder {path} cannot be created ({error.strerror}); choose another folder.") from error
    yield path
