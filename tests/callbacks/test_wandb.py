"""Logging to W&B: offline runs of ordinary trainers, read back from their files."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from callbacks.wandb_offline import OfflineRun
from conformance.hosts import lightning_trainer, sft_trainer

from kedit_train import world
from kedit_train.callbacks import (
    BatchAnchor,
    EditMetrics,
    ForgettingBudget,
    KLLocality,
    ParameterScope,
    SaveDelta,
    TokenSmoothing,
)
from kedit_train.data import EditDataset
from kedit_train.evaluation.options import EvaluationOptions

TEXTS = ["The old baker found a coin near the river.", "A red fox slept."]
# Answers change within five steps.
RATE = 1e-2


def fast(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=RATE)


@pytest.fixture
def edits() -> EditDataset:
    return EditDataset(world.edits(n=4))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in {"WANDB_DIR": str(tmp_path), "WANDB_MODE": "offline", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    # W&B keeps the folder of an earlier test in this process.
    wandb.teardown()
    return tmp_path


def callbacks(edits: EditDataset) -> list[Any]:
    return [
        EditMetrics(edits, every_n_steps=2, show=False, evaluation=EvaluationOptions(max_new_tokens=8)),
        KLLocality(texts=TEXTS, batch_size=2, weight=0.1),
        TokenSmoothing(),
        ParameterScope(layers=0.5, modules="mlp.down_proj"),
    ]


def the_rest(run: OfflineRun, edits: EditDataset, metrics: Any, delta: Path) -> None:
    """Check the tables, charts, configuration, summary and artifacts of a run."""
    content = run.table("edit/answers")
    assert content["columns"] == ["prompt", "target", "old_target", "before", "after", "right", "changed"]
    rows = content["data"]
    assert [row[:3] for row in rows] == [[e.prompt, e.target, e.old_target] for e in edits]
    assert [row[6] for row in rows] == ["" if row[3] == row[4] else "changed" for row in rows]
    assert "changed" in [row[6] for row in rows]
    moved = [r for r in metrics.report.answers if r.question == "locality" and r.before != r.answer]
    assert len(moved) > 0
    elsewhere = run.table("edit/changed_elsewhere")["data"]
    assert [row[1:4] for row in elsewhere] == [[r.prompt, r.before, r.answer] for r in moved]
    places = run.table("edit/positions")
    assert places["columns"] == ["model", "token", "accuracy", "loss", "probability", "n"]
    assert list(dict.fromkeys(row[0] for row in places["data"])) == ["unedited", "step 2", "step 4", "edited"]
    first = next(row for row in places["data"] if row[:2] == ["edited", 1])
    scores = metrics.report.metrics["positions"]["1"]
    assert first[2:] == [scores[name].value for name in ("accuracy", "loss", "probability")] + [4]
    for name in ("probability", "loss"):
        assert run.table(f"edit/positions_{name}_table")["data"] == places["data"]
        assert run.config["_wandb/visualize/edit/positions_" + name]["panel_config"]["fieldSettings"]["y"] == name
    assert run.config["edit"]["data_hash"] == edits.hash
    assert any(one.startswith("KLLocality(") for one in run.config["edit"]["callbacks"])
    assert run.summary["edit/best/step"] == metrics.best["edit/best/step"]
    assert run.summary["edit/best/reliability"] == metrics.best["edit/best/reliability"]
    assert run.summary["edit/metrics/seconds"] > 0.0
    arguments = run.config["edit"]["arguments"]
    assert arguments["KLLocality"]["texts"]["source"] == TEXTS
    assert (arguments["KLLocality"]["weight"], arguments["EditMetrics"]["every_n_steps"]) == (0.1, 2)
    assert arguments["EditMetrics"]["edits"] == {"name": edits.name, "hash": edits.hash, "edits": 4}
    files = {"report": "report.json", "report-markdown": "report.md", "report-page": "report.html", "delta": delta.name}
    assert run.artifacts == {kind: [name] for kind, name in files.items()}
    assert run.checksums[delta.name] == hashlib.md5(delta.read_bytes()).digest()
    assert run.checksums["report.html"] == hashlib.md5(f"{metrics.report.html()}\n".encode()).digest()
    assert run.media("edit/report") == metrics.report.html()


def test_an_sft_run_logs_into_its_own_wandb_run(folder: Path, edits: EditDataset) -> None:
    model, tokenizer = world.load()
    delta = folder / "edit.safetensors"
    metrics = [*callbacks(edits), SaveDelta(str(delta))]
    trainer = sft_trainer(model, tokenizer, edits, metrics, 5, report_to="wandb", logging_steps=5, learning_rate=RATE)
    assert metrics[0].report is not None
    scores = metrics[0].report.flat()
    wandb.finish()
    run = OfflineRun(folder)
    assert run.steps["edit/*"] == "train/global_step"
    evaluations = run.series("edit/reliability", "train/global_step")
    # Evaluations take place at steps 2 and 4 and at the end of training.
    assert [step for step, _ in evaluations] == [2, 4, 5]
    assert evaluations[-1][1] == scores["edit/reliability"]
    assert [step for step, _ in run.series("edit/tokens/active", "train/global_step")] == [2, 4, 5]
    assert run.series("edit/locality/kl", "train/global_step")[-1][1] > 0
    # The same run has the rows of the trainer, at their own steps.
    assert 5 in [step for step, _ in run.series("train/loss", "train/global_step")]
    assert run.summary["edit/locality"] == scores["edit/locality"]
    # The history of the trainer has them too.
    history = [row for row in trainer.state.log_history if "edit/reliability" in row]
    assert [row["step"] for row in history] == [2, 4, 5]
    the_rest(run, edits, metrics[0], delta)


def test_a_lightning_run_logs_into_its_own_wandb_run(folder: Path, edits: EditDataset) -> None:
    from lightning.pytorch.loggers import WandbLogger

    model, tokenizer = world.load()
    delta = folder / "edit.safetensors"
    metrics = [*callbacks(edits), SaveDelta(str(delta))]
    logger = WandbLogger(save_dir=folder, offline=True)
    lightning_trainer(model, tokenizer, edits, metrics, 5, logger=logger, optimizer=fast)
    assert metrics[0].report is not None
    scores = metrics[0].report.flat()
    wandb.finish()
    run = OfflineRun(folder)
    losses = dict(run.series("train_loss", "trainer/global_step"))
    evaluations = run.series("edit/reliability", "trainer/global_step")
    # Lightning logs the n-th step under the number n - 1. The scores share those rows with the loss.
    assert [step for step, _ in evaluations] == [1, 3, 4]
    assert set(losses) == {0, 1, 2, 3, 4}
    assert evaluations[-1][1] == scores["edit/reliability"]
    assert run.series("edit/locality/kl", "trainer/global_step")[-1][0] == 4
    assert run.steps["edit/*"] == "trainer/global_step"
    the_rest(run, edits, metrics[0], delta)


def test_a_delta_is_not_uploaded_if_the_user_does_not_want_it(folder: Path, edits: EditDataset) -> None:
    model, tokenizer = world.load()
    used = [ParameterScope(layers=0.5, modules="mlp.down_proj"), SaveDelta(str(folder / "e.safetensors"), upload=False)]
    sft_trainer(model, tokenizer, edits, used, 2, report_to="wandb", learning_rate=RATE)
    wandb.finish()
    assert (folder / "e.safetensors").exists()
    assert OfflineRun(folder).artifacts == {}


@pytest.mark.parametrize("host", ["SFTTrainer", "Lightning"])
def test_the_weight_of_a_budget_is_a_series(host: str, folder: Path, edits: EditDataset) -> None:
    from lightning.pytorch.loggers import WandbLogger

    model, tokenizer = world.load()
    used = [BatchAnchor(1.0), ForgettingBudget(5.0), ParameterScope(layers=0.5, modules="mlp.down_proj")]
    if host == "SFTTrainer":
        sft_trainer(model, tokenizer, edits, used, 3, report_to="wandb")
        step, numbers = "train/global_step", [1, 2, 3]
    else:
        logger = WandbLogger(save_dir=folder, offline=True)
        lightning_trainer(model, tokenizer, edits, used, 3, logger=logger)
        step, numbers = "trainer/global_step", [0, 1, 2]
    wandb.finish()
    run = OfflineRun(folder)
    weights = run.series("edit/locality/budget_weight", step)
    # The divergence stays far below the budget, so the weight falls by the same factor in every step.
    assert [number for number, _ in weights] == numbers
    assert [weight for _, weight in weights] == pytest.approx([math.exp(-0.1 * n) for n in (1, 2, 3)], rel=1e-5)
    divergences = run.series("edit/locality/budget_kl", step)
    assert [number for number, _ in divergences] == numbers
    assert divergences[0][1] < divergences[-1][1] < 0.1


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


def test_training_works_without_wandb(edits: EditDataset, monkeypatch: pytest.MonkeyPatch) -> None:
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
