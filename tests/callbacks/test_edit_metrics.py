"""EditMetrics: when it evaluates, what that costs, and where the scores go."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.hosts import Rows, collator, lightning_trainer, transformers_trainer
from installed import older
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
    """A clock that advances by a fixed time per training step and per evaluation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: float, evaluation: float) -> None:
        self.now, self.step, self.evaluations = 0.0, step, 0
        real = module.evaluate

        def evaluate(*args: Any, **kwargs: Any) -> Any:
            self.now += evaluation
            self.evaluations += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(module, "evaluate", evaluate)
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)


def train(edits: EditDataset, callbacks: list[Any], steps: int, clock: Clock | None = None) -> Any:
    """Train in a plain loop and return its handle, which has the logged rows."""
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


def evaluations(edit: Any) -> list[dict[str, float]]:
    return [row for row in edit.history if "edit/reliability" in row]


def test_evaluations_that_take_too_much_time_are_skipped_and_counted(
    edits: EditDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, step=1.0, evaluation=3.0)
    metrics = EditMetrics(edits, every_n_steps=1, show=False, evaluation=SHORT, max_fraction_of_time=0.5)
    edit = train(edits, [metrics], 9, clock)
    # By hand: step 1 is evaluated, which takes 3 of 4 seconds. With one evaluation the share 3 / (3 + n) is at most a
    # half from step n = 3, with two evaluations 6 / (6 + n) from n = 6, and with three 9 / (9 + n) from n = 9.
    rows = evaluations(edit)
    assert [row["step"] for row in rows] == [1, 3, 6, 9, 9]
    assert [row["edit/metrics/skipped"] for row in rows] == [0, 1, 3, 5, 5]
    assert metrics.skipped == 5
    # The three seconds for the reference model count in the seconds but not in the share of time.
    assert [row["edit/metrics/seconds"] for row in rows] == [6, 9, 12, 15, 18]
    assert rows[1]["edit/metrics/share_of_time"] == 6 / (6 + 3)
    assert rows[-1]["edit/metrics/share_of_time"] == 12 / (9 + 15)
    assert metrics.report is not None
    assert metrics.report.meta["evaluations_skipped"] == 5
    assert metrics.report.meta["seconds_of_metrics"] == 18
    assert clock.evaluations == 1 + 4 + 1


def test_without_a_bound_no_evaluation_is_skipped(edits: EditDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, step=1.0, evaluation=1000.0)
    edit = train(
        edits,
        [EditMetrics(edits, every_n_steps=2, show=False, evaluation=SHORT)],
        4,
        clock,
    )
    assert [row["step"] for row in evaluations(edit)] == [2, 4, 4]
    assert all("edit/metrics/skipped" not in row for row in evaluations(edit))


class Scripted:
    """Replaces reliability and locality in the report of each call by prepared values."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, scores: list[tuple[float, float]]) -> None:
        real, self.scores = module.evaluate, list(scores)

        def evaluate(*args: Any, **kwargs: Any) -> Report:
            report, (reliability, locality) = real(*args, **kwargs), self.scores.pop(0)
            own = report.flat() | {"edit/reliability": reliability, "edit/locality": locality}
            report.__dict__["flat"] = lambda: own
            return report

        monkeypatch.setattr(module, "evaluate", evaluate)


def test_the_best_step_has_the_highest_reliability_then_locality_then_is_the_earliest(
    edits: EditDataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scripted = [(0.0, 1.0), (0.5, 0.9), (0.75, 0.2), (0.75, 0.5), (0.75, 0.5), (0.5, 1.0), (0.25, 0.25)]
    Scripted(monkeypatch, scripted)
    metrics = EditMetrics(edits, every_n_steps=1, show=False, evaluation=SHORT)
    delta = SaveDelta(str(tmp_path / "edit.safetensors"), at="best")
    edit = train(edits, [metrics, delta], 5)
    assert [row["edit/best/step"] for row in evaluations(edit)] == [1, 2, 3, 3, 3, 3]
    assert metrics.best == {"edit/best/step": 3.0, "edit/best/reliability": 0.75, "edit/best/locality": 0.5}
    assert metrics.report is not None
    assert metrics.report.meta["best"] == metrics.best
    # SaveDelta follows the same rule.
    assert delta.delta is not None
    assert delta.delta.meta["configuration"]["step"] == 3


def test_without_evaluations_during_training_the_last_step_is_the_best(edits: EditDataset) -> None:
    metrics = EditMetrics(edits, every_n_steps=0, show=False, evaluation=SHORT)
    train(edits, [metrics], 2)
    assert metrics.report is not None
    assert metrics.best["edit/best/step"] == 2
    assert metrics.best["edit/best/reliability"] == metrics.report.flat()["edit/reliability"]


def test_additional_metrics_are_measured_in_every_evaluation(edits: EditDataset) -> None:
    metrics = EditMetrics(
        edits,
        every_n_steps=2,
        limit=2,
        show=False,
        evaluation=EvaluationOptions(max_new_tokens=4, metrics=["kl", "resurgence"], prose=["A red fox."]),
    )
    edit = train(edits, [metrics], 2)
    for row in evaluations(edit):
        assert row["edit/locality_kl"] > 0.0
        assert row["edit/perplexity"] > 1.0
        assert "edit/resurgence/prefers_old/negation" in row
        assert "edit/fluency/entropy" not in row
    # The drift of the weights is measured at the end.
    assert 0.0 < evaluations(edit)[-1]["edit/weight_drift/relative"] < 1.0


def test_the_trainers_evaluations_get_the_scores_and_select_the_best_model(edits: EditDataset, tmp_path: Path) -> None:
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
            # With "best", transformers 4 does not load the best model.
            save_strategy="steps" if older("transformers", "5") else "best",
            save_steps=2,
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
    # Training went on for two evaluations after the best one. The report is that of the best model, loaded at the end.
    assert state.global_step == best + 4
    assert metrics.report is not None
    assert metrics.report.flat()["edit/reliability"] == reached[best]
    # There is a row for each evaluation of the trainer, and for each multiple of 3, at its own step.
    rows = [row["step"] for row in state.log_history if "edit/reliability" in row]
    assert sorted(set(rows)) == sorted({*range(2, state.global_step + 1, 2), *range(3, state.global_step + 1, 3)})
    assert {row["step"] for row in state.log_history if "eval_loss" in row} == set(reached)


def test_an_evaluation_outside_of_training_has_no_edit_scores(edits: EditDataset) -> None:
    model, tokenizer = world.load()
    metrics = EditMetrics(edits, every_n_steps=0, show=False, evaluation=SHORT)
    trainer = transformers_trainer(model, tokenizer, edits, [metrics], 1)
    metrics_of_trainer = trainer.evaluate(Rows(edits.encode(tokenizer)))
    assert "eval_loss" in metrics_of_trainer
    assert not any("edit" in key for key in metrics_of_trainer)


def test_lightnings_csv_logger_gets_every_score(edits: EditDataset, tmp_path: Path) -> None:
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


def test_tables_mark_changed_answers(edits: EditDataset) -> None:
    metrics = EditMetrics(edits, every_n_steps=0, show=False, evaluation=EvaluationOptions(max_new_tokens=8))
    edit = train(edits, [metrics, NormBall(fraction=10.0)], 5)
    assert metrics.report is not None
    columns, rows = edit._host.tables["edit/answers"]
    answers = [dict(zip(columns, row, strict=True)) for row in rows]
    assert [row["changed"] for row in answers] == [
        "changed" if row["before"] != row["after"] else "" for row in answers
    ]
    assert "changed" in [row["changed"] for row in answers]
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
        ({"stop_at": 1.0, "every_n_steps": 0}, "EditMetrics: every_n_steps must be > 0 if stop_at is set, got 0"),
        ({"limit": 0}, "EditMetrics: limit must be an integer >= 1, or None, got 0"),
    ],
)
def test_invalid_arguments_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EditError, match=message):
        EditMetrics([], **options)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("file/x.json", "file is not a folder"), ("folder", "is a folder"), ("link/x.json", "link is not a folder")],
)
def test_a_report_path_that_cannot_be_written_is_an_error_before_the_first_step(
    edits: EditDataset, tmp_path: Path, name: str, reason: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(EditError, match=reason):
        train(edits, [EditMetrics(edits, report_path=str(tmp_path / name))], steps=0)
