"""The program that ``test_distributed.py`` runs on each process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from ranks import joined

from kedit_train import Edit, EditError, evaluate, world
from kedit_train.evaluation import EvaluationOptions, MeanOverEdits
from kedit_train.evaluation.scoring import probe_results


def main(folder: Path, rank: int, size: int) -> None:
    probe_results.FLUENCY_TOKENS = 8
    model, tokenizer = world.load()
    edits = world.edits(7)
    texts = [edit.prompt for edit in edits[:5]]
    options = EvaluationOptions(metrics="all", prose=texts, distributed=size > 1)
    settings = {"options": options, "progress": False}
    before = evaluate(model, tokenizer, edits, **settings)
    with torch.no_grad():
        dict(model.named_parameters())["model.layers.2.mlp.down_proj.weight"].mul_(0.5)
    report = evaluate(model, tokenizer, edits, unedited=before, **settings)
    report.save(folder / f"report-{size}-{rank}.json")
    # The metric alone, as a LightningModule would use it.
    mean = MeanOverEdits(7, seed=2)
    own = list(range(7))[rank::size]
    mean.update(own, [edit % 3 / 2 for edit in own])
    (folder / f"mean-{size}-{rank}.json").write_text(json.dumps(mean.compute().tolist()))
    try:
        # Only the second process evaluates the edit that is too long.
        evaluate(model, tokenizer, [edits[0], Edit("too long " * 600, "x", id="long"), edits[2]], **settings)
    except EditError as error:
        (folder / f"error-{size}-{rank}.txt").write_text(str(error))


if __name__ == "__main__":
    where = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    with joined(*where):
        main(*where)
