"""Deltas on checkpoints: sharded, tied and untrusted ones, with the memory of one tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from delta.tiny import DOWN, equal_bits, state_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kedit_train import EditDelta, EditError

INDEX = "model.safetensors.index.json"
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shard", ["4KB", "1GB"])
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_apply_and_revert_a_checkpoint(dtype, shard, tied, make, edited, tmp_path):
    base, trained = make(dtype, tie_word_embeddings=tied), edited(dtype, tie_word_embeddings=tied)
    with torch.no_grad():
        trained.model.embed_tokens.weight[7] += 1
    base.save_pretrained(tmp_path / "base", max_shard_size=shard)
    (tmp_path / "base" / "README.md").write_text("mine")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"stale")
    delta = EditDelta.between(base, trained)
    out = delta.apply_to_checkpoint(tmp_path / "base", tmp_path / "new" / "edited")
    assert equal_bits(state_of(AutoModelForCausalLM.from_pretrained(out, dtype=dtype)), state_of(trained))
    back = delta.revert_checkpoint(out, tmp_path / "back")
    files = sorted(path.name for path in (tmp_path / "base").iterdir() if path.suffix != ".bin")
    assert sorted(path.name for path in back.iterdir()) == files
    assert (len(files) > 5) == (shard == "4KB")
    for name in files:
        assert (back / name).read_bytes() == (tmp_path / "base" / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "base", "new"]


def test_a_checkpoint_with_a_tied_weight_stored_twice(make, tmp_path):
    base, trained = make(tie_word_embeddings=True), make(tie_word_embeddings=True)
    with torch.no_grad():
        trained.lm_head.weight += 1
    (tmp_path / "base").mkdir()
    save_file({n: t.clone() for n, t in base.state_dict().items()}, tmp_path / "base" / "model.safetensors")
    out = EditDelta.between(base, trained).apply_to_checkpoint(tmp_path / "base", tmp_path / "out")
    assert equal_bits(load_file(out / "model.safetensors"), state_of(trained))


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_written(make, edited, tmp_path):
    base, trained = make(), edited()
    delta = EditDelta.between(base, trained)
    trained.save_pretrained(tmp_path / "edited")
    make(torch.bfloat16).save_pretrained(tmp_path / "half")
    make(num_hidden_layers=1).save_pretrained(tmp_path / "short")
    for name, message in [
        ("edited", "the delta is already applied"),
        ("half", "is bfloat16 .* in the model and float32"),
        ("short", f"the model has no tensor '{DOWN}'"),
        ("nowhere", "does not exist; give the folder"),
    ]:
        with pytest.raises(EditError, match=message):
            delta.apply_to_checkpoint(tmp_path / name, tmp_path / "out")
    with pytest.raises(EditError, match="already exists"):
        delta.revert_checkpoint(tmp_path / "edited", tmp_path / "half")
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x.bin", ".h.safetensors"]
)
def test_shards_outside_of_the_folder_are_refused(name, make, edited, tmp_path):
    make().save_pretrained(tmp_path / "base", max_shard_size="4KB")
    make().save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    path = tmp_path / "base" / INDEX
    index = json.loads(path.read_text())
    index["weight_map"][DOWN] = name
    path.write_text(json.dumps(index))
    with pytest.raises(EditError, match=r"must name only \.safetensors files in the same folder"):
        EditDelta.between(make(), edited()).apply_to_checkpoint(tmp_path / "base", tmp_path / "out")


def test_a_damaged_index_or_shard_is_refused(make, edited, tmp_path):
    delta = EditDelta.between(make(), edited())
    folder = tmp_path / "base"
    make().save_pretrained(folder, max_shard_size="4KB")
    index = (folder / INDEX).read_text()
    for text, message in [
        ("{", "is not a valid shard index"),
        ("[" * 100_000, "is not a valid shard index"),
        ('{"weight_map": 3}', "is not a valid shard index"),
        (index.replace(DOWN, "elsewhere"), "does not match its shards"),
    ]:
        (folder / INDEX).write_text(text)
        with pytest.raises(EditError, match=message):
            delta.apply_to_checkpoint(folder, tmp_path / "out")
    (folder / INDEX).write_text(index)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(EditError, match="is cut short or damaged: the file has"):
        delta.apply_to_checkpoint(folder, tmp_path / "out")
    shard.unlink()
    with pytest.raises(EditError, match="does not exist"):
        delta.apply_to_checkpoint(folder, tmp_path / "out")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """A checkpoint of 200 MB in shards of 50 MB with tensors of 12.5 MB."""
    script = [sys.executable, str(ROOT / "tests" / "benchmarks" / "delta_memory.py"), str(tmp_path)]
    script += ["--gigabytes", "0.2", "--shard-gigabytes", "0.05", "--tensor-megabytes", "12.5"]
    # The test must not write into the results of the repository.
    results = tmp_path / "results.md"
    script += ["--results", str(results)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.strip("| ").split(" | ") for line in results.read_text().splitlines() if line.startswith("| ")]
    found = dict(zip(*rows, strict=True))
    assert (found["shards"], found["applied exact"], found["reverted"]) == ("4", "yes", "yes")
    # A few copies of one tensor; a whole shard would take 50 MB.
    assert int(found["peak"].removesuffix(" MB")) < 50
