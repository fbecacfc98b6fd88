"""What a recipe shows: what it does before the first step, one line of progress, and the report at the end."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar
from rich.console import Console

from kedit_train.callbacks import EditMetrics
from kedit_train.cli import main as entry
from kedit_train.cli import run_display
from kedit_train.cli.run_display import PrintSummary, RunProgress, display_callbacks

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
RECIPE = """
seed_everything: 0
model: {learning_rate: 1.0e-3}
data: {path: world, limit: 4, batch_size: 2}
trainer:
  max_epochs: 3
  logger: false
  enable_checkpointing: false
  enable_model_summary: false
  log_every_n_steps: 1
  callbacks:
  - class_path: kedit_train.callbacks.ParameterScope
    init_args: {layers: 0.5, modules: mlp.down_proj}
  - class_path: kedit_train.callbacks.EditMetrics
    init_args: {every_n_steps: 2, report_path: out/report.json}
"""


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Run the recipe, and return standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    Path("recipe.yaml").write_text(RECIPE)

    def run(command: str, *arguments: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["kedit_train", command, "--config", "recipe.yaml", *arguments])
        capsys.readouterr()
        entry.main()
        said = capsys.readouterr()
        return said.out, said.err

    return run


def test_a_run_in_a_pipe_says_what_it_does_and_ends_with_the_report(fit: Any) -> None:
    out, err = fit("fit")
    lines = [
        line for line in err.splitlines() if line.startswith(("edits ", "may change ", " ", "call", "eval", "epoch"))
    ]
    assert lines[0] == "edits       4 (world)"
    assert lines[1] == "may change  45,056 of 1,402,496 parameters (3.2%)"
    assert lines[2] == "            model.layers.3.mlp.down_proj.weight"
    assert lines[3].startswith("callbacks   ParameterScope(0.5, modules=")
    assert lines[4].startswith("            EditMetrics(every_n_steps=2")
    assert lines[5] == "evaluating 4 edits before training"
    assert lines[6].startswith("epoch 1 of 3, loss ")
    figures = dict(part.split() for part in lines[8].split(", ")[1:])
    assert figures.keys() == {"loss", "reliability", "locality"}
    assert out.splitlines()[0].startswith("Did it work?")
    assert out.splitlines()[-1] == "report: out/report.json (as a page: out/report.html)"
    assert "Did it work?" in Path("out/report.html").read_text(encoding="utf-8")


def test_without_a_progress_bar_only_the_report_is_printed(fit: Any) -> None:
    out, err = fit("fit", "--trainer.enable_progress_bar=false", "--trainer.max_epochs=1")
    assert "may change" not in err
    assert "epoch 1" not in err
    assert "Did it work?" in out


@pytest.mark.filterwarnings("ignore")
def test_a_run_in_trl_says_what_it_does(fit: Any) -> None:
    out, err = fit("sft", "--trainer.max_epochs=1")
    assert "may change  45,056 of 1,402,496 parameters (3.2%)" in err
    assert out.splitlines()[-1] == "report: out/report.json (as a page: out/report.html)"


def test_in_a_terminal_one_line_of_80_columns_is_shown(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    reported: list[str] = []

    def console(**_: Any) -> Console:
        return Console(file=terminal, force_terminal=True, width=80)

    monkeypatch.setattr(run_display, "Console", console)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(EditMetrics, "_log_tables", lambda *_: reported.append(terminal.getvalue()))
    fit("fit")
    (before_the_report,) = reported
    # The line was complete and had ended when the report was made.
    assert terminal.getvalue() == before_the_report
    assert before_the_report.endswith("\x1b[?25h")
    last = before_the_report.split("\x1b[2K")[-1]
    for part in ("step 6 of 6", "loss ", "reliability ", "locality "):
        assert part in last
    line = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", last).strip()
    assert "\n" not in line
    assert len(line) <= 80


def test_a_bar_of_the_user_is_kept() -> None:
    first, second = display_callbacks([EditMetrics()], progress=True)
    assert (type(first), type(second)) == (PrintSummary, RunProgress)
    assert [type(c) for c in display_callbacks([TQDMProgressBar()], progress=True)] == [PrintSummary]
    assert display_callbacks([EditMetrics()], progress=False) == []
