"""GatedAdapter: the files it writes, and what reads them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from callbacks.gated import LORA, TEXTS, adapted, train
from peft import PeftModel

from kedit_train import EditDataModule, EditDataset, EditModule, load_model, world
from kedit_train.callbacks import (
    GatedAdapter,
    ParameterScope,
    TokenSmoothing,
)
from kedit_train.cli.kedit import main
from kedit_train.core.gate.gate import find_gate
from kedit_train.errors import EditError


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any, GatedAdapter, Path]:
    """The bundled model after 24 edits with OverTone: the model, its tokenizer, the edits, the callback, its folder."""
    torch.manual_seed(0)
    model, tokenizer = world.load()
    edits, folder = EditDataset.load("world"), tmp_path_factory.mktemp("gated") / "adapter"
    model = adapted(model)
    gated = GatedAdapter("world", neighbors=8, edits=edits, path=str(folder), limit=200)
    train(model, tokenizer, edits, [gated, TokenSmoothing(epsilon=0.05, reduction="sample")], 60)
    return model.eval(), tokenizer, edits, gated, folder


def test_the_folder_is_an_ordinary_adapter_and_the_gate(edited):
    model, tokenizer, _, _, folder = edited
    assert {"adapter_config.json", "adapter_model.safetensors", "gate.safetensors"} <= set(os.listdir(folder))
    batch = tokenizer(world.prose(1)[0], return_tensors="pt")
    with torch.no_grad():
        ordinary = PeftModel.from_pretrained(world.load()[0], str(folder)).eval()(**batch).logits
        loaded, _ = load_model(str(folder))
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
        assert not torch.allclose(ordinary, loaded(**batch).logits, atol=1e-2)
        find_gate(loaded).remove()  # type: ignore[union-attr]
        assert torch.equal(loaded(**batch).logits, ordinary)


def test_kedit_eval_knows_the_gate_and_kedit_apply_says_why_not(edited, tmp_path, capsys):
    _, _, edits, _, folder = edited
    file = tmp_path / "edits.jsonl"
    EditDataset(edits[:6]).save(file)
    assert main(["eval", str(folder), str(file), "--against", "world", "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["metrics"]["reliability"]["generated"]["value"] == 1.0
    assert report["metrics"]["locality"]["generated"]["value"] == 1.0
    assert report["meta"]["gate"] == {"keys": 24, "layer": 2}
    shown = " ".join(capsys.readouterr().out.split())
    assert "the adapter has a gate (24 keys, input of block 2): rephrases outside of every radius get" in shown
    for arguments, message in (
        (["apply", str(folder), "world", str(tmp_path / "out")], "cannot be written as the weights of a checkpoint"),
        (["eval", str(folder), str(file), "--against", "world", "--full"], "remove --full"),
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "\n" not in error


def test_a_module_with_a_save_path_saves_the_gate_next_to_the_adapter(tmp_path):
    edits = EditDataset(world.edits(2))
    edits.save(tmp_path / "edits.jsonl")
    module = EditModule(lora={**LORA, "layers_to_transform": [5]}, save_path=str(tmp_path / "model"))
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callbacks = [GatedAdapter(TEXTS), ParameterScope(5, modules="down_proj")]
    trainer = L.Trainer(max_steps=2, callbacks=callbacks, enable_model_summary=False, **options)
    trainer.fit(module, EditDataModule(str(tmp_path / "edits.jsonl"), append_eos=True))
    loaded, tokenizer = load_model(str(tmp_path / "model"))
    batch = tokenizer([edits[0].prompt], return_tensors="pt")
    assert find_gate(loaded) is not None
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, module.model.eval()(**batch).logits)
        base = world.load()[0](**batch).logits
        assert torch.equal(loaded(**batch).logits[:, :-1], base[:, :-1])
        assert not torch.equal(loaded(**batch).logits[:, -1], base[:, -1])


def test_an_existing_adapter_is_replaced_and_another_folder_is_not(tmp_path):
    model, tokenizer = world.load()
    edits = EditDataset(world.edits(2))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        EditError, match=r"^GatedAdapter: path='.*' exists and is not the folder of an earlier gated adapter"
    ):
        train(adapted(model), tokenizer, edits, [GatedAdapter(TEXTS, edits=edits, path=str(tmp_path))], 1)
    folder = tmp_path / "new"
    for _ in range(2):
        model, tokenizer = world.load()
        train(adapted(model), tokenizer, edits, [GatedAdapter(TEXTS, edits=edits, path=str(folder))], 1)
    assert find_gate(load_model(str(folder))[0]) is not None
