"""Edits that come one after the other, each trained alone by the same process as soon as it is there.

    python recipes/one_by_one.py
    python recipes/one_by_one.py --model Qwen/Qwen3-0.6B --edits edits.jsonl --texts texts_that_must_stay.txt --lr 1e-4
    python recipes/one_by_one.py --plain          the same runs without what must stay: 0.79 of the other answers

Expected: reliability 0.95 to 1.00, generality 0.87 to 0.98, locality 0.89 to 1.00; 75 s (2026-11-22).

What each run holds is the model before the first edit and the edits since (``KLLocality(sequential=True)``), and all
of them together stay within a ball around the weights before the first (``NormBall``): where edits are many, that keeps
most of what no text says. Where edits can be trained together, that is better: kedit_default.yaml, and sequential.yaml
for those of a day.

Result: what is known after how many edits, in the terminal and as retention.png, and in the output folder report.json
and edit.safetensors, which `kedit apply` adds to the base model; stopped in between, it has what was learned until
then.
"""

from __future__ import annotations

import argparse
import copy
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from kedit_train import EditDelta, world
from kedit_train.atomic_write import check_writable
from kedit_train.callbacks import EditCallback, KLLocality, NormBall, ParameterScope, StopWhenEdited, Texts, TokenLoss
from kedit_train.data import EditDataset
from kedit_train.errors import EditError
from kedit_train.modes import TrainLoop, run_edits
from kedit_train.pretrained import load_model

DELTA, REPORT, PICTURE = "edit.safetensors", "report.json", "retention.png"


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Edits one after the other, each trained alone.")
    parser.add_argument("--model", default=world.NAME, help="a hub name, a folder, or 'world'")
    parser.add_argument("--edits", default=world.NAME, help="a file of edits, in order, or 'world'")
    parser.add_argument("--texts", help="a file of texts that must stay; the world's own are the default for the world")
    parser.add_argument("--output_dir", default="runs/one_by_one")
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--room", type=float, help="how far weights may go, of their norm before the first (0.5)")
    parser.add_argument("--limit", type=int, help="how many edits; 24 of the world")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="without what must stay")
    return parser.parse_args(given)


def learning() -> list[EditCallback]:
    """As kedit_default.yaml learns."""
    return [
        ParameterScope("0.3-1.0", modules="mlp.down_proj"),
        TokenLoss(reduction="sample"),
        StopWhenEdited(loss=0.005),
    ]


def constraints(texts: str, room: float, seed: int = 0) -> list[EditCallback]:
    """What must stay. The instances live on from edit to edit, and so do their memories."""
    # Ten times the penalty of a batch: one edit's gradients do not cancel, and half of the rows are earlier edits.
    return [
        KLLocality(Texts(texts, seed=seed), weight=200.0, batch_size=32, sequential=True),
        NormBall(norm="l2", per="scope", fraction=room),
    ]


def check(given: argparse.Namespace) -> None:
    """Refuse in this command's words, and before a model is loaded, what would come up later."""
    for name in ("lr", "room", "limit"):
        value = getattr(given, name)
        if value is not None and not 0 < value < float("inf"):
            raise EditError(f"--{name} {value:g}: give a number above 0")
    if given.texts not in (None, world.NAME) and not Path(given.texts).is_file():
        raise EditError(f"--texts {given.texts}: there is no such file")
    if given.plain and (given.texts, given.room) != (None, None):
        raise EditError("--plain holds nothing: leave out --texts and --room")
    if not given.plain and given.texts is None and (given.model, given.edits) != (world.NAME, world.NAME):
        raise EditError("--texts FILE: name texts that your model should answer as before (.txt with one a line)")
    for name in (DELTA, REPORT, PICTURE):
        check_writable(Path(given.output_dir) / name)
    if find_spec("matplotlib") is None:
        raise EditError("pictures need matplotlib: pip install 'kedit-train[report]'")


def main() -> None:
    given = arguments()
    check(given)
    out = Path(given.output_dir)
    limit = 24 if given.limit is None and world.is_world(given.edits) else given.limit
    edits = EditDataset.load(given.edits, limit=limit)
    model, tokenizer = load_model(given.model)
    base = copy.deepcopy(model)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    room = 0.5 if given.room is None else given.room
    held = [] if given.plain else constraints(given.texts or world.NAME, room, given.seed)
    loop = TrainLoop(tokenizer, callbacks=[*learning(), *held], epochs=40, learning_rate=given.lr, stop_loss=0.0)
    finished = False
    try:
        result = run_edits(model, tokenizer, edits, mode="sequential", train=loop, seed=given.seed)
        finished = True
    finally:
        delta = EditDelta.between(base, model.cpu(), edits=edits if finished else None)
        if delta.changes:
            delta.save(out / DELTA)
    result.report.save(out / REPORT)
    result.save(out / PICTURE)
    print(result.markdown())
    for answer in result.report.answers:
        if answer.question == "reliability" and not answer.right:
            print(f"not answered as edited: {answer.prompt!r} (it says {answer.answer!r})")


if __name__ == "__main__":
    try:
        main()
    except EditError as error:
        sys.exit(f"error: {error}")
