"""A run of 7 steps that saves checkpoints. As a script it kills itself at step 5.

An epoch has three batches. ``transformers`` saves and resumes in the middle of an epoch. Lightning saves at its end,
because with a plain data loader it starts an interrupted epoch again.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from conformance.hosts import HOSTS
from transformers import TrainerCallback

from kedit_train import world
from kedit_train.callbacks import (
    KLLocality,
    LowCurvature,
    NormBall,
    NullSpace,
    ParameterScope,
    TokenSmoothing,
    WeightAnchor,
)
from kedit_train.data import EditDataset

TEXTS = [f"The {who} kept a {what} in the old mill." for who in ("baker", "fox", "king") for what in ("coin", "rope")]


class Kill(TrainerCallback, L.Callback):
    """Kill the process at the end of step 5, one or two steps after the last checkpoint."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def callbacks() -> list[Any]:
    return [
        ParameterScope(layers="2-3", modules="mlp.down_proj"),
        TokenSmoothing(),
        KLLocality(texts=TEXTS, batch_size=2),
        NormBall(1e-2),
        WeightAnchor(strength=0.1),
        NullSpace(texts=TEXTS, batch_size=2),
        LowCurvature(texts=TEXTS, batch_size=2),
    ]


def train(host: str, folder: Path, *, killed: bool = False, resume: bool = False, steps: int = 7) -> dict[str, Any]:
    torch.manual_seed(0)
    model, tokenizer = world.load()
    edits, used = EditDataset(world.edits(n=12)), [*callbacks(), *([Kill()] if killed else [])]
    if host == "Lightning":
        from lightning.pytorch.callbacks import ModelCheckpoint

        saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=3, save_top_k=-1, filename="{step}")
        options: dict[str, Any] = {"enable_checkpointing": True}
        if resume:
            options["ckpt_path"] = str(folder / "step=3.ckpt")
        HOSTS[host](model, tokenizer, edits, [*used, saver], steps, **options)
    else:
        options = {"output_dir": str(folder), "save_strategy": "steps", "save_steps": 2, "resume": resume}
        HOSTS[host](model, tokenizer, edits, used, steps, **options)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]), killed=True)
