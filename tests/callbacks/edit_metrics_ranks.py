"""What ``test_edit_metrics_ranks.py`` runs on each of several processes: one plain loop under DDP."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from conformance.hosts import collator
from ranks import joined
from torch.nn.parallel import DistributedDataParallel

from kedit_train import world
from kedit_train.callbacks import EditMetrics, ParameterScope, editing
from kedit_train.data import EditDataset
from kedit_train.evaluation.options import EvaluationOptions


def main(folder: Path, rank: int, size: int) -> None:
    model, tokenizer = world.load()
    edits = EditDataset(world.edits(n=5))
    batch = collator(tokenizer)(edits.encode(tokenizer))
    # By the clock of the first process, evaluations take too long from the second step on. By the clock of the other
    # process, they never take too long.
    metrics = EditMetrics(
        edits,
        every_n_steps=1,
        limit=3,
        show=False,
        max_fraction_of_time=0.99,
        evaluation=EvaluationOptions(max_new_tokens=8, metrics=["kl"], distributed=True),
    )
    metrics._share_of_time = lambda: 1.0 if rank == 0 and metrics._evaluated_step == 1 else 0.0
    with editing(model, [ParameterScope(layers=0.5, modules="mlp.down_proj"), metrics], tokenizer=tokenizer) as edit:
        wrapped = DistributedDataParallel(model) if size > 1 else model
        optimizer = torch.optim.SGD(edit.parameters(), lr=0.5)
        for _ in range(3):
            edit.before_step()
            wrapped(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert metrics.report is not None
    found = {"history": edit.history, "report": metrics.report.to_dict()["metrics"], "skipped": metrics.skipped}
    (folder / f"found-{size}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    where = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    with joined(*where):
        main(*where)
