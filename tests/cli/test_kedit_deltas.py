"""The verbs apply, revert and merge."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kedit_train import EditDelta, EditError, load_model, world
from kedit_train.cli.kedit import merge

Kedit = Callable[..., tuple[int, str, str]]
WEIGHT = "model.layers.4.mlp.down_proj.weight"


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_apply_and_revert_give_the_same_files(kedit: Kedit, edited_world: Path, tmp_path: Path) -> None:
    delta, out, back = edited_world / "edit.safetensors", tmp_path / "out", tmp_path / "back"
    code, output, _ = kedit("apply", delta, "world", out)
    assert (code, f"kedit eval {out}" in output) == (0, True)
    assert weights(out) == weights(edited_world / "model")
    code, output, _ = kedit("revert", delta, out, back, "--json")
    found = json.loads(output)
    assert (code, found["state"], found["tensors"], found["out"]) == (0, "base", 1, str(back))
    assert weights(back) == weights(world.path())


def test_dtype_applies_an_fp32_delta_to_a_bf16_checkpoint(kedit: Kedit, edited_world: Path, tmp_path: Path) -> None:
    model, tokenizer = world.load()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    tokenizer.save_pretrained(tmp_path / "bf16")
    wide = model.to(torch.float32)
    base = copy.deepcopy(wide)
    with torch.no_grad():
        wide.get_parameter(WEIGHT)[3] += 0.01
    EditDelta.between(base, wide).save(tmp_path / "edit.safetensors")
    code, _, err = kedit("apply", tmp_path / "edit.safetensors", tmp_path / "bf16", tmp_path / "out")
    assert (code, "--dtype float32" in err, (tmp_path / "out").exists()) == (1, True, False)
    words = ("apply", tmp_path / "edit.safetensors", tmp_path / "bf16", tmp_path / "out", "--dtype", "float32")
    assert kedit(*words)[0] == 0
    found, wanted = load_file(tmp_path / "out" / "model.safetensors"), wide.state_dict()
    assert all(torch.equal(value.view(torch.int32), wanted[name].view(torch.int32)) for name, value in found.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16", "edit.safetensors", "out"]


def test_a_delta_of_a_quantized_model_is_refused_in_one_line(kedit: Kedit, tmp_path: Path) -> None:
    base = {WEIGHT: torch.zeros(4, 4, dtype=torch.int8)}
    EditDelta.between(base, {WEIGHT: torch.ones(4, 4, dtype=torch.int8)}).save(tmp_path / "edit.safetensors")
    code, _, err = kedit("apply", tmp_path / "edit.safetensors", "world", tmp_path / "out")
    assert (code, "--dtype" in err, len(err.strip().splitlines())) == (1, False, 1)
    assert "edited a quantized model, so train again without quantization" in err


def test_a_pickled_checkpoint_that_cannot_be_read_gives_one_line(kedit: Kedit, tmp_path: Path) -> None:
    model, tokenizer = world.load()
    model.config.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for content in (b"not a pickle", b"", b"\x80\x02]q\x00.", b"PK\x03\x04 no zip", b"cos\nsystem\n(S'true'\ntR."):
        (tmp_path / "model" / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(EditError, match="cannot be loaded as a causal language model") as error:
            load_model(str(tmp_path / "model"))
        assert "\n" not in str(error.value)


def test_merge_scales_negates_and_adds(kedit: Kedit, edited_world: Path, tmp_path: Path) -> None:
    delta, base = edited_world / "edit.safetensors", load_file(world.path() / "model.safetensors")
    step = load_file(edited_world / "model" / "model.safetensors")[WEIGHT] - base[WEIGHT]
    code, output, _ = kedit("merge", delta, "--weights", "-0.5", "-o", tmp_path / "back.safetensors", "--json")
    assert (code, json.loads(output)["weights"]) == (0, [-0.5])
    made = EditDelta.load(tmp_path / "back.safetensors")
    assert torch.equal(made.changes[WEIGHT].after, base[WEIGHT] + -0.5 * step)
    code, output, _ = kedit("merge", delta, tmp_path / "back.safetensors", "-o", tmp_path / "sum.safetensors")
    assert (code, "cosine -1.000, opposite; the sum may lose an edit" in output) == (0, True)
    # A positive cosine does not show that the sum contains both edits: they may contradict each other.
    code, output, _ = kedit("merge", delta, delta, "-o", tmp_path / "twice.safetensors")
    assert code == 0
    assert "cosine 1.000, similar; " in output
    assert "not if they give different answers to the same prompts" in output
    summed = EditDelta.load(tmp_path / "sum.safetensors")
    assert torch.allclose(summed.difference(WEIGHT), 0.5 * step, atol=1e-6)
    assert summed.meta["configuration"]["merged"] == ["edit.safetensors", "back.safetensors"]
    assert summed.meta["edits"]["count"] == 6
    code, _, err = kedit("merge", delta, "-o", tmp_path / "sum.safetensors")
    assert (code, "--force" in err) == (1, True)
    words = ("merge", delta, tmp_path / "back.safetensors", "--method", "dare", "--density", 0.5, "--seed", 3)
    assert kedit(*words, "-o", tmp_path / "sum.safetensors", "--force")[0] == 0
    assert EditDelta.load(tmp_path / "sum.safetensors").meta["configuration"]["seed"] == 3


@pytest.mark.parametrize(
    ("weights", "advice", "subtracted"),
    [
        (["1", "-1"], "similar; the subtraction is likely to weaken the edit that is added, too", 1),
        (["-1", "-1"], "similar; both are subtracted", 2),
        (["1", "0"], "similar; a delta with weight 0 has no effect", 0),
        (["1", "1"], "similar; the sum is likely to contain both edits if they agree", 0),
        (["-1"], "is subtracted: the model moves away from this edit", 1),
    ],
)
def test_merge_says_what_a_negative_weight_does(
    weights: list[str], advice: str, subtracted: int, kedit: Kedit, edited_world: Path, tmp_path: Path
) -> None:
    words = ["merge", *[edited_world / "edit.safetensors"] * len(weights), "--weights", *weights]
    code, output, _ = kedit(*words, "-o", tmp_path / "new.safetensors")
    assert (code, advice in output, output.count(" is subtracted: ")) == (0, True, subtracted)
    assert "the sum" not in output or subtracted == 0


@pytest.mark.parametrize(
    ("cosine", "kind"), [(0.0, "irrelevant"), (0.1, "irrelevant"), (0.11, "similar"), (-0.11, "opposite")]
)
def test_a_difference_is_not_called_a_sum(cosine: float, kind: str) -> None:
    plus, minus = merge._relation(cosine, 0.5, 2.0), merge._relation(cosine, 1.0, -1.0)
    assert (plus["kind"], minus["kind"]) == (kind, kind)
    assert (plus["add"], minus["add"]) == (kind == "irrelevant", False)
    assert "sum" in plus["advice"]
    assert "sum" not in minus["advice"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "none.safetensors"], "does not exist"),
        (["show", "foreign.safetensors"], "is not a delta file"),
        (["show", "edits.jsonl"], "not a safetensors file"),
        (["apply", "edit.safetensors", "model", "new"], "already applied"),
        (["revert", "edit.safetensors", "world", "new"], "cannot be reverted, because the tensor already has"),
        (["apply", "edit.safetensors", "world", "model"], "already exists"),
        (
            ["apply", "edit.safetensors", "no/such", "new"],
            "give the folder of a checkpoint, the hub name of a model that you can download, or 'world'",
        ),
        (["apply", "edit.safetensors", "edits.jsonl", "new"], "is a file"),
        (["apply", "edit.safetensors", ".", "new"], "save_pretrained"),
        (["merge", "edit.safetensors", "--weights", "1", "2", "-o", "new.safetensors"], "one weight per delta"),
        (["merge", "edit.safetensors", "-o", "new.bin"], ".safetensors"),
    ],
)
def test_an_error_is_one_line_and_leaves_no_file(
    kedit: Kedit, edited_world: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(edited_world)
    save_file({"w": torch.ones(2)}, "foreign.safetensors")
    before = sorted(path.name for path in edited_world.iterdir())
    code, out, err = kedit(*words)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: ")
    assert message in err
    assert sorted(path.name for path in edited_world.iterdir()) == before


def test_apply_on_another_model_says_what_differs_and_what_to_do(
    kedit: Kedit, edited_world: Path, tmp_path: Path
) -> None:
    file, model = edited_world / "edit.safetensors", load_file(world.path() / "model.safetensors")
    cases = {
        "values": (
            model[WEIGHT] + 1,
            "has neither the values before the edit nor the values after the edit (compared by SHA-256)",
        ),
        "shape": (
            model[WEIGHT][:, :64].contiguous(),
            "is float32 [128, 64] in the model and float32 [128, 352] in the",
        ),
    }
    for name, (value, reason) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        save_file(model | {WEIGHT: value}, folder / "model.safetensors")
        for verb in ("apply", "revert"):
            code, _, err = kedit(verb, file, folder, tmp_path / "out")
            assert (code, err.count("\n")) == (1, 1)
            assert err.startswith(f"error: {file} (made for ")
            assert f" cannot be applied to the model {str(folder)!r}: " in err
            assert reason in err
            assert "use the model for which the delta was made" in err
    assert not (tmp_path / "out").exists()
