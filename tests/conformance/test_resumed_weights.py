"""A correct resume is exact, also in bf16, and a resume with other weights than those of the checkpoint is refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.hosts import HOSTS, adamw, collator
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file

from kedit_train import world
from kedit_train.callbacks import NormBall, ParameterScope, editing
from kedit_train.data import EditDataset
from kedit_train.errors import EditError

# With 12 edits and batches of 4, an epoch has three steps. Lightning resumes exactly only at the end of an epoch.
EDITS, SAVED, STEPS = 12, 3, 6
IN_SCOPE, FROZEN = "model.layers.2.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"
OTHER = {
    IN_SCOPE: r"must have the weights of the checkpoint",
    FROZEN: rf"{re.escape(FROZEN)} is not trained \(it is outside the scope\), but its values differ",
}
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


def callbacks() -> list[Any]:
    return [ParameterScope(layers="2-3", modules="mlp.down_proj"), NormBall(1e-2)]


def in_transformers(model: Any, tokenizer: Any, edits: Any, folder: Path, resume: bool) -> None:
    options = {"output_dir": str(folder), "save_strategy": "steps", "save_steps": SAVED}
    resumed = str(folder / f"checkpoint-{SAVED}") if resume else False
    HOSTS["Trainer"](model, tokenizer, edits, callbacks(), STEPS, resume=resumed, **options)


def in_lightning(model: Any, tokenizer: Any, edits: Any, folder: Path, resume: bool) -> None:
    saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=SAVED, save_top_k=-1, filename="{step}")
    options: dict[str, Any] = {"ckpt_path": str(folder / f"step={SAVED}.ckpt")} if resume else {}
    HOSTS["Lightning"](model, tokenizer, edits, [*callbacks(), saver], STEPS, enable_checkpointing=True, **options)


def in_a_loop(model: Any, tokenizer: Any, edits: Any, folder: Path, resume: bool) -> None:
    rows, put = edits.encode(tokenizer), collator(tokenizer)
    with editing(model, callbacks(), tokenizer=tokenizer) as edit:
        optimizer = adamw(edit.parameters())
        if resume:
            state = torch.load(folder / "saved.pt", weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            edit.load_state_dict(state["edit"])
        for number in range(SAVED if resume else 0, STEPS):
            optimizer.zero_grad()
            edit.before_step()
            model(**put(rows[2 * number : 2 * number + 2])).loss.backward()
            optimizer.step()
            if number + 1 == SAVED and not resume:
                folder.mkdir(exist_ok=True)
                parts = {"model": model, "optimizer": optimizer, "edit": edit}
                torch.save({name: part.state_dict() for name, part in parts.items()}, folder / "saved.pt")


def change_transformers(folder: Path, name: str) -> None:
    path = folder / f"checkpoint-{SAVED}" / "model.safetensors"
    weights = load_file(path)
    save_file({key: change(key, value, name) for key, value in weights.items()}, path, metadata={"format": "pt"})


def change_lightning(folder: Path, name: str) -> None:
    path = folder / f"step={SAVED}.ckpt"
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["state_dict"] = {
        key: change(key.removeprefix("network."), value, name) for key, value in checkpoint["state_dict"].items()
    }
    torch.save(checkpoint, path)


def change_loop(folder: Path, name: str) -> None:
    state = torch.load(folder / "saved.pt", weights_only=True)
    state["model"] = {key: change(key, value, name) for key, value in state["model"].items()}
    torch.save(state, folder / "saved.pt")


def change(key: str, value: torch.Tensor, name: str) -> torch.Tensor:
    """Swap two rows of one weight, which changes neither its values nor their sum."""
    return value[[1, 0, *range(2, len(value))]].clone() if key == name else value


LOOPS: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    "Trainer": (in_transformers, change_transformers),
    "Lightning": (in_lightning, change_lightning),
    "loop": (in_a_loop, change_loop),
}


def run(host: str, folder: Path, dtype: torch.dtype, resume: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model, tokenizer = world.load()
    model.to(dtype)
    LOOPS[host][0](model, tokenizer, EditDataset(world.edits(n=EDITS)), folder, resume)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("host", LOOPS)
def test_a_bf16_run_resumes_bit_for_bit_and_refuses_other_weights(host: str, tmp_path: Path) -> None:
    folder, kept = tmp_path / "run", tmp_path / "kept"
    whole = run(host, folder, torch.bfloat16)
    shutil.copytree(folder, kept)
    resumed = run(host, folder, torch.bfloat16, resume=True)
    assert {value.dtype for value in resumed.values()} == {torch.bfloat16}
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    for name, message in OTHER.items():
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        LOOPS[host][1](folder, name)
        with pytest.raises(EditError, match=message) as error:
            run(host, folder, torch.bfloat16, resume=True)
        assert "\n" not in str(error.value)


def test_a_trainer_refuses_the_weights_of_another_checkpoint(tmp_path: Path) -> None:
    run("Trainer", tmp_path, torch.float32)
    early, late = (tmp_path / f"checkpoint-{step}" / "model.safetensors" for step in (SAVED, STEPS))
    shutil.copy(late, early)
    with pytest.raises(EditError, match=r"must have the weights of the checkpoint.*kedit_state\.safetensors are from"):
        run("Trainer", tmp_path, torch.float32, resume=True)


def test_a_bf16_checkpoint_saved_after_fit_can_be_resumed(tmp_path: Path) -> None:
    """At the end of fit, the weights are rounded to bf16, so they differ from the fp32 weights of the last step."""
    edits, path = EditDataset(world.edits(n=EDITS)), tmp_path / "end.ckpt"

    def fit(steps: int, **options: Any) -> Any:
        model, tokenizer = world.load()
        return HOSTS["Lightning"](model.to(torch.bfloat16), tokenizer, edits, callbacks(), steps, **options)

    fit(SAVED).save_checkpoint(path)
    assert fit(SAVED + 1, ckpt_path=str(path)).global_step == SAVED + 1
    checkpoint = torch.load(path, weights_only=False)
    key = f"network.{IN_SCOPE}"
    checkpoint["state_dict"][key] = change(key, checkpoint["state_dict"][key], key)
    torch.save(checkpoint, path)
    with pytest.raises(EditError, match=OTHER[IN_SCOPE]):
        fit(SAVED + 1, ckpt_path=str(path))
