"""The retention curve in a real offline W&B run, read back from its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from callbacks.wandb_offline import OfflineRun

from kedit_train import world
from kedit_train.data import EditDataset
from kedit_train.evaluation import CapabilityProbe, EvaluationOptions
from kedit_train.modes import run_edits

TEXTS = ["The old baker found a coin near the river.", "A red fox slept under the bridge."]


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in {"WANDB_DIR": str(tmp_path), "WANDB_MODE": "offline", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    # A W&B setup of another test in this process would keep its folder.
    wandb.teardown()
    yield wandb.init(project="modes", dir=str(tmp_path))
    wandb.finish()


class Nudge:
    """A training function that moves one matrix a little, so that answers and divergences change."""

    @torch.no_grad()
    def __call__(self, model: Any, edits: Any) -> None:
        weight = model.get_parameter("model.layers.4.mlp.down_proj.weight")
        weight += 0.05 * torch.randn_like(weight)


def test_sequential_logs_a_series_over_the_number_of_edits(board: Any, tmp_path: Path) -> None:
    model, tokenizer = world.load()
    edits = EditDataset(world.edits(n=4), name="four")
    result = run_edits(
        model,
        tokenizer,
        edits,
        mode="sequential",
        train=Nudge(),
        checkpoints=(1, 2),
        capability=CapabilityProbe(TEXTS, max_new_tokens=4),
        wandb_run=board,
        options=EvaluationOptions(max_new_tokens=8),
        progress=False,
    )
    wandb.finish()
    run = OfflineRun(tmp_path)
    assert run.steps["retention/*"] == "retention/edits"
    wanted = {c.edits: c.scores() for c in result.checkpoints}
    assert list(wanted) == [1, 2, 4]
    names = {"reliability", "latest", "generality", "portability", "locality", "perplexity", "kl", "agreement"}
    assert set(wanted[4]) == names
    for name in names:
        series = run.series(f"retention/{name}", "retention/edits")
        assert series == [(edits, scores[name].value) for edits, scores in wanted.items()], name
        assert run.summary[f"retention/{name}"] == wanted[4][name].value
    assert wanted[4]["kl"].value != wanted[1]["kl"].value
    table = run.table("retention/table")
    assert table["columns"] == ["edits", "score", "value", "low", "high", "n"]
    assert table["data"] == [
        [edits, name, s.value, s.low, s.high, s.n] for edits, scores in wanted.items() for name, s in scores.items()
    ]
    drawn = run.table("retention/curve_table")["data"]
    assert {row[1] for row in drawn} == names - {"perplexity", "kl"}
    fields = run.config["_wandb/visualize/retention/curve"]["panel_config"]["fieldSettings"]
    assert (fields["x"], fields["y"], fields["stroke"]) == ("edits", "value", "score")
    answers = run.table("edit/answers")
    assert [row[0] for row in answers["data"]] == [edit.prompt for edit in edits]
    assert run.config["mode"]["mode"] == "sequential"
    assert run.config["mode"]["data_hash"] == result.meta["data_hash"]
    files = {"result": "result.json", "result-markdown": "result.md", "result-page": "result.html"}
    assert run.artifacts == {kind: [name] for kind, name in files.items()}


@pytest.mark.parametrize("mode", ["single", "batch"])
def test_single_and_batch_log_one_point(board: Any, tmp_path: Path, mode: Any) -> None:
    model, tokenizer = world.load()
    edits = EditDataset(world.edits(n=2))
    result = run_edits(
        model,
        tokenizer,
        edits,
        mode=mode,
        train=Nudge(),
        wandb_run=board,
        options=EvaluationOptions(max_new_tokens=8),
        progress=False,
    )
    wandb.finish()
    run = OfflineRun(tmp_path)
    score = result.report.metrics["reliability"]["generated"].value
    assert run.series("retention/reliability", "retention/edits") == [(2, score)]
    assert run.config["mode"]["mode"] == mode
