"""The files of W&B, TensorBoard and trackio hold the same series, in a transformers trainer and in Lightning."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from callbacks.wandb_offline import OfflineRun
from conformance.hosts import lightning_trainer, transformers_trainer

from kedit_train import world
from kedit_train.callbacks import BatchAnchor, EditMetrics, ForgettingBudget, ParameterScope
from kedit_train.data import EditDataset
from kedit_train.evaluation.options import EvaluationOptions

PAGE = Path(__file__).resolve().parents[2] / "docs" / "logging.md"
KEYS = ("edit/reliability", "edit/locality", "edit/best/step", "edit/locality/budget_kl", "edit/locality/budget_weight")
LOGGERS = ("wandb", "tensorboard", "trackio")
Series = dict[str, list[tuple[int, float]]]


@pytest.fixture(scope="module")
def trackio_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let trackio write into a folder of pytest. trackio reads the variable when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        yield


def callbacks(edits: EditDataset) -> list[Any]:
    return [
        ParameterScope(layers=0.5, modules="mlp.down_proj"),
        BatchAnchor(1.0),
        ForgettingBudget(5.0),
        EditMetrics(edits, every_n_steps=2, show=False, evaluation=EvaluationOptions(max_new_tokens=8)),
    ]


def from_wandb(folder: Path, project: str, prefix: str) -> Series:
    # In W&B, the trainer puts no prefix before the series of the edit.
    run, step = OfflineRun(folder), "train/global_step" if prefix else "trainer/global_step"
    return {key: run.series(key, step) for key in KEYS}


def from_tensorboard(folder: Path, project: str, prefix: str) -> Series:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # A folder may hold several event files, because the trainer opens a new one for the scores at the end.
    folders = {path.parent for path in folder.rglob("events.out.tfevents.*")}
    (events,) = [EventAccumulator(str(path)) for path in folders]
    events.Reload()
    return {key: [(event.step, event.value) for event in events.Scalars(prefix + key)] for key in KEYS}


def from_trackio(folder: Path, project: str, prefix: str) -> Series:
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs(project)
    rows = SQLiteStorage.get_logs(project, run)
    step = f"{prefix}global_step" if prefix else "step"
    return {key: [(row[step], row[prefix + key]) for row in rows if prefix + key in row] for key in KEYS}


READERS: dict[str, Callable[[Path, str, str], Series]] = {
    "wandb": from_wandb,
    "tensorboard": from_tensorboard,
    "trackio": from_trackio,
}


def trackio_logger() -> type[Any]:
    """Return the class of the documentation."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(next(block for block in blocks if "class TrackioLogger" in block), names)
    return names["TrackioLogger"]


def prepare(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(name, reason=f"{name} is missing; pip install {name}")
    variables = {"WANDB_DIR": folder, "WANDB_MODE": "offline", "WANDB_CONSOLE": "off"}
    for variable, value in (variables | {"TENSORBOARD_LOGGING_DIR": folder}).items():
        monkeypatch.setenv(variable, str(value))
    wandb.teardown()


# trackio and tensorboard use parts of other packages that are deprecated.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("trackio_folder")
@pytest.mark.parametrize("name", LOGGERS)
def test_a_transformers_trainer_writes_the_series(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(name, tmp_path, monkeypatch)
    model, tokenizer = world.load()
    edits = EditDataset(world.edits(n=4))
    options = {"report_to": name, "project": "from-transformers", "logging_steps": 2}
    trainer = transformers_trainer(model, tokenizer, edits, callbacks(edits), 5, **options)
    wandb.finish()
    read = READERS[name](tmp_path, "from-transformers", "train/")
    history = trainer.state.log_history
    for key in KEYS:
        expected = [(row["step"], row[key]) for row in history if key in row]
        assert [step for step, _ in expected][:2] == [2, 4]
        # The trainer has ended the run of trackio before the last evaluation.
        expected = expected[:2] if name == "trackio" else expected
        assert [step for step, _ in read[key]] == [step for step, _ in expected], key
        assert [value for _, value in read[key]] == pytest.approx([value for _, value in expected]), key


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("trackio_folder")
@pytest.mark.parametrize("name", LOGGERS)
def test_a_lightning_trainer_writes_the_series(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

    prepare(name, tmp_path, monkeypatch)
    loggers: dict[str, Callable[[], Any]] = {
        "wandb": lambda: WandbLogger(save_dir=tmp_path, offline=True),
        "tensorboard": lambda: TensorBoardLogger(tmp_path),
        "trackio": lambda: trackio_logger()("from-lightning"),
    }
    model, tokenizer = world.load()
    edits = EditDataset(world.edits(n=4))
    table = CSVLogger(tmp_path)
    lightning_trainer(model, tokenizer, edits, callbacks(edits), 5, logger=[table, loggers[name]()])
    wandb.finish()
    read = READERS[name](tmp_path, "from-lightning", "")
    with open(Path(table.log_dir) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for key in KEYS:
        expected = [(int(row["step"]), float(row[key])) for row in rows if row[key]]
        assert [step for step, _ in expected][-3:] == [1, 3, 4] if key == "edit/reliability" else len(expected) >= 3
        assert [step for step, _ in read[key]] == [step for step, _ in expected], key
        assert [value for _, value in read[key]] == pytest.approx([value for _, value in expected]), key
