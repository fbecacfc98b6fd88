"""What EditMetrics asks when, what that costs, and where its scores go."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.hosts import Rows, collator, lightning_trainer, transformers_trainer
from lightning.pytorch.loggers import CSVLogger
from transformers import EarlyStoppingCallback

from kedit_train import Report, world
from kedit_train.callbacks import EditMetrics, NormBall, ParameterScope, SaveDelta, editing
from kedit_train.callbacks import edit_metrics as module
from kedit_train.data import EditDataset
from kedit_train.errors import EditError
from kedit_train.evaluation.options import EvaluationOptions
from kedit_train.evaluation.reporting import wandb_tables as logged

RATE = 1e-2
SHORT = EvaluationOptions(max_new_tokens=4)


@pytest.fixture
def edits() -> EditDataset:
    return EditDataset(world.edits(n=4))


class Clock:
    """A clock that moves on by what happens, not by how long it takes: a training step, an evaluation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: float, look: float) -> None:
        self.now, self.step, self.looks = 0.0, step, 0
        real = module.evaluate

        def evaluate(*args: Any, **kwargs: Any) -> Any:
            self.now += look
            self.looks += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(module, "evaluate", evaluate)
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)


def train(edits: EditDataset, callbacks: list[Any], steps: int, clock: Clock | None = None) -> Any:
    """A plain loop; what the callbacks logged."""
    model, tokenizer = world.load()
    batch = collator(tokenizer)(edits.encode(tokenizer))
    with editing(model, [ParameterScope(layers=0.5, modules="mlp"), *callbacks], tokenizer=tokenizer) as edit:
        optimizer = torch.optim.Adam(edit.parameters(), lr=RATE)
        for _ in range(steps):
            edit.before_step()
            model(**batch).loss.backward()
            if clock is not None:
                clock.now += clock.step
            optimizer.step()
            optimizer.zero_grad()
    return edit


def looks(edit: Any) -> list[dict[str, float]]:
    return [row for row in edit.history if "edit/reliability" in row]


def test_looks_that_take_too_much_of_the_time_are_left_out_and_counted(
    edits: EditDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, step=1.0, look=3.0)
    metrics = EditMetrics(edits, every_n_steps=1, show=False, evaluation=SHORT, max_fraction_of_time=0.5)
    edit = train(edits, [metrics], 9, clock)
    # By hand. Step 1: nothing spent yet, a look; then 3 of 4 seconds. At step n with one look 3 / (3 + n) is within a
    # half from n = 3 on: a look, and 6 seconds; 6 / (6 + n) is from n = 6 on, 9 / (9 + n) from n = 9 on.
    rows = looks(edit)
    assert [row["step"] for row in rows] == [1, 3, 6, 9, 9]
    assert [row["edit/metrics/skipped"] for row in rows] == [0, 1, 3, 5, 5]
    assert metrics.skipped == 5
    # The unedited model's three seconds count among the seconds and not among the looks.
    assert [row["edit/metrics/seconds"] for row in rows] == [6, 9, 12, 15, 18]
    assert rows[1]["edit/metrics/share_of_time"] == 6 / (6 + 3)
    assert rows[-1]["edit/metrics/share_of_time"] == 12 / (9 + 15)
    assert metrics.report is not None
    assert metrics.report.meta["evaluations_skipped"] == 5
    assert metrics.report.meta["seconds_of_metrics"] == 18
    assert clock.looks == 1 + 4 + 1


def test_without_a_bound_no_look_is_left_out(edits: EditDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, step=1.0, look=1000.0)
    edit = train(
        edits,
        [EditMetrics(edits, every_n_steps=2, show=False, evaluation=SHORT)],
        4,
        clock,
    )
    assert [row["step"] for row in looks(edit)] == [2, 4, 4]
    assert all("edit/metrics/skipped" not in row for row in looks(edit))


class Scripted:
    """Reports whose reliability and locality are given, one a call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, scores: list[tuple[float, float]]) -> None:
        real, self.scores = module.evaluate, list(scores)

        def evaluate(*args: Any, **kwargs: Any) -> Report:
            report, (reliability, locality) = real(*args, **kwargs), self.scores.pop(0)
            own = report.flat() | {"edit/reliability": reliability, "edit/locality": locality}
            report.__dict__["flat"] = lambda: own
            return report

        monkeypatch.setattr(module, "evaluate", evaluate)


def test_the_best_step_has_the_highest_reliability_then_locality_and_is_the_earlier_one(
    edits: EditDataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scripted = [(0.0, 1.0), (0.5, 0.9), (0.75, 0.2), (0.75, 0.5), (0.75, 0.5), (0.5, 1.0), (0.25, 0.25)]
    Scripted(monkeypatch, scripted)
    metrics = EditMetrics(edits, every_n_steps=1, show=False, evaluation=SHORT)
    delta = SaveDelta(str(tmp_path / "edit.safetensors"), at="best")
    edit = train(edits, [metrics, delta], 5)
    assert [row["edit/best/step"] for row in looks(edit)] == [1, 2, 3, 3, 3, 3]
    assert metrics.best == {"edit/best/step": 3.0, "edit/best/reliability": 0.75, "edit/best/locality": 0.5}
    assert metrics.report is not None
    assert metrics.report.meta["best"] == metrics.best
    # The same rule as SaveDelta's.
    assert delta.delta is not None
    assert delta.delta.meta["configuration"]["step"] == 3


def test_a_run_without_looks_has_its_end_as_the_best(edits: EditDataset) -> None:
    metrics = EditMetrics(edits, every_n_steps=0, show=False, evaluation=SHORT)
    train(edits, [metrics], 2)
    assert metrics.report is not None
    assert metrics.best["edit/best/step"] == 2
    assert metrics.best["edit/best/reliability"] == metrics.report.flat()["edit/reliability"]


def test_extras_are_measured_at_every_look(edits: EditDataset) -> None:
    metrics = EditMetrics(
        edits,
        every_n_steps=2,
        limit=2,
        show=False,
        evaluation=EvaluationOptions(max_new_tokens=4, metrics=["kl", "resurgence"], texts=["A red fox."]),
    )
    edit = train(edits, [metrics], 2)
    for row in looks(edit):
        assert row["edit/locality_kl"] > 0.0
        assert row["edit/perplexity"] > 1.0
        assert "edit/resurgence/prefers_old/negation" in row
        assert "edit/fluency/entropy" not in row
    # What moved at the end, against the weights that the scope had before.
    assert 0.0 < looks(edit)[-1]["edit/weight_drift/relative"] < 1.0


def test_evaluations_of_the_trainer_get_the_scores_and_pick_the_best_model(edits: EditDataset, tmp_path: Path) -> None:
    model, tokenizer = world.load()
    metrics = EditMetrics(edits, every_n_steps=3, show=False, evaluation=EvaluationOptions(max_new_tokens=8))
    seen: list[dict[str, float]] = []

    class Stop(EarlyStoppingCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
            seen.append({"step": state.global_step, **metrics})
            super().on_evaluate(args, state, control, metrics, **kwargs)

    from transformers import Trainer, TrainingArguments

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=12,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            per_device_train_batch_size=4,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="best",
            metric_for_best_model="edit_reliability",
            greater_is_better=True,
            load_best_model_at_end=True,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_steps=4,
            remove_unused_columns=False,
        ),
        train_dataset=Rows(edits.encode(tokenizer)),
        eval_dataset=Rows(edits.encode(tokenizer)),
        data_collator=collator(tokenizer),
        processing_class=tokenizer,
        callbacks=[metrics, ParameterScope(layers=0.5, modules="mlp"), Stop(early_stopping_patience=2)],
    )
    trainer.train()
    state = trainer.state
    reached = {row["step"]: row["eval_edit_reliability"] for row in seen}
    best = max(reached, key=lambda step: (reached[step], -step))
    assert reached[best] > 0.0
    assert state.best_metric == reached[best]
    assert state.best_global_step == best
    # It went two evaluations beyond the best, and came back to it: the report is the best model's.
    assert state.global_step == best + 4
    assert metrics.report is not None
    assert metrics.report.flat()["edit/reliability"] == reached[best]
    # A look was taken for each evaluation, and stands at its own step; those at multiples of 3 stand there as well.
    rows = [row["step"] for row in state.log_history if "edit/reliability" in row]
    assert sorted(set(rows)) == sorted({*range(2, state.global_step + 1, 2), *range(3, state.global_step + 1, 3)})
    assert {row["step"] for row in state.log_history if "eval_loss" in row} == set(reached)


def test_an_evaluation_outside_of_training_is_the_trainers_own(edits: EditDataset) -> None:
    model, tokenizer = world.load()
    metrics = EditMetrics(edits, every_n_steps=0, show=False, evaluation=SHORT)
    trainer = transformers_trainer(model, tokenizer, edits, [metrics], 1)
    found = trainer.evaluate(Rows(edits.encode(tokenizer)))
    assert "eval_loss" in found
    assert not any("edit" in key for key in found)


def test_the_csv_of_lightning_gets_every_number(edits: EditDataset, tmp_path: Path) -> None:
    model, tokenizer = world.load()
    metrics = EditMetrics(edits, every_n_steps=2, show=False, evaluation=SHORT)
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    lightning_trainer(model, tokenizer, edits, [metrics, ParameterScope(layers=0.5)], 3, logger=logger)
    (file,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert metrics.report is not None
    last = [row for row in rows if row["edit/reliability"]][-1]
    for name, value in metrics.report.flat().items():
        assert float(last[name]) == pytest.approx(value, rel=1e-6), name
    assert float(last["edit/best/step"]) == 2.0
    assert float(last["edit/metrics/seconds"]) > 0.0


def test_tables_mark_what_has_changed(edits: EditDataset) -> None:
    metrics = EditMetrics(edits, every_n_steps=0, show=False, evaluation=EvaluationOptions(max_new_tokens=8))
    edit = train(edits, [metrics, NormBall(fraction=10.0)], 5)
    assert metrics.report is not None
    columns, rows = edit._host.tables["edit/answers"]
    said = [dict(zip(columns, row, strict=True)) for row in rows]
    assert [row["changed"] for row in said] == ["changed" if row["before"] != row["after"] else "" for row in said]
    assert "changed" in [row["changed"] for row in said]
    columns, rows = edit._host.tables["edit/changed_elsewhere"]
    assert columns[:4] == ["kind", "prompt", "before", "after"]
    assert rows
    assert all(row[2] != row[3] for row in rows)
    columns, rows = edit._host.tables["edit/positions"]
    assert tuple(columns) == logged.POSITION_COLUMNS
    assert [row[0] for row in rows if row[1] == 1] == ["unedited", "edited"]
    loss = {row[0]: row[3] for row in rows if row[1] == 1}
    assert loss["edited"] < loss["unedited"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_fraction_of_time": 1.5}, r"EditMetrics: max_fraction_of_time must be in \(0, 1\), or None, got 1.5"),
        ({"stop_at": 1.0, "every_n_steps": 0}, "EditMetrics: every_n_steps must be > 0, got 0"),
        ({"limit": 0}, "EditMetrics: limit must be an integer >= 1, or None, got 0"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EditError, match=message):
        EditMetrics([], **options)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("file/x.json", "file is not a folder"), ("folder", "is a folder"), ("link/x.json", "link is not a folder")],
)
def test_a_report_that_cannot_be_written_is_refused_before_the_first_step(
    edits: EditDataset, tmp_path: Path, name: str, reason: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(EditError, match=reason):
        train(edits, [EditMetrics(edits, report_path=str(tmp_path / name))], steps=0)
