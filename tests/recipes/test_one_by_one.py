"""recipes/one_by_one.py, as a user runs it."""

from __future__ import annotations

import copy
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from real_models import smollm2

from kedit_train import EditDataset, EditDelta, EditError, catalog, evaluate, world

SCRIPT = catalog.folder("recipes") / "one_by_one.py"


def call(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--output_dir", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, env=quiet, cwd=folder)


@pytest.mark.slow
def test_it_learns_one_edit_after_the_other_and_writes_its_results(tmp_path: Path) -> None:
    done = call(tmp_path, "--limit", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("stopped at step") == 2
    assert "| 2 | 1.000 " in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["metrics"]["reliability"]["generated"]["value"] == 1.0
    assert (tmp_path / "retention.png").stat().st_size > 1000
    model, tokenizer = world.load()
    before = copy.deepcopy(model.state_dict())
    EditDelta.load(tmp_path / "edit.safetensors").apply(model)
    found = evaluate(model, tokenizer, EditDataset.load("world", limit=2), progress=False)
    assert found.metrics["reliability"]["generated"].value == 1.0
    changed = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(1, 6)}


@pytest.mark.slow
def test_a_null_space_keeps_other_answers_without_a_learning_rate(tmp_path: Path) -> None:
    done = call(tmp_path, "--keep", "null_space", "--limit", "3")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| 3 | 1.000 " in done.stdout
    model, _ = world.load()
    before = copy.deepcopy(model.state_dict())
    EditDelta.load(tmp_path / "edit.safetensors").apply(model)
    changed = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in (3, 4)}


def test_other_models_than_the_bundled_one_use_a_null_space() -> None:
    script = runpy.run_path(str(SCRIPT))
    for options, expected in (([], "kl"), (["--model", "m"], "null_space"), (["--model", "m", "--keep", "kl"], "kl")):
        assert script["kept_by"](script["arguments"](options)) == expected
    assert script["kept_by"](script["arguments"](["--plain"])) is None


def test_edits_can_be_trained_at_the_tokens_of_their_subjects() -> None:
    script = runpy.run_path(str(SCRIPT))
    for options, added in (
        (["--keep", "null_space"], set()),
        (["--keep", "null_space", "--subject_tokens"], {"SubjectTokens"}),
    ):
        names = [type(callback).__name__ for callback in script["callbacks"](script["arguments"](options))]
        assert set(names) == added | {
            "ParameterScope", "TokenLoss", "StopWhenEdited", "NullSpace", "PolyakStep", "PrefixCache"
        }  # fmt: skip


def test_the_values_at_the_subjects_can_be_trained() -> None:
    script = runpy.run_path(str(SCRIPT))
    chosen = script["callbacks"](script["arguments"](["--model", "m", "--keep", "subject_values"]))
    assert [type(callback).__name__ for callback in chosen] == [
        "ParameterScope", "TokenLoss", "StopWhenEdited", "SubjectValues", "PrefixCache"
    ]  # fmt: skip
    assert chosen[3].sequential


@pytest.mark.slow
def test_a_pretrained_model_learns_values_and_keeps_earlier_edits(tmp_path: Path) -> None:
    files = catalog.folder("recipes") / "smollm2"
    done = call(
        tmp_path, "--model", str(smollm2()), "--edits", str(files / "facts.jsonl"), "--texts", str(files / "keep.txt"),
        "--keep", "subject_values", "--limit", "5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((tmp_path / "report.json").read_text())["metrics"]
    assert metrics["reliability"]["generated"]["value"] == 1.0
    assert metrics["locality"]["generated"]["value"] > 0.7


@pytest.mark.slow
def test_a_pretrained_model_learns_edits_at_the_tokens_of_their_subjects(tmp_path: Path) -> None:
    files = catalog.folder("recipes") / "smollm2"
    done = call(
        tmp_path, "--model", str(smollm2()), "--edits", str(files / "facts.jsonl"), "--texts", str(files / "keep.txt"),
        "--subject_tokens", "--limit", "3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "edit/scope/subject_examples" in done.stdout or "SubjectTokens" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["metrics"]["reliability"]["generated"]["value"] == 1.0


@pytest.mark.slow
def test_the_texts_of_the_world_can_be_named(tmp_path: Path) -> None:
    assert call(tmp_path, "--texts", "world", "--limit", "1").returncode == 0


@pytest.mark.slow
def test_plain_runs_without_constraints(tmp_path: Path) -> None:
    done = call(tmp_path, "--plain", "--limit", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "KLLocality" not in done.stdout
    assert "NormBall" not in done.stdout


@pytest.mark.slow
def test_edits_learned_before_an_error_are_kept(tmp_path: Path) -> None:
    edits = EditDataset.load("world", limit=2)
    (tmp_path / "edits.jsonl").write_text(
        "".join(json.dumps({"prompt": edit.prompt, "target": edit.target}) + "\n" for edit in edits)
    )
    (tmp_path / "texts.txt").write_text(f"{edits[1].prompt} well known.\n")
    done = call(tmp_path, "--edits", "edits.jsonl", "--texts", "texts.txt")
    assert done.returncode == 1
    assert "error: KLLocality: every text" in done.stderr.splitlines()[-1]
    model, tokenizer = world.load()
    EditDelta.load(tmp_path / "edit.safetensors").apply(model)
    found = evaluate(model, tokenizer, edits[:1], progress=False)
    assert found.metrics["reliability"]["generated"].value == 1.0
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--edits", "mine.jsonl"), "--texts is missing; give a file of texts on which"),
        (("--texts", "nowhere.txt"), "--texts must be a file that exists, got 'nowhere.txt'."),
        (("--limit", "0"), "--limit must be > 0, got 0."),
        (("--learning_rate", "nan"), "--learning_rate must be > 0, got nan."),
        (
            ("--plain", "--ball", "1"),
            "--plain trains without constraints, so --texts, --ball and --keep must be left out.",
        ),
        (("--keep", "null_space", "--ball", "1"), "--ball is an option of --keep kl, but --keep is null_space"),
        (("--output_dir", str(SCRIPT)), f"because {SCRIPT} is not a folder"),
        (("--ball", "0"), "--ball must be > 0, got 0."),
        (("--texts_per_step", "1"), "--texts_per_step must be >= 2, got 1."),
        (("--keep", "subject_values"), "--keep subject_values needs a pretrained model"),
        (("--subject_tokens",), "--subject_tokens needs --keep null_space and a pretrained model"),
        (("--subject_tokens", "--plain"), "--subject_tokens needs --keep null_space and a pretrained model"),
    ],
)
def test_a_wrong_argument_is_one_line_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    script = runpy.run_path(str(SCRIPT))
    monkeypatch.setitem(script["main"].__globals__, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(EditError) as error:
        script["main"](["--output_dir", str(tmp_path), *options])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_an_error_ends_the_script_with_one_line(tmp_path: Path) -> None:
    done = call(tmp_path, "--limit", "0")
    assert done.returncode == 1
    assert done.stderr == "error: --limit must be > 0, got 0.\n"
