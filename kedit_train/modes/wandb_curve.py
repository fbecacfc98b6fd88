"""A mode's retention curve in W&B: a point at each checkpoint while it runs, then chart, answers and result."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kedit_train.evaluation.reporting import wandb_tables as logged
from kedit_train.modes.result import Checkpoint, ModeResult
from kedit_train.optional import require

EDITS = "retention/edits"
# What is a share of 1 and so fits on one axis; the series and the table hold perplexity and divergence, too.
SHARES = ("reliability", "latest", "generality", "portability", "locality", "agreement")
CURVE = ("edits", "score", "value", "low", "high", "n")


def begin(run: Any, meta: dict[str, Any]) -> None:
    """Number the series by edits, and keep the mode and the hash of the data in the run's configuration."""
    run.define_metric(EDITS)
    run.define_metric("retention/*", step_metric=EDITS)
    run.config.update({"mode": meta}, allow_val_change=True)


def point(run: Any, checkpoint: Checkpoint) -> None:
    """One row: ``retention/edits``, ``retention/seconds`` of training, and ``retention/<score>`` for each score."""
    row: dict[str, Any] = {EDITS: checkpoint.edits, "retention/seconds": checkpoint.seconds}
    run.log(row | {f"retention/{name}": score.value for name, score in checkpoint.scores().items()})


def end(run: Any, result: ModeResult) -> None:
    """The curve as table and chart, the edits' answers, their targets token by token, and the result as artifact."""
    with require("wandb", extra="wandb"):
        import wandb

    def table(columns: Sequence[str], rows: Any) -> Any:
        return wandb.Table(columns=list(columns), data=rows)

    scored = [(c.edits, name, score) for c in result.checkpoints for name, score in c.scores().items()]
    rows = [[edits, name, s.value, s.low, s.high, s.n] for edits, name, s in scored]
    shares = table(CURVE, [row for row in rows if row[1] in SHARES])
    title = f"{result.mode}: retention"
    run.log(
        {
            "retention/table": table(CURVE, rows),
            "retention/curve": wandb.plot.line(shares, "edits", "value", stroke="score", title=title),
            "edit/answers": table(*logged.answers(result.report)),
        }
    )
    places = [*logged.positions("unedited", result.before), *logged.positions(result.mode, result.report)]
    logged.curves_to_wandb(run, places)
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in (("result.json", "result"), ("result.md", "result-markdown")):
            run.log_artifact(str(result.save(Path(folder) / name)), name=f"{kind}-{run.id}", type=kind)
