"""Real offline W&B runs of unmodified trainers, read back from their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import wandb
from callbacks.wandb_offline import OfflineRun
from conformance.hosts import lightning_trainer, sft_trainer

from kedit_train import world
from kedit_train.callbacks import EditMetrics, KLLocality, ParameterScope, TokenSmoothing
from kedit_train.data import EditDataset

TEXTS = ["The old baker found a coin near the river.", "A red fox slept."]


@pytest.fixture
def edits() -> EditDataset:
    return EditDataset(world.edits(n=4))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in {"WANDB_DIR": str(tmp_path), "WANDB_MODE": "offline", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def callbacks(edits: EditDataset) -> list[Any]:
    return [
        EditMetrics(edits, every_n_steps=2, show=False, max_new_tokens=8),
        KLLocality(texts=TEXTS, batch_size=2),
        TokenSmoothing(),
        ParameterScope(layers=0.5, modules="mlp.down_proj"),
    ]


def answers(run: OfflineRun, edits: EditDataset) -> None:
    (table,) = (run.folder / "files").rglob("*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["prompt", "target", "old_target", "before", "after", "right"]
    assert [row[:3] for row in content["data"]] == [[e.prompt, e.target, e.old_target] for e in edits]


def test_an_sft_run_logs_into_its_own_wandb_run(folder: Path, edits: EditDataset) -> None:
    model, tokenizer = world.load()
    metrics = callbacks(edits)
    trainer = sft_trainer(model, tokenizer, edits, metrics, 5, report_to="wandb", logging_steps=5)
    assert metrics[0].report is not None
    scores = metrics[0].report.flat()
    wandb.finish()
    run = OfflineRun(folder)
    assert run.steps["edit/*"] == "train/global_step"
    looks = run.series("edit/reliability", "train/global_step")
    # Steps 2 and 4 during training, 5 at the end.
    assert [step for step, _ in looks] == [2, 4, 5]
    assert looks[-1][1] == scores["edit/reliability"]
    assert [step for step, _ in run.series("edit/tokens/active", "train/global_step")] == [2, 4, 5]
    assert run.series("edit/locality/kl", "train/global_step")[-1][1] > 0
    # The trainer's own rows are there, at its own steps, in the same run.
    assert 5 in [step for step, _ in run.series("train/loss", "train/global_step")]
    assert run.summary["edit/locality"] == scores["edit/locality"]
    # The trainer's own history has them too.
    history = [row for row in trainer.state.log_history if "edit/reliability" in row]
    assert [row["step"] for row in history] == [2, 4, 5]
    answers(run, edits)


def test_a_lightning_run_logs_into_its_own_wandb_run(folder: Path, edits: EditDataset) -> None:
    from lightning.pytorch.loggers import WandbLogger

    model, tokenizer = world.load()
    metrics = callbacks(edits)
    logger = WandbLogger(save_dir=folder, offline=True)
    lightning_trainer(model, tokenizer, edits, metrics, 5, logger=logger, log_every_n_steps=1)
    assert metrics[0].report is not None
    scores = metrics[0].report.flat()
    wandb.finish()
    run = OfflineRun(folder)
    losses = dict(run.series("train_loss", "trainer/global_step"))
    looks = run.series("edit/reliability", "trainer/global_step")
    # Lightning numbers the row of the n-th step n - 1; ours share those rows, so each carries a loss as well.
    assert [step for step, _ in looks] == [1, 3, 4]
    assert set(losses) == {0, 1, 2, 3, 4}
    assert looks[-1][1] == scores["edit/reliability"]
    assert run.series("edit/locality/kl", "trainer/global_step")[-1][0] == 4
    assert run.steps["edit/*"] == "trainer/global_step"
    answers(run, edits)


def test_the_progress_bar_of_lightning_shows_the_scores(edits: EditDataset) -> None:
    import lightning as L

    seen: list[dict[str, Any]] = []

    class Bar(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            seen.append(dict(trainer.progress_bar_metrics))

    model, tokenizer = world.load()
    trainer = lightning_trainer(model, tokenizer, edits, [*callbacks(edits), Bar()], 3)
    assert "edit/reliability" not in seen[0]
    assert "edit/reliability" in seen[-1]
    assert "edit/reliability" in trainer.callback_metrics


def test_the_progress_bar_of_transformers_shows_the_scores(
    edits: EditDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = world.load()
    sft_trainer(model, tokenizer, edits, callbacks(edits), 2)
    assert "'edit/reliability'" in capsys.readouterr().out


def test_without_wandb_nothing_is_missed(edits: EditDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "wandb":
            raise ImportError("wandb is not installed")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    model, tokenizer = world.load()
    metrics = callbacks(edits)
    sft_trainer(model, tokenizer, edits, metrics, 2)
    assert metrics[0].report is not None
