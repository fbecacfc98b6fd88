"""The verb tune: it writes a recipe that validates, runs, and reaches the scores of the table."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from kedit_train import EditDataset, world
from kedit_train.cli.kedit.tune import duration
from kedit_train.modes import TuneGrid

pytestmark = pytest.mark.filterwarnings("ignore")
Kedit = Callable[..., tuple[int, str, str]]


def test_the_recipe_validates_and_reaches_the_scores_of_its_trial(
    kedit: Kedit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for module in ("runs", "recipe"):
        monkeypatch.setattr(f"kedit_train.modes.tuning.{module}.EPOCHS", 10)
    edits = EditDataset.load("world", limit=6)
    edits.save("edits.jsonl")
    Path("keep.txt").write_text("\n".join(world.locality_texts(exclude=edits, n=24)))
    grid = ("--layers", "0.5-0.7", "--step-sizes", 0.1, "--energies", "0.9", "--kl-weights", 0)
    words = (
        "tune",
        "world",
        "edits.jsonl",
        "--keep",
        "keep.txt",
        *grid,
        "--out",
        "new/tuned.yaml",
        "--wandb",
        "w.yaml",
    )
    code, out, err = kedit(*words, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["written"] == [
        *("new/tuned.yaml", "new/tuned.tune/tuning.jsonl", "new/tuned.tune/held_out.jsonl", "w.yaml")
    ]
    assert found["picked"]["layers"] == "0.5-0.7"
    assert found["held_out"]["edits"] == 3
    code, out, err = kedit("validate", "new/tuned.yaml", "w_recipe.yaml")
    assert code == 0, err
    assert "NullSpace, PolyakStep, KLLocality, StopWhenEdited" in out.splitlines()[1]

    # The table, from the stored results.
    assert kedit(*words)[0] == 1
    code, out, err = kedit(*words, "--force", "--html", "new/tuned.html")
    assert code == 0, err
    page = Path("new/tuned.html").read_text(encoding="utf-8")
    assert "Settings for " in page
    assert page.count("<title>") == 3  # of the page and of its two points
    assert "picked: layers 0.5-0.7, step 0.1, energy 0.9, KL 0" in out
    assert "held out (3 edits): reliability " in out
    assert out.splitlines()[-1] == "run the recipe with: lightning run new/tuned.yaml"

    # A run of the sweep: the command of the file with one value of each parameter.
    from kedit_train.cli.main import main

    sweep = yaml.safe_load(Path("w.yaml").read_text())
    values = [f"--{name}={each['values'][0]}" for name, each in sweep["parameters"].items()]
    words = [*sweep["command"][sweep["command"].index("fit") : -2], *values]
    monkeypatch.setattr(sys, "argv", ["kedit_train", *words, "--data.path=new/tuned.tune/tuning.jsonl"])
    main()
    report = json.loads(Path("runs/w_recipe/report.json").read_text())["metrics"]
    (trial,) = found["trials"]
    assert report["reliability"]["generated"]["value"] == trial["reliability"]
    assert report["generality"]["generated"]["value"] == pytest.approx(trial["generality"], abs=0.1)
    assert report["locality"]["tokens_kept"]["value"] == pytest.approx(trial["locality"], abs=0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "a.json"], "must end with .yaml"),
        (["--out", "w_recipe.yaml", "--wandb", "w.yaml"], "and --out also writes w_recipe.yaml"),
        (["--step-sizes", "2"], "TuneGrid: step_sizes must be a list"),
        (["--protocol", "best"], "EvaluationOptions: protocol must be"),
        (["--keep", "none.txt"], "file 'none.txt' does not exist"),
    ],
)
def test_errors_are_one_line(
    kedit: Kedit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = kedit("tune", "world", "world", "--keep", "world", *words)
    assert (code, out, len(err.splitlines())) == (1, "", 1), err
    assert message in err


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("20m", 1200), ("1.5h", 5400), ("30", 30)])
def test_a_budget_has_a_unit(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-3m", "0s", "3 days", "nan"])
def test_a_budget_that_is_no_time_is_refused(text: str, kedit: Kedit) -> None:
    with pytest.raises(ArgumentTypeError, match="expected a time above 0"):
        duration(text)
    code, _, err = kedit("tune", "world", "world", "--keep", "world", f"--budget={text}")
    assert (code, "expected a time above 0" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--limit", -3), "--limit must be at least 1, got -3."),
        (("--limit", 1), "edits must be about at least two subjects"),
        (("--step-sizes", 5), "step_sizes must be a list with at least one value, each in (0, 1], got [5.0]."),
        (("--layers", 99), "an index in layers must be from 0 to 5"),
        (("--layers", "deep"), "layers must be an index (5, -1), a fraction (0.7)"),
        (("--modules", "nothing"), "modules='nothing' matches no parameter"),
        (("--keep", "chats.jsonl"), "chats.jsonl, record 2, message 1: expected"),
        (("--keep", "missing.txt"), "file 'missing.txt' does not exist"),
    ],
)
def test_wrong_arguments_are_reported_before_the_model_is_loaded(
    kedit: Kedit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    # An earlier record is a valid conversation.
    records = [[{"role": "user", "content": "Hello"}], [{"role": "user"}]]
    Path("chats.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for messages in records))
    monkeypatch.setattr("kedit_train.cli.kedit.checkpoints.load", None)
    code, _, err = kedit("tune", "world", "world", *(() if words[0] == "--keep" else ("--keep", "world")), *words)
    assert code == 1
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("tuned*"))


def test_the_help_and_the_page_name_the_default_grid(kedit: Kedit) -> None:
    _, help_text, _ = kedit("tune", "--help")
    page = (Path(__file__).resolve().parents[2] / "docs" / "command_line.md").read_text()
    for name in ("step_sizes", "energies", "kl_weights"):
        values = " ".join(f"{value:g}" for value in getattr(TuneGrid(), name))
        option = "--" + name.replace("_", "-")
        assert f"(default: {values})" in " ".join(help_text.split()), option
        assert f"| `{option}` | `{values}` |" in page, option
