"""The loggers of a transformers trainer receive the edit/* metrics at their steps: TensorBoard, trackio and W&B."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conformance.hosts import sft_trainer, transformers_trainer
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback

from kedit_train import world
from kedit_train.callbacks import BatchAnchor, EditMetrics, ForgettingBudget, ParameterScope
from kedit_train.callbacks.hosts.transformers_host import TransformersHost
from kedit_train.data import EditDataset
from kedit_train.evaluation.options import EvaluationOptions

KL, WEIGHT, SCORE = "edit/locality/budget_kl", "edit/locality/budget_weight", "edit/reliability"


class Writer:
    """Records what the real TensorBoardCallback writes."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, int, float]] = []
        self.closed = False

    def add_text(self, *args: Any) -> None:
        pass

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, step, value))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def series(self, name: str) -> list[tuple[int, float]]:
        return [(step, value) for key, step, value in self.scalars if key == name]


class OwnTensorBoard(TensorBoardCallback):
    """The callback of transformers without the check that tensorboard is installed."""

    def __init__(self) -> None:
        self.writers = [Writer()]
        self.tb_writer, self._SummaryWriter, self.logging_dir = self.writers[0], object, None

    def _init_summary_writer(self, args: Any) -> None:
        if not (self.writers and self.tb_writer is self.writers[-1]):
            self.writers.append(Writer())
            self.tb_writer = self.writers[-1]


class OwnTrackio(TrackioCallback):
    """The callback of transformers with a recording module in place of trackio."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.ended = False
        self._trackio = SimpleNamespace(log=self._record, finish=self._end)
        self._initialized, self._space_id = True, None

    def setup(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("a second run of trackio began")

    def _record(self, row: dict[str, Any]) -> None:
        assert not self.ended
        self.rows.append(row)

    def _end(self) -> None:
        self.ended = True


@pytest.fixture
def edits() -> EditDataset:
    return EditDataset(world.edits(n=4))


def callbacks(edits: EditDataset) -> list[Any]:
    return [
        ParameterScope(layers=0.5, modules="mlp.down_proj"),
        BatchAnchor(1.0),
        ForgettingBudget(5.0),
        EditMetrics(edits, every_n_steps=2, show=False, evaluation=EvaluationOptions(max_new_tokens=8)),
    ]


def series(rows: list[dict[str, Any]], key: str, step: str) -> list[tuple[int, float]]:
    return [(row[step], row[key]) for row in rows if key in row]


@pytest.mark.parametrize("train", [transformers_trainer, sft_trainer])
def test_loggers_before_the_callbacks_receive_every_row(train: Any, edits: EditDataset) -> None:
    model, tokenizer = world.load()
    board, trackio = OwnTensorBoard(), OwnTrackio()
    trainer = train(model, tokenizer, edits, [board, trackio, *callbacks(edits)], 4, logging_steps=2)
    history = trainer.state.log_history
    during = [row for row in history if "loss" in row]
    assert [row["step"] for row in during] == [2, 4]
    for key in (KL, WEIGHT, SCORE, "edit/locality/batch_kl"):
        expected = series(during, key, "step")
        assert len(expected) == 2, key
        assert board.writers[0].series(f"train/{key}") == expected
        assert series(trackio.rows, f"train/{key}", "train/global_step") == expected
    # Each row of the trainer itself is logged once.
    assert [step for step, _ in board.writers[0].series("train/loss")] == [2, 4]
    assert len(series(trackio.rows, "train/loss", "train/global_step")) == 2
    assert all(writer.closed for writer in board.writers)
    assert trackio.ended


def test_scores_at_the_end_of_training_reach_tensorboard_only(edits: EditDataset) -> None:
    model, tokenizer = world.load()
    board, trackio = OwnTensorBoard(), OwnTrackio()
    trainer = transformers_trainer(model, tokenizer, edits, [board, trackio, *callbacks(edits)], 3, logging_steps=1)
    scores = series(trainer.state.log_history, SCORE, "step")
    assert [step for step, _ in scores] == [2, 3]
    assert [s for writer in board.writers for s in writer.series(f"train/{SCORE}")] == scores
    assert series(trackio.rows, f"train/{SCORE}", "train/global_step") == scores[:1]
    assert len(board.writers) == 2
    assert all(writer.closed for writer in board.writers)


def test_tensorboard_files_hold_the_series(edits: EditDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    model, tokenizer = world.load()
    trainer = sft_trainer(model, tokenizer, edits, callbacks(edits), 4, report_to="tensorboard")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for key in (KL, WEIGHT):
        read = [(event.step, event.value) for event in events.Scalars(f"train/{key}")]
        expected = series([row for row in trainer.state.log_history if "loss" in row], key, "step")
        assert [step for step, _ in read] == [step for step, _ in expected]
        assert [value for _, value in read] == pytest.approx([value for _, value in expected])


def test_trackio_holds_the_series(edits: EditDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    model, tokenizer = world.load()
    rows: list[dict[str, Any]] = []
    import trackio

    log = trackio.log
    monkeypatch.setattr(trackio, "log", lambda row, *args, **kwargs: (rows.append(row), log(row, *args, **kwargs)))
    trainer = sft_trainer(model, tokenizer, edits, callbacks(edits), 4, report_to="trackio")
    expected = series([row for row in trainer.state.log_history if "loss" in row], WEIGHT, "step")
    assert series(rows, f"train/{WEIGHT}", "train/global_step") == expected


def test_the_table_in_a_notebook_shows_the_scores(edits: EditDataset, ipython: list[str], capsys: Any) -> None:
    """The callback and its table are those of transformers; only the display of IPython is replaced."""
    from transformers.utils.notebook import NotebookProgressCallback

    tables: list[list[list[Any]]] = []

    class Recording(NotebookProgressCallback):
        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            tables.append(self.training_tracker.inner_table)
            super().on_train_end(*args, **kwargs)

    # In a notebook, the trainer puts this callback after the callbacks of the user.
    model, tokenizer = world.load()
    given = [*callbacks(edits), Recording()]
    capsys.readouterr()
    trainer = transformers_trainer(model, tokenizer, edits, given, 5, logging_steps=1, disable_tqdm=True)
    ((head, *rows),) = tables
    assert head == ["Step", "Training Loss", "Reliability", "Generality", "Locality"]
    history = {row["step"]: row for row in trainer.state.log_history if "loss" in row}
    assert [row[0] for row in rows] == [1, 2, 3, 4, 5]
    for row in rows:
        assert row[1] == history[row[0]]["loss"]
        if row[0] in (2, 4):
            names = ("edit/reliability", "edit/generality", "edit/locality")
            assert row[2:] == [round(history[row[0]][name], 3) for name in names]
    assert rows[2][2:] == ["No Log"] * 3
    # The scores after the last step are in the row of this step.
    final = next(row for row in reversed(trainer.state.log_history) if SCORE in row)
    assert rows[4][2] == round(final[SCORE], 3)
    assert "Reliability</th>" in ipython[-1]


@pytest.mark.parametrize("quiet", [False, True])
def test_a_trainer_with_a_progress_bar_says_what_it_reads_before_the_first_step(quiet, tmp_path, capsys):
    args = TrainingArguments(str(tmp_path), disable_tqdm=quiet, report_to=[], use_cpu=True)
    host = TransformersHost(args, TrainerState(), TrainerControl(), None)
    host.show_progress("reading 3 texts")
    assert ("reading 3 texts" in capsys.readouterr().err) is not quiet
