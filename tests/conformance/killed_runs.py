"""Short runs that write checkpoints and a delta, and continue from the files of a killed process.

Each run trains 4 steps on 8 edits in 2 batches per epoch, and writes a checkpoint after every second step, which is the
end of an epoch. All paths are relative to the current directory, so that every run writes the same files.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from conformance.hosts import ARGUMENTS, HOSTS, adamw, arguments_of_this_version, collator, take_in_order
from lightning.pytorch.callbacks import ModelCheckpoint

from kedit_train import EditSFTConfig, EditSFTTrainer, world
from kedit_train.callbacks import KLLocality, NormBall, ParameterScope, PrefixCache, SaveDelta, TokenLoss, editing
from kedit_train.data import EditDataset

TEXTS = ["The baker kept a coin in the old mill.", "The fox kept a rope in the old mill."]
STEPS, EVERY, EDITS, BATCH = 4, 2, 8, 4
DELTA = "edit.safetensors"
SCOPE: dict[str, Any] = {"layers": "4-5", "modules": "mlp.down_proj"}
# This is so little memory that every batch of hidden states is written to disk.
CACHE: dict[str, Any] = {"memory_limit": "1KB", "cache_dir": "cache"}


def callbacks() -> list[Any]:
    return [
        ParameterScope(**SCOPE),
        TokenLoss(),
        KLLocality(texts=TEXTS, batch_size=2),
        NormBall(1e-2),
        PrefixCache(**CACHE),
        SaveDelta(DELTA),
    ]


def with_callbacks(host: str) -> Callable[[Any, str | None], None]:
    """Return the run of a trainer from ``HOSTS`` that gets its callbacks as a list."""

    def run(model: Any, checkpoint: str | None) -> None:
        saving = {"output_dir": ".", "save_strategy": "steps", "save_steps": EVERY, "save_total_limit": 1}
        HOSTS[host](
            model,
            loaded()[1],
            edits(),
            callbacks(),
            STEPS,
            resume=checkpoint,
            train_sampling_strategy="sequential",
            **saving,
        )

    return run


def edit_sft_trainer(model: Any, checkpoint: str | None) -> None:
    """Train with a config instead of a list of callbacks, and save the delta of the best step."""
    options = {"output_dir": ".", "save_strategy": "steps", "save_steps": EVERY, "max_steps": STEPS}
    options |= {"train_sampling_strategy": "sequential"}
    args = EditSFTConfig(
        **arguments_of_this_version(ARGUMENTS | options),
        parameter_scope=SCOPE,
        kl_locality={"texts": TEXTS, "batch_size": 2},
        norm_ball={"radius": 1e-2},
        edit_metrics={"every_n_steps": 2, "edits": edits()[:2]},
        save_delta={"path": DELTA, "at": "best"},
    )
    trainer = EditSFTTrainer(model, args=args, edits=edits(), processing_class=loaded()[1])
    take_in_order(trainer, options)
    trainer.train(resume_from_checkpoint=checkpoint)


def lightning_trainer(model: Any, checkpoint: str | None) -> None:
    # From a checkpoint of every_n_epochs=1, Lightning 2.6 does not continue with the next batch.
    saver = ModelCheckpoint(
        dirpath=".", every_n_train_steps=EVERY, filename="checkpoint-{step}", auto_insert_metric_name=False
    )
    HOSTS["Lightning"](
        model,
        loaded()[1],
        edits(),
        [*callbacks(), saver],
        STEPS,
        ckpt_path=checkpoint,
        enable_checkpointing=True,
        default_root_dir=".",
    )


def plain_loop(model: Any, checkpoint: str | None) -> None:
    def save(path: str, state: dict[str, Any]) -> None:
        torch.save(state, f"{path}.part")
        os.replace(f"{path}.part", path)

    loop(
        model,
        checkpoint,
        lambda *objects: objects,
        lambda loss: loss.backward(),
        save,
        lambda path: torch.load(path, weights_only=True),
    )


def fabric_loop(model: Any, checkpoint: str | None) -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    loop(model, checkpoint, fabric.setup, fabric.backward, fabric.save, fabric.load)


def loop(model: Any, checkpoint: str | None, setup: Any, backward: Any, save: Any, load: Any) -> None:
    tokenizer = loaded()[1]
    rows, put = edits().encode(tokenizer), collator(tokenizer)
    model.train()
    with editing(model, callbacks(), tokenizer=tokenizer) as edit:
        wrapped, optimizer = setup(model, adamw(edit.parameters()))
        done = 0
        if checkpoint is not None:
            state = load(checkpoint)
            done = state["step"]
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            edit.load_state_dict(state["edit"])
        for step in range(done, STEPS):
            edit.before_step()
            start = BATCH * step % EDITS
            backward(wrapped(**put(rows[start : start + BATCH])).loss)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % EVERY == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "edit": edit.state_dict()}
                save(f"checkpoint-{step + 1}.ckpt", {**state, "step": step + 1})


RUNS: dict[str, Callable[[Any, str | None], None]] = {
    "Trainer": with_callbacks("Trainer"),
    "SFTTrainer": with_callbacks("SFTTrainer"),
    "EditSFTTrainer": edit_sft_trainer,
    "Lightning": lightning_trainer,
    "loop": plain_loop,
    "Fabric": fabric_loop,
}


@functools.cache
def loaded() -> tuple[Any, Any]:
    """Return the bundled model and its tokenizer, which child processes share."""
    return world.load()


def edits() -> EditDataset:
    return EditDataset(world.edits(n=EDITS))


def train(host: str, checkpoint: str | None = None) -> dict[str, torch.Tensor]:
    """Train in the current directory, from a checkpoint or from the beginning, and return the weights."""
    torch.manual_seed(0)
    model = copy.deepcopy(loaded()[0])
    RUNS[host](model, checkpoint)
    return {name: p.detach() for name, p in model.named_parameters()}


def train_on(host: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Continue from the last usable checkpoint in the current directory, or begin again without one.

    Returns:
        The weights, and one line for each checkpoint that was refused. These checkpoints are deleted.

    Raises:
        AssertionError: a complete checkpoint was refused.
    """
    refused = []
    for checkpoint in sorted(Path().glob("checkpoint-*"), key=_step, reverse=True):
        if checkpoint.suffix == ".safetensors" or checkpoint.suffix == ".part":
            continue
        try:
            return train(host, str(checkpoint)), refused
        except Exception as error:
            if is_complete(checkpoint):
                raise AssertionError(f"{checkpoint} is complete, but was refused") from error
            refused.append(f"{type(error).__name__}: {error}".splitlines()[0])
            shutil.rmtree(checkpoint)
    return train(host), refused


def is_complete(checkpoint: Path) -> bool:
    """Return whether the trainer has written the complete checkpoint. ``trainer_state.json`` is its last file."""
    if checkpoint.is_file():
        return True
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text()))
    except (OSError, ValueError):
        return False


def _step(path: Path) -> int:
    found = re.search(r"\d+", path.name)
    assert found is not None
    return int(found[0])
