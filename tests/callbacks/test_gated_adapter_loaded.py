"""A saved gated adapter is loaded with its own gate; it is not trained further, and a wrong folder is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from callbacks.gated import LORA, RECIPE, TEXTS, adapted, save

from kedit_train import EditDataset, EditModule, EditSFTConfig, EditSFTTrainer, load_model, world
from kedit_train.callbacks import GatedAdapter, TokenLoss
from kedit_train.cli import recipe, sft
from kedit_train.core.gate.adapter_folder import remove_stale_gate
from kedit_train.core.gate.gate import Gate, find_gate
from kedit_train.errors import EditError
from kedit_train.modes import TrainLoop


def test_a_gate_is_never_used_with_another_adapter(tmp_path):
    model = save(tmp_path / "new")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).add_(1.0)
    find_gate(model).remove()  # type: ignore[union-attr]
    model.save_pretrained(tmp_path / "new")
    message = "is the gate of other adapter weights, so it cannot be used with the weights in this folder"
    with pytest.raises(EditError, match=message) as error:
        load_model(str(tmp_path / "new"))
    assert "\n" not in str(error.value)
    remove_stale_gate(model, tmp_path / "new")
    assert find_gate(load_model(str(tmp_path / "new"))[0]) is None


def test_a_gated_adapter_or_a_second_adapter_is_not_trained(tmp_path):
    model = save(tmp_path / "gated")
    for one in (str(tmp_path / "gated"), model):
        args = EditSFTConfig(str(tmp_path / "runs"), use_cpu=True, bf16=False, token_loss={})
        with pytest.raises(EditError, match=r"^EditSFTTrainer: .* is a gated adapter, which cannot be trained again"):
            EditSFTTrainer(one, args=args, edits=world.edits(2))
    adapted(world.load()[0]).save_pretrained(tmp_path / "plain")
    EditDataset(world.edits(2)).save(tmp_path / "edits.jsonl")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    for name, lora, message in (
        ("gated", None, "is a gated adapter, which cannot be trained again"),
        ("gated", LORA, "is a gated adapter, which cannot be trained again"),
        ("plain", LORA, "lora must be None, because .* already has an adapter"),
    ):
        with pytest.raises(EditError, match=message) as error:
            EditModule(str(tmp_path / name), lora=lora)
        assert "\n" not in str(error.value)
        arguments = ["--config", str(RECIPE), "--model.name", str(tmp_path / name)]
        arguments += ["--data.path", str(tmp_path / "edits.jsonl"), "--data.texts", str(tmp_path / "texts.txt")]
        with pytest.raises(EditError, match=message):
            sft.build(recipe.parse([*arguments, *(["--model.lora", "null"] if lora is None else [])]))


def test_a_loaded_gated_adapter_is_not_edited_in_a_plain_loop(tmp_path):
    save(tmp_path / "gated")
    model, tokenizer = load_model(str(tmp_path / "gated"))
    edits = EditDataset(world.edits(2))
    for callbacks in ([GatedAdapter(TEXTS, edits=edits), TokenLoss()], [TokenLoss()]):
        message = f"^{type(callbacks[0]).__name__}: the model already has an adapter with a gate \\(GatedAdapter\\)"
        with pytest.raises(EditError, match=message):
            TrainLoop(tokenizer, callbacks=callbacks, epochs=1)(model, edits)


def test_a_gate_that_cannot_be_read_is_an_error(tmp_path):
    save(tmp_path / "new")
    gate, weights = tmp_path / "new" / "gate.safetensors", tmp_path / "new" / "adapter_model.safetensors"
    stored = gate.read_bytes()
    for make in (lambda: gate.symlink_to(tmp_path / "gone"), gate.mkdir):
        gate.unlink()
        make()
        with pytest.raises(EditError, match=r"gate\.safetensors") as error:
            load_model(str(tmp_path / "new"))
        assert "\n" not in str(error.value)
    gate.rmdir()
    gate.write_bytes(stored)
    weights.unlink()
    with pytest.raises(EditError, match="has a gate, but no adapter weights"):
        Gate.load(tmp_path / "new")


def test_an_adapter_whose_base_is_an_adapter_is_refused(tmp_path):
    save(tmp_path / "gated")
    config = json.loads((tmp_path / "gated" / "adapter_config.json").read_text())
    for base in ("gated", "other"):
        folder = tmp_path / base
        folder.mkdir(exist_ok=True)
        changed = {**config, "base_model_name_or_path": str(tmp_path / "gated")}
        (folder / "adapter_config.json").write_text(json.dumps(changed))
        with pytest.raises(EditError, match="is itself an adapter; set base_model_name") as error:
            load_model(str(folder))
        assert "\n" not in str(error.value)


def hub_cache(root: Path, folder: Path, files: list[str]) -> Path:
    """Put some files of a folder into a cache of the hub, as the repository me/mine; return the snapshot."""
    repository, commit = root / "models--me--mine", "a" * 40
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for name in files:
        shutil.copy(folder / name, snapshot / name)
    return snapshot


@pytest.mark.parametrize("case", ["gated", "plain", "unknown"])
def test_an_adapter_on_the_hub_is_loaded_with_its_gate(tmp_path, monkeypatch, case):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model = save(tmp_path / "gated")
    files = [name for name in os.listdir(tmp_path / "gated") if case == "gated" or not name.startswith("gate")]
    snapshot = hub_cache(tmp_path / "hub", tmp_path / "gated", files)
    if case == "unknown":
        with pytest.raises(
            EditError, match="'me/mine' is in the download cache, but only the hub knows whether it has a gate"
        ):
            load_model("me/mine")
    if case == "plain":
        # The library writes this file if the hub has answered that the repository has no such file.
        missing = snapshot.parents[1] / ".no_exist" / snapshot.name
        missing.mkdir(parents=True)
        (missing / "gate.safetensors").touch()
    loaded, tokenizer = load_model("me/mine" if case != "unknown" else str(snapshot))
    assert (find_gate(loaded) is not None) == (case == "gated")
    if case == "gated":
        batch = tokenizer([edit.prompt for edit in world.edits(2)], return_tensors="pt", padding=True)
        with torch.no_grad():
            assert torch.equal(loaded(**batch).logits, model(**batch).logits)
