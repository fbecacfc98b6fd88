"""GatedAdapter: the files that it writes, and when a folder keeps its earlier files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import pytest
import torch
from callbacks.gated import LORA, RECIPE, TEXTS, adapted, edited_world, save, train
from peft import PeftModel

from kedit_train import EditDataModule, EditDataset, EditModule, load_model, world
from kedit_train.callbacks import GatedAdapter, ParameterScope
from kedit_train.cli import sft
from kedit_train.cli.kedit import main
from kedit_train.core.gate.gate import Gate, find_gate
from kedit_train.core.gate.gate_file import read_gate, save_gate
from kedit_train.errors import EditError


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any, GatedAdapter, Path]:
    return edited_world(tmp_path_factory.mktemp("gated") / "adapter")


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
    assert "at the input of block 2 lies within the radius of one of 24 keys" in shown
    for arguments, message in (
        (["apply", str(folder), "world", str(tmp_path / "out")], "cannot be written as the weights of a checkpoint"),
        (["eval", str(folder), str(file), "--against", "world", "--full"], "remove --full"),
        (["eval", "world", str(file), "--against", str(folder), "--full"], "remove --full"),
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


def test_other_folders_and_links_are_refused(tmp_path):
    plain = tmp_path / "plain"
    adapted(world.load()[0]).save_pretrained(plain)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name, message in (
        ("plain", "exists and is not the folder of an earlier gated adapter"),
        ("notes", "exists and is not the folder of an earlier gated adapter"),
        ("link", "is a symbolic link; pass the folder itself"),
    ):
        with pytest.raises(EditError, match=rf"^GatedAdapter: path='.*{name}' {message}") as error:
            save(tmp_path / name)
        assert "\n" not in str(error.value)
    for name in ("notes/notes.txt/new", "notes/notes.txt/deeper/new"):
        with pytest.raises(
            EditError, match=rf"^GatedAdapter: path='.*{name}' cannot be created, because one of its parent folders is"
        ):
            save(tmp_path / name)
    assert not any((tmp_path / "target").iterdir())
    assert (tmp_path / "notes" / "notes.txt").read_text() == "mine"


def test_an_earlier_gated_adapter_is_replaced_and_other_files_stay(tmp_path):
    folder, outside = tmp_path / "new", tmp_path / "outside.json"
    gate = find_gate(save(folder))
    (folder / "notes.txt").write_text("mine")
    outside.write_text("not yours")
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").symlink_to(outside)
    # A file of the earlier adapter that the new one does not have.
    (folder / "chat_template.jinja").write_text("old")
    save_gate(gate, folder, [*read_gate(folder).files, "chat_template.jinja", "../outside.json"])
    with pytest.raises(EditError, match=r"the adapter file '\.\./outside\.json' leads out of"):
        save(folder, steps=2)
    save_gate(gate, folder, [*read_gate(folder, other_adapter=True).files[:-1]])
    model = save(folder, steps=2)
    assert (folder / "notes.txt").read_text() == "mine"
    assert outside.read_text() == "not yours"
    assert not (folder / "chat_template.jinja").exists()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    loaded, tokenizer = load_model(str(folder))
    batch = tokenizer([edit.prompt for edit in world.edits(2)], return_tensors="pt", padding=True)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_a_failed_save_leaves_the_earlier_adapter(tmp_path, monkeypatch):
    folder = tmp_path / "new"
    save(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(type(world.load()[1]), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save(folder, steps=2)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_every_way_to_save_the_model_saves_the_gate(tmp_path):
    model = save(tmp_path / "new")
    for name, arguments in (("again", {}), ("pickled", {"safe_serialization": False})):
        model.save_pretrained(tmp_path / name, **arguments)
        gate, own = Gate.load(tmp_path / name), cast(Gate, find_gate(model))
        assert torch.equal(gate.keys, own.keys)
        assert torch.equal(gate.radii, own.radii)
    model.save_pretrained(tmp_path / "other rank", is_main_process=False)
    assert not (tmp_path / "other rank" / "gate.safetensors").exists()


@pytest.mark.parametrize("main_process", [True, False])
def test_only_the_main_process_of_a_recipe_in_trl_touches_the_gate_file(tmp_path, monkeypatch, main_process):
    (tmp_path / "gate.safetensors").write_text("an earlier gate")
    for model in (adapted(world.load()[0]), save(tmp_path / "new")):
        trainer = SimpleNamespace(
            model=model,
            callback_handler=SimpleNamespace(callbacks=[]),
            args=SimpleNamespace(world_size=1),
            train=lambda: None,
            save_model=lambda path: None,
            is_world_process_zero=lambda: main_process,
        )
        monkeypatch.setattr(sft, "build", lambda config, trainer=trainer: trainer)
        before = (tmp_path / "gate.safetensors").exists()
        sft.main(["--config", str(RECIPE), "--model.save_path", str(tmp_path)])
        assert (tmp_path / "gate.safetensors").exists() == (before and not main_process)


def test_a_model_without_a_name_cannot_be_saved_as_an_adapter(tmp_path):
    model, tokenizer = world.load()
    model.config._name_or_path = model.name_or_path = ""
    edits = EditDataset(world.edits(2))
    gated = GatedAdapter(TEXTS, edits=edits, path=str(tmp_path / "new"))
    with pytest.raises(EditError, match=r"^GatedAdapter: path= stores .* was not loaded from a folder or the hub"):
        train(adapted(model), tokenizer, edits, [gated], 1)
    train(adapted(world.load()[0]), tokenizer, edits, [GatedAdapter(TEXTS, edits=edits)], 1)
