"""The result of ``tune``: all trials, the picked setting, and its scores on held-out edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kedit_train.atomic_write import writing
from kedit_train.data import EditDataset
from kedit_train.evaluation.reporting.html_elements import fragment, page
from kedit_train.evaluation.reporting.markdown import markdown_table
from kedit_train.evaluation.reporting.report_lines import format_number
from kedit_train.modes.html_results import render_tune_result
from kedit_train.modes.tuning.halving import Trial, front
from kedit_train.modes.tuning.recipe import Source, recipe_text, sweep_text
from kedit_train.modes.tuning.settings import TuneGrid, TuneSetting

COLUMNS = ("edits", "layers", "step", "energy", "KL", "reliability", "generality", "locality", "score", "seconds", "")


@dataclass(frozen=True, kw_only=True, repr=False)
class TuneResult:
    """The result of :func:`~kedit_train.modes.tune`.

    Args:
        grid: the grid.
        trials: all trials, in the order in which they ran.
        cut_off: the runs that were not started because the budget was spent. Each run is a pair: the number of edits,
            and the setting.
        picked: the picked trial. It comes from the last round in which a trial succeeded.
        rule: the rule by which the setting was picked.
        held_out: the last trial. In this trial, the unedited model was trained with the picked setting on the held-out
            half, and evaluated on the same half.
        halves: the tuning half and the held-out half of the edits.
        meta: model, edits (name and hash), protocol, format of the examples, seed, budget, seconds, versions and date.
    """

    grid: TuneGrid
    trials: Sequence[Trial]
    cut_off: Sequence[tuple[int, TuneSetting]]
    picked: Trial
    rule: str
    held_out: Trial
    halves: tuple[EditDataset, EditDataset]
    meta: dict[str, Any]

    @property
    def front(self) -> list[Trial]:
        """The Pareto front: the trials that are not beaten by any other trial with the same number of edits."""
        return front(self.trials)

    def rows(self) -> list[list[str]]:
        """Return one table row per trial, and a last row with the held-out scores. The columns are :data:`COLUMNS`."""
        on_front, rows = self.front, []
        for trial in (*self.trials, self.held_out):
            setting = trial.setting
            mark = "held out" if trial is self.held_out else "picked" if trial is self.picked else ""
            if not mark:
                mark = f"failed: {trial.error}" if trial.error else "front" if trial in on_front else ""
            values = (trial.reliability, trial.generality, trial.locality, None if trial.error else trial.score)
            row = [str(trial.edits), str(setting.layers), f"{setting.step_size:g}", f"{setting.energy:g}"]
            row += [f"{setting.kl_weight:g}", *map(format_number, values), f"{trial.seconds:.1f}", mark]
            rows.append(row)
        return rows

    def markdown(self) -> str:
        """Return the table, the rule and the metadata as Markdown."""
        lines = [f"# {self.title}", "", *markdown_table(COLUMNS, self.rows(), 0)]
        return "\n".join([*lines, "", *self.notes(), "", *(f"- {name}: {value}" for name, value in self.meta.items())])

    def html(self) -> str:
        """Return a complete HTML page: the trials as a plot of generality against locality and as a table."""
        return page(self.title, render_tune_result(self, COLUMNS))

    def _repr_html_(self) -> str:
        return fragment(render_tune_result(self, COLUMNS))

    def __repr__(self) -> str:
        """Return one line: the number of trials, the picked setting, and its scores on the held-out edits."""
        scores = {name: getattr(self.held_out, name) for name in ("reliability", "generality", "locality")}
        shown = ", ".join(f"{name} {format_number(value)}" for name, value in scores.items() if value is not None)
        return f"TuneResult({len(self.trials)} trials, picked: {self.picked.setting}, held out: {shown})"

    @property
    def title(self) -> str:
        """The heading of the table."""
        return f"Settings for {self.meta['model']}"

    def notes(self) -> list[str]:
        """Return the lines below the table: column meanings, runs that were not started, and the picked setting."""
        lines = [
            f"reliability and generality: protocol {self.meta['protocol']}. locality: fraction of the first tokens of "
            "the unedited model's answers that do not change. score: harmonic mean of generality and locality. front "
            "(Pareto front): no other setting with the same number of edits is at least as good in reliability, "
            "generality and locality, and better in one of them."
        ]
        if self.cut_off:
            budget = self.meta["budget"]
            share = f"the time of their round (an equal share of the budget of {budget:g} s) was spent"
            lines += [f"{len(self.cut_off)} runs were not started, because {share}:"]
            lines += [f"  {edits} edits: {setting}" for edits, setting in self.cut_off]
        return [*lines, f"picked: {self.picked.setting} ({self.rule})"]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain dicts and lists."""
        on_front = self.front

        def plain(trial: Trial) -> dict[str, Any]:
            return {**asdict(trial), "score": trial.score, "front": trial in on_front}

        return {
            "meta": self.meta,
            "grid": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self.grid).items()},
            "trials": [plain(trial) for trial in self.trials],
            "cut_off": [{"edits": edits, **setting.to_dict()} for edits, setting in self.cut_off],
            "picked": self.picked.setting.to_dict(),
            "rule": self.rule,
            "held_out": {name: value for name, value in plain(self.held_out).items() if name != "front"},
        }

    def save_recipe(self, path: str | Path, *, model: str, edits: str, keep: str) -> Path:
        """Write a recipe with the picked setting, for ``lightning run``.

        Args:
            path: the ``.yaml`` file.
            model: the name of the model, as ``load_model`` reads it.
            edits: the file of edits to train, or "world" for the edits that come with the bundled model.
            keep: the file of texts on which predictions should stay the same, or "world" for the bundled texts.

        Returns:
            The path.
        """
        source = Source(model=model, edits=edits, keep=keep, path=Path(path))
        return _write(path, recipe_text(self.picked, self.held_out, source, self.rule, self.meta))

    def save_sweep(self, path: str | Path, *, model: str, edits: str, keep: str) -> Path:
        """Write two files: a W&B sweep file for the grid, and the recipe that each run of the sweep uses.

        ``path`` is the sweep file. If its name is ``NAME.yaml``, the recipe is the file ``NAME_recipe.yaml`` in the
        same folder. The other arguments are those of :meth:`save_recipe`.

        The sweep should not use the held-out edits. Save the tuning half with ``halves[0].save(file)``, and set
        ``edits`` to this file.

        Returns:
            The path.
        """
        path = Path(path)
        recipe = path.with_name(f"{path.stem}_recipe.yaml")
        source = Source(model=model, edits=edits, keep=keep, path=recipe)
        _write(recipe, recipe_text(self.picked, self.held_out, source, self.rule, self.meta, with_kl=True))
        return _write(path, sweep_text(self.grid, recipe, path))


def _write(path: str | Path, text: str) -> Path:
    with writing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return Path(path)
