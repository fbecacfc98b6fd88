"""Log the retention curve to W&B: one point per checkpoint during the run, and tables and charts at the end."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kedit_train.evaluation.reporting import wandb_tables
from kedit_train.modes.result import Checkpoint, ModeResult
from kedit_train.optional import require

EDITS = "retention/edits"
# The chart shows only scores between 0 and 1, which fit on one axis. The metrics ``retention/*`` and the table also
# contain perplexity and KL divergence.
SHARES = ("reliability", "latest", "generality", "portability", "locality", "agreement")
CURVE_COLUMNS = ("edits", "score", "value", "low", "high", "n")


def start_curve(run: Any, meta: dict[str, Any]) -> None:
    """Use the number of edits as the step axis of ``retention/*``, and store ``meta`` in the run's configuration."""
    run.define_metric(EDITS)
    run.define_metric("retention/*", step_metric=EDITS)
    run.config.update({"mode": meta}, allow_val_change=True)


def log_checkpoint(run: Any, checkpoint: Checkpoint) -> None:
    """Log the number of edits, the training time and each score of a checkpoint as ``retention/<name>``."""
    row: dict[str, Any] = {EDITS: checkpoint.edits, "retention/seconds": checkpoint.seconds}
    run.log(row | {f"retention/{name}": score.value for name, score in checkpoint.scores().items()})


def finish_curve(run: Any, result: ModeResult) -> None:
    """Log the curve, the answers and the scores at each token of the targets. Save the result as artifacts."""
    with require("wandb", extra="wandb"):
        import wandb

    def table(columns: Sequence[str], rows: Any) -> Any:
        return wandb.Table(columns=list(columns), data=rows)

    scores = [(c.edits, name, score) for c in result.checkpoints for name, score in c.scores().items()]
    rows = [[edits, name, s.value, s.low, s.high, s.n] for edits, name, s in scores]
    shares = table(CURVE_COLUMNS, [row for row in rows if row[1] in SHARES])
    title = f"{result.mode}: retention"
    run.log(
        {
            "retention/table": table(CURVE_COLUMNS, rows),
            "retention/curve": wandb.plot.line(shares, "edits", "value", stroke="score", title=title),
            "edit/answers": table(*wandb_tables.answers_table(result.report)),
        }
    )
    positions = [
        *wandb_tables.position_rows("unedited", result.unedited),
        *wandb_tables.position_rows(result.mode, result.report),
    ]
    wandb_tables.log_position_curves(run, positions)
    with tempfile.TemporaryDirectory() as folder:
        names = {"result.json": "result", "result.md": "result-markdown", "result.html": "result-page"}
        for name, kind in names.items():
            run.log_artifact(str(result.save(Path(folder) / name)), name=f"{kind}-{run.id}", type=kind)
