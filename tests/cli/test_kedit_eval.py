"""The verb eval, on checkpoints, deltas and adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kedit_train import EditDataset, Report, evaluate, world
from kedit_train.evaluation import EvaluationOptions
from kedit_train.evaluation.reporting.model_card import BEGIN, END

Kedit = Callable[..., tuple[int, str, str]]


def test_a_checkpoint_and_its_delta_get_the_scores_of_evaluate(kedit: Kedit, edited_world: Path) -> None:
    edits = edited_world / "two.jsonl"
    EditDataset.load(edited_world / "edits.jsonl", limit=2).save(edits)
    code, output, _ = kedit("eval", edited_world / "model", edits, "--against", "world", "--json")
    assert code == 0
    by_folder = json.loads(output)
    _, output, _ = kedit("eval", edited_world / "edit.safetensors", edits, "--against", "world", "--json")
    by_file = json.loads(output)
    dataset = EditDataset.load(edits)
    model, tokenizer = world.load()
    before = evaluate(model, tokenizer, dataset, progress=False)
    from transformers import AutoModelForCausalLM

    edited = AutoModelForCausalLM.from_pretrained(edited_world / "model")
    wanted = evaluate(edited, tokenizer, dataset, unedited=before, progress=False).to_dict()
    for found in (by_folder, by_file):
        for part in ("metrics", "unedited", "answers"):
            assert found[part] == wanted[part]
    assert by_folder["metrics"]["reliability"]["generated"]["value"] == 1.0
    assert by_folder["metrics"]["locality"]["compared_with"] == "unedited model"


def test_all_output_files_are_written(kedit: Kedit, edited_world: Path, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_bytes(b"---\nlicense: mit\n---\r\n# Mine")
    words = ["eval", "world", edited_world / "edits.jsonl", "--delta", edited_world / "edit.safetensors", "--full"]
    words += ["--json", tmp_path / "e.json", "--markdown", tmp_path / "e.md", "--plots", tmp_path / "plots"]
    code, output, _ = kedit(*words, "--html", tmp_path / "new" / "e.html", "--card", card)
    assert code == 0
    page = (tmp_path / "new" / "e.html").read_text(encoding="utf-8")
    assert "Did it work?" in page
    assert "layer 4" in page
    report = Report.load(tmp_path / "e.json")
    assert report.metrics["weight_drift"]["relative"].value > 0.0
    assert report.metrics["locality"]["kl"].n > 0
    assert "# Evaluation" in (tmp_path / "e.md").read_text()
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"reliability_locality.png", "positions.png"}
    text = card.read_bytes()
    assert text.startswith(b"---\nlicense: mit\n---\r\n# Mine\n\n" + BEGIN.encode())
    for part in ("optimizer steps: 20", "2502.00602", "2509.22072", "bit for bit"):
        assert part.encode() in text
    assert all(f"saved: {tmp_path / name}" in output for name in ("e.json", "e.md", "README.md"))
    # Again: the section is replaced, and the report of before stands in for the model.
    code, _, _ = kedit("eval", "world", edited_world / "edits.jsonl", "--against", tmp_path / "e.json", "--card", card)
    assert code == 0
    assert card.read_text().count(BEGIN) == card.read_text().count(END) == 1
    assert "optimizer steps" not in card.read_text()


def test_edits_without_probes_have_no_score(kedit: Kedit, tmp_path: Path) -> None:
    bare = tmp_path / "bare.jsonl"
    bare.write_text(json.dumps({"prompt": "Luvumouth stands on the river", "target": "Tutava"}) + "\n")
    card = tmp_path / "card.md"
    code, output, _ = kedit("eval", "world", bare, "--plots", tmp_path / "plots", "--card", card)
    assert code == 0
    assert "not measured: generality, portability, locality" in output
    assert "no reliability_locality.png: report 'world' has no locality probes" in output
    assert "| portability | no probes | – | 0 |" in card.read_text()
    code, output, _ = kedit("eval", "world", bare, "--json")
    scores = json.loads(output)["metrics"]
    for question in ("generality", "portability", "locality"):
        assert scores[question]["generated"] == {"value": None, "n": 0, "low": None, "high": None}


def test_limit_evaluates_a_sample(kedit: Kedit) -> None:
    code, output, _ = kedit("eval", "world", "world", "--limit", "2", "--seed", "5", "--json")
    assert (code, json.loads(output)["meta"]["n_edits"], json.loads(output)["meta"]["seed"]) == (0, 2, 5)


def test_nan_weights_are_reported(kedit: Kedit, edited_world: Path, tmp_path: Path) -> None:
    model, tokenizer = world.load()
    with torch.no_grad():
        model.get_parameter("model.layers.5.mlp.up_proj.weight")[0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    tokenizer.save_pretrained(tmp_path / "nan")
    code, _, err = kedit("eval", tmp_path / "nan", edited_world / "edits.jsonl")
    assert code == 1
    assert "NaN" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([".", "edits.jsonl"], "cannot be loaded as a causal language model"),
        (["no/such", "edits.jsonl"], "no such folder"),
        (["world", "none.jsonl"], "the file does not exist"),
        (["edit.safetensors", "edits.jsonl"], "--against BASE"),
        (["edits.jsonl", "edits.jsonl", "--against", "world"], "not a safetensors file"),
        (
            ["model", "edits.jsonl", "--delta", "edit.safetensors"],
            "the delta is already applied to the model 'model'; give",
        ),
        (["world", "edits.jsonl", "--delta", "edit.safetensors", "--against", "model"], "remove --against"),
        (["world", "edits.jsonl", "--against", "none.json", "--full"], "none.json"),
        (["world", "edits.jsonl", "--json", "report.txt"], "must end with .json"),
        (["world", "edits.jsonl", "--limit", "0"], "limit must be >= 1 or None, got 0"),
        (["world", "edits.jsonl", "--batch-size", "0"], "batch_size must be an integer >= 1, got 0"),
        (["world", "edits.jsonl", "--device", "nowhere"], "--device nowhere"),
    ],
)
def test_errors_are_one_line(
    kedit: Kedit, edited_world: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(edited_world)
    code, out, err = kedit("eval", *words)
    assert (code, out) == (1, "")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert message in lines[0]


def test_a_base_of_another_architecture_is_refused(kedit: Kedit, edited_world: Path, stories: Path) -> None:
    code, _, err = kedit("eval", edited_world / "model", edited_world / "edits.jsonl", "--against", stories)
    assert code == 1
    assert "is not the base of" in err
    assert "hidden_size" in err


@pytest.fixture
def adapter(edited_world: Path, tmp_path: Path) -> Path:
    """A LoRA adapter of the bundled model as PEFT saves it, without a tokenizer."""
    from peft import LoraConfig, get_peft_model

    model, _ = world.load()
    model.name_or_path = str(world.path())
    config = LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_loaded_on_its_base(kedit: Kedit, adapter: Path, edited_world: Path) -> None:
    from peft import PeftModel

    edits = edited_world / "edits.jsonl"
    code, output, err = kedit("eval", adapter, edits, "--against", "world", "--full", "--json")
    assert code == 0, err
    found = json.loads(output)
    dataset = EditDataset.load(edits)
    base, tokenizer = world.load()
    options = EvaluationOptions(metrics="all")
    before = evaluate(base, tokenizer, dataset, options=options, progress=False)
    adapted = PeftModel.from_pretrained(world.load()[0], str(adapter))
    wanted = evaluate(adapted, tokenizer, dataset, unedited=before, options=options, progress=False).to_dict()
    assert found["answers"] == wanted["answers"]
    assert found["unedited"] == wanted["unedited"]
    assert any(row["answer"] != row["before"] for row in found["answers"])
    # The drift is that of the weights with the adapter in them.
    moved, size = 0.0, 0.0
    merged = adapted.merge_and_unload()
    for name, was in base.named_parameters():
        moved += float((merged.get_parameter(name).detach().double() - was.detach().double()).square().sum())
        size += float(was.detach().double().square().sum())
    assert moved > 0.0
    assert found["metrics"]["weight_drift"]["relative"]["value"] == pytest.approx((moved / size) ** 0.5, rel=1e-9)
    # The other way round: an adapter as the base of a checkpoint.
    code, output, err = kedit("eval", edited_world / "model", edits, "--against", adapter, "--full", "--json")
    assert code == 0, err
    assert json.loads(output)["metrics"]["weight_drift"]["relative"]["value"] > 0.0


def test_prompt_tuning_has_no_weight_drift(kedit: Kedit, edited_world: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig, TaskType, get_peft_model

    model, tokenizer = world.load()
    model.name_or_path = str(world.path())
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    get_peft_model(model, config).save_pretrained(tmp_path / "prompts")
    tokenizer.save_pretrained(tmp_path / "prompts")
    words = ["eval", tmp_path / "prompts", edited_world / "edits.jsonl", "--against", "world", "--full", "--json"]
    code, output, err = kedit(*words)
    assert code == 0, err
    drift = json.loads(output)["metrics"]["weight_drift"]
    assert drift["moved"]["value"] == drift["relative"]["value"] == 0.0


def test_an_adapter_with_a_missing_or_wrong_base_is_refused(
    kedit: Kedit, adapter: Path, edited_world: Path, stories: Path
) -> None:
    code, _, err = kedit("eval", adapter, edited_world / "edits.jsonl", "--against", stories)
    assert (code, "is not the base of" in err) == (1, True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for base, message in (("/nowhere/base", "/nowhere/base"), (None, "names no base")):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        code, out, err = kedit("eval", adapter, edited_world / "edits.jsonl")
        assert (code, out) == (1, "")
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert message in line
        assert "merge_and_unload" in line
    (adapter / "adapter_config.json").write_text("{")
    code, _, err = kedit("eval", adapter, edited_world / "edits.jsonl")
    assert (code, "adapter_config.json" in err) == (1, True)


def test_an_output_path_that_cannot_be_written_is_refused_first(kedit: Kedit, edited_world: Path) -> None:
    file = edited_world / "edits.jsonl"
    for option, place in (("--json", file / "a.json"), ("--markdown", file / "b.md"), ("--plots", file / "plots"),
                          ("--card", file / "README.md")):  # fmt: skip
        code, out, err = kedit("eval", "world", file, option, place)
        assert (code, out) == (1, ""), option
        assert f"{option} {place}" in err
