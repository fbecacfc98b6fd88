"""The comparison with other projects: what is ours in it, with checkouts that hold a fake editor."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kedit_train import Edit, EditDelta, world

HERE = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
# Adds ``amount`` to one weight for each call, and notes what it was given.
FAKE_EASYEDIT = """
import json
from types import SimpleNamespace

CALLS = []

class FTHyperParams:
    @classmethod
    def from_hparams(cls, path):
        with open(path) as file:
            return SimpleNamespace(**json.load(file))

def apply_ft_to_model(model, tokenizer, requests, hparams, **options):
    CALLS.append((requests, hparams, tokenizer.padding_side))
    print("noise")
    with open("left_behind.txt", "w") as file:
        file.write("x")
    if hparams.lr < 0:
        raise ValueError("a negative rate\\nmore lines")
    next(model.parameters()).data[0, 0] += hparams.amount
    return model, {}
"""
FAKE_LOCFT = """
import torch
from hparams import FTHyperParams

def execute_ft(model, tokenizer, requests, config):
    assert torch.device("cuda:0") == torch.device("cpu")
    next(model.parameters()).data[0, 0] += config.lr * len(requests)
    return model
"""
FAKE_LOCFT_HPARAMS = """
import json
from types import SimpleNamespace

class FTHyperParams:
    @classmethod
    def from_yaml(cls, path):
        with open(path) as file:
            return SimpleNamespace(**json.load(file))
"""


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(HERE))
    module = importlib.import_module("peers")
    monkeypatch.setattr(module, "MODEL", "world")
    monkeypatch.setattr(module, "compared", list)
    yield module
    for name in [name for name in sys.modules if name.split(".")[0] == "easyeditor"] + ["hparams"]:
        sys.modules.pop(name, None)


@pytest.fixture
def easyedit(tmp_path: Path) -> Path:
    return written(
        tmp_path / "EasyEdit",
        {
            # The packages are entered without these files.
            "easyeditor/__init__.py": "raise ImportError('a package that is not installed')",
            "easyeditor/models/__init__.py": "raise ImportError('a package that is not installed')",
            "easyeditor/models/ft/__init__.py": FAKE_EASYEDIT,
            "hparams/FT/llama-7b.yaml": json.dumps({"lr": 5e-4, "layers": [21], "amount": 0.5}),
        },
    )


@pytest.fixture
def locft(tmp_path: Path) -> Path:
    files = {"fine-tune.py": FAKE_LOCFT, "hparams.py": FAKE_LOCFT_HPARAMS}
    return written(tmp_path / "LocFT", files | {"hparams/llama3-8b.yaml": json.dumps({"lr": 0.25, "layer": 22})})


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def options(tmp_path: Path, *editors: str, draw: int = 0, **given: Any) -> Any:
    return SimpleNamespace(
        draws=[draw], edits=2, editors=list(editors), set=given, results=tmp_path / "peers.jsonl", deltas=tmp_path
    )


def test_a_checkout_is_recognized_by_its_files(peers: Any, easyedit: Path, locft: Path, tmp_path: Path) -> None:
    assert peers.project_of(easyedit) == "EasyEdit"
    assert peers.project_of(locft) == "LocFT"
    assert peers.project_of(tmp_path) is None
    assert peers.commit_of(tmp_path / "nowhere") == "unknown"


def test_edits_become_requests_with_a_text_about_something_else(peers: Any) -> None:
    editors = importlib.import_module("peer_editors")
    edits = [Edit("Ada lives in", "Bern", subject="Ada", old_target="Rome"), Edit("Bo is", "tall", subject="Bo")]
    texts = ["Ada sings.", "a word " * 20, "Cleo runs.", "Bo sleeps."]
    first, second = editors.as_requests(edits, texts)
    assert first == {
        "case_id": 0, "prompt": "Ada lives in", "subject": "Ada", "target_new": "Bern", "ground_truth": "Rome",
        "loc_prompt": "Cleo runs.",
    }  # fmt: skip
    assert (second["case_id"], second["loc_prompt"]) == (1, "Cleo runs.")


def test_layers_keep_their_relative_depth(peers: Any) -> None:
    depth = importlib.import_module("peer_editors").depth
    assert [depth(layer) for layer in (4, 5, 6, 7, 8, 21, 22, 27, 31)] == [4, 5, 6, 7, 8, 20, 21, 25, 29]


@pytest.mark.parametrize(("name", "calls"), [("ft_m", [2]), ("ft_m_sequential", [1, 1])])
def test_an_editor_gets_the_edits_and_its_settings(
    peers: Any, easyedit: Path, tmp_path: Path, name: str, calls: list[int]
) -> None:
    peers.run(options(tmp_path, name), {"EasyEdit": easyedit})
    seen = sys.modules["easyeditor.models.ft"].CALLS  # type: ignore[attr-defined]
    assert [len(requests) for requests, *_ in seen] == calls
    edits = peers.SETTINGS["world"](0).edits(2)
    assert [r["prompt"] for requests, *_ in seen for r in requests] == [edit.prompt for edit in edits]
    _, hparams, side = seen[0]
    rate = 2e-3 if name == "ft_m" else 5e-4
    assert (hparams.lr, hparams.layers, hparams.objective_optimization) == (rate, [20], "target_new")
    assert (hparams.device, hparams.batch_size, side) == ("cpu", calls[0], "left")


def test_the_saved_delta_is_what_is_scored(
    peers: Any, easyedit: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    peers.run(options(tmp_path, "ft_m"), {"EasyEdit": easyedit})
    model, _ = world.load()
    before = float(next(model.parameters())[0, 0].detach())
    EditDelta.load(tmp_path / "ft_m-0.safetensors").apply(model)
    assert float(next(model.parameters())[0, 0].detach()) == pytest.approx(before + 0.5)
    (row,) = map(json.loads, (tmp_path / "peers.jsonl").read_text().splitlines())
    assert (row["editor"], row["draw"], row["edits"], row["commit"]) == ("ft_m", 0, 2, "unknown")
    assert row["reliability"] == 0.0
    assert row["ratio"] == pytest.approx(1.0, abs=0.5)
    # What the editor prints and writes is thrown away.
    assert "noise" not in capsys.readouterr().out
    assert not list((tmp_path / "here").iterdir())


def test_what_is_measured_is_not_measured_again(peers: Any, easyedit: Path, tmp_path: Path) -> None:
    for _ in range(2):
        peers.run(options(tmp_path, "ft_m"), {"EasyEdit": easyedit})
    assert len((tmp_path / "peers.jsonl").read_text().splitlines()) == 1


def test_locft_runs_without_a_gpu(peers: Any, locft: Path, tmp_path: Path) -> None:
    before = list(sys.path)
    peers.run(options(tmp_path, "locft", lr=0.125), {"LocFT": locft})
    model, _ = world.load()
    old = float(next(model.parameters())[0, 0].detach())
    EditDelta.load(tmp_path / "locft-0.safetensors").apply(model)
    assert float(next(model.parameters())[0, 0].detach()) == pytest.approx(old + 2 * 0.125)
    assert sys.path == before
    assert torch.device("cuda:0").type == "cuda"


def test_what_is_missing_or_fails_is_skipped_with_one_line(
    peers: Any, easyedit: Path, tmp_path: Path, capsys: Any
) -> None:
    peers.run(options(tmp_path, "locft", "rome", "ft_m", lr=-1.0), {"EasyEdit": easyedit})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("peers:")]
    assert lines == [
        "peers: locft is skipped: no checkout of LocFT was given",
        "peers: rome is skipped: ModuleNotFoundError: No module named 'easyeditor.models.rome'",
        "peers: ft_m is skipped: ValueError: a negative rate",
    ]


def test_an_editor_that_changes_nothing_is_an_error(peers: Any, easyedit: Path, tmp_path: Path, capsys: Any) -> None:
    peers.run(options(tmp_path, "ft_m", amount=0.0), {"EasyEdit": easyedit})
    assert "ft_m is skipped: RuntimeError: the editor changed no weight" in capsys.readouterr().out


def test_draws_for_choosing_settings_are_not_kept(peers: Any, easyedit: Path, tmp_path: Path) -> None:
    peers.run(options(tmp_path, "ft_m", draw=100), {"EasyEdit": easyedit})
    assert not (tmp_path / "peers.jsonl").exists()


def test_the_results_of_compare_are_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    module: Any = importlib.import_module("peers")
    scores = {"reliability": 0.5, "generality": 0.5, "PS": 0.5, "others": 0.5, "NS": 0.5, "KL": 0.5, "seconds": 2.0}
    about = {"model": "smollm2", "draw": 10, "edits": 50, "perplexity": 30.0, "perplexity before": 20.0}
    about["machine"] = "another CPU"
    kinds = [("ft_m", "batch"), ("ft_m", "sequential"), ("overtone", "batch"), ("kedit_default", "batch")]
    rows = [{"recipe": recipe, "mode": mode, **about, **scores} for recipe, mode in kinds]
    rows += [{**rows[0], "model": "world"}, {"model": "smollm2", "recipe": "ft_m", "mode": "batch", "error": "no"}]
    (tmp_path / "compare.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    monkeypatch.setattr(module, "COMPARED", tmp_path / "compare.jsonl")
    expected = {"draw": 10, "edits": 50, "ratio": 1.5, "machine": "another CPU", **scores}
    assert module.compared() == [{"editor": name, **expected} for name in ("recipe_ft_m", "kedit_default")]
    # Only draws and numbers of edits on which another editor was measured are shown.
    measured = {
        "editor": "rome",
        **expected,
        "draw": 10,
        "date": "2026-11-27",
        "machine": "a CPU, torch",
        "commit": "abc",
    }
    others = [{**measured, "editor": name} for name in ("memit", "grace", "wise")]
    where, *_ = module.parts([measured, *others])
    assert " on one thread of a CPU; `kedit_default`, `ft_m` on another CPU; draw 10;" in where
    assert [part.count("kedit-train") for part in module.parts([measured])] == [0, 0, 2, 0, 0]
    assert "kedit-train" not in str(module.parts([{**measured, "draw": 11}]))


def test_the_page_has_a_table_per_mode(peers: Any) -> None:
    scores = {key: 0.5 for key, *_ in peers.COLUMNS}
    about = {"edits": 50, "date": "2026-11-27", "machine": "a CPU"}
    rows = [
        {"editor": "rome", "draw": 10, "commit": "abc", "set": {"v_lr": 0.1}, **about, **scores},
        {"editor": "kedit_default", "draw": 10, **about, **scores, "seconds": 8.0},
        {"editor": "kedit_default", "draw": 10, **about, **scores, "seconds": 2.0},
        {"editor": "kedit_default", "draw": 11, **about, **scores, "seconds": 4.0},
        {"editor": "memit", "draw": 10, "commit": "abc", **about, "error": "ValueError: no"},
    ]
    where, *found = peers.parts(rows)
    assert where == "Measured on 2026-11-27 on one thread of a CPU; draw 10 and 11; EasyEdit at commit abc."
    assert found.pop(0) == "Changed with `--set`: ROME `v_lr=0.1`."
    assert [part.splitlines()[-1] for part in found] == [
        "### 50 edits together",
        "| `kedit_default` | kedit-train | 0.50 | 0.50 | 0.50 | 0.50 | 0.50 | 0.5000 | 0.50 | 3.0 |",
        "### 50 edits, one after the other",
        "| ROME | EasyEdit | 0.50 | 0.50 | 0.50 | 0.50 | 0.50 | 0.5000 | 0.50 | 0.5 |",
        "MEMIT does not run: `ValueError: no`.",
    ]
