"""`lightning run`: how arguments are split and what is started, without starting it."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from kedit_train import catalog
from kedit_train.cli import launcher
from kedit_train.cli.edit import with_catalog
from kedit_train.errors import EditError

ENTRY = str(catalog.folder("recipes") / "edit.py")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Started runs: ("here" or "launcher", requested processes, script, its arguments)."""
    calls: list[tuple] = []

    def here(launch, parsed, script, arguments):
        calls.append(("here", parsed.devices, str(script), arguments))
        return 0

    def new(launch, parsed, arguments, *, named_port):
        calls.append(("launcher", parsed.devices, parsed.script, arguments))
        return 0

    monkeypatch.setattr(launcher, "in_this_process", here)
    monkeypatch.setattr(launcher, "in_new_processes", new)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return calls


def recipe(name: str) -> str:
    return str(catalog.folder("recipes") / f"{name}.yaml")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a.yaml"], ([], "a.yaml", [])),
        (["model", "a.py"], ([], "a.py", [])),
        (["--devices", "2", "a.yaml", "--x", "1"], (["--devices", "2"], "a.yaml", ["--x", "1"])),
        (["a.yaml", "--x", "1", "--devices=2"], (["--devices", "2"], "a.yaml", ["--x", "1"])),
        (["a.yaml", "--data.path", "e.jsonl"], ([], "a.yaml", ["--data.path", "e.jsonl"])),
        (["a.yaml", "--trainer.devices", "2"], ([], "a.yaml", ["--trainer.devices", "2"])),
        (["--strategy=ddp", "a.py", "--", "--devices", "9"], (["--strategy", "ddp"], "a.py", ["--devices", "9"])),
        (["a.py", "model", "--help"], ([], "a.py", ["model", "--help"])),
        (["--help"], ([], None, ["--help"])),
        ([], ([], None, [])),
    ],
)
def test_arguments_are_split(given: list[str], expected: tuple) -> None:
    assert launcher.split(given) == expected


@pytest.mark.parametrize("given", [["--devices"], ["--devcies", "2", "a.yaml"], ["a.yaml", "--precision"]])
def test_a_wrong_option_is_refused(given: list[str]) -> None:
    with pytest.raises(EditError, match="--help"):
        launcher.split(given)


@pytest.mark.parametrize(("given", "code"), [(["-h"], 0), (["--help"], 0), ([], 2), (["--", "x"], 2)])
def test_without_a_recipe_the_usage_is_shown(given: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.run(given) == code
    assert "quickstart" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "recipes/quickstart.yaml"])
def test_a_recipe_starts_the_shared_script(started: list, name: str, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert launcher.run([name, "--data.path", "x.jsonl"]) == 0
    assert launcher.run(["--devices", "2", name]) == 0
    expected = ["fit", "--config", recipe("quickstart")]
    assert started == [("here", "1", ENTRY, [*expected, "--data.path", "x.jsonl"]), ("launcher", "2", ENTRY, expected)]


def test_files_of_the_user_come_first(started: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart.yaml").write_text("trainer: {}\n")
    Path("train.py").write_text("")
    launcher.run(["quickstart.yaml"])
    launcher.run(["train.py", "--lr", "1"])
    assert started[0][3] == ["fit", "--config", "quickstart.yaml"]
    # A script always goes through Fabric's launcher, on one device as well.
    assert started[1] == ("launcher", "1", "train.py", ["--lr", "1"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["run", "nothing"], ["file 'nothing' does not exist", "quickstart", "locft_bf"]),
        (["run", "edits/quickstart.yaml"], ["file 'edits/quickstart.yaml' does not exist"]),
        (["run", "quickstart", "--strategy", "magic"], ["magic", "ddp", "lightning run --help"]),
        (["run", "quickstart", "--num-nodes", "two"], ["two", "lightning run --help"]),
        (["run", "quickstart", "--devices", "0"], ["--devices 0", "> 0"]),
        (["run", "README.txt"], ["file 'README.txt' does not exist"]),
        (["login"], ["lightning login", "lightning-sdk"]),
    ],
)
def test_errors_are_one_line(given: list[str], expected: list[str], capsys, monkeypatch, started: list) -> None:
    monkeypatch.setitem(sys.modules, "lightning_sdk", None)
    monkeypatch.setattr(launcher, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        launcher.main(given)
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert all(part in message for part in expected)
    assert not started


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "edits.jsonl"
    other.write_text("{}")
    with pytest.raises(EditError, match="must be a recipe"):
        launcher.command(str(other), [])


def test_other_verbs_go_to_the_cloud_client(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    entry = types.ModuleType("lightning_sdk.cli.entrypoint")
    entry.main_cli = lambda: seen.append(list(sys.argv))  # type: ignore[attr-defined]
    for name in ("lightning_sdk", "lightning_sdk.cli"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lightning_sdk.cli.entrypoint", entry)
    monkeypatch.setattr(launcher, "find_spec", lambda name: object())
    monkeypatch.setattr(sys, "argv", ["lightning", "login", "--x"])
    launcher.main()
    assert seen == [["lightning", "login", "--x"]]


@pytest.mark.parametrize("given", [["--help"], ["run", "--help"]])
def test_the_help_names_recipes_that_exist(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        launcher.main(given)
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(name in shown for name in catalog.names("recipes"))
    for line in shown.splitlines():
        words = line.split()
        if words[:2] == ["lightning", "run"] and words[2] not in ("my_recipe.yaml", "[OPTIONS]"):
            assert catalog.find("recipes", words[2]).is_file()


def test_packaged_files_are_found_in_a_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    packaged = tmp_path / "kedit_train" / "_catalog" / "recipes"
    packaged.mkdir(parents=True)
    (packaged / "mine.yaml").write_text("")
    monkeypatch.setattr(catalog, "PACKAGE", tmp_path / "kedit_train")
    assert catalog.names("recipes") == ["mine"]
    assert catalog.find("recipes", "mine") == packaged / "mine.yaml"


def test_a_packaged_fragment_is_found_unless_the_user_has_a_file_of_that_name(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    fragment = catalog.folder("callbacks") / "kl_locality.yaml"
    given = ["fit", "--config", "mine.yaml", "--config", "callbacks/kl_locality.yaml", "-c=callbacks/kl_locality.yaml"]
    assert with_catalog(given) == [*given[:4], str(fragment), f"-c={fragment}"]
    # Values of other options, unknown names and files of the user are not replaced.
    for kept in (["--data.path", "callbacks/kl_locality.yaml"], ["--config", "callbacks/none.yaml"]):
        assert with_catalog(kept) == kept
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "kl_locality.yaml").write_text("")
    assert with_catalog(given) == given
