"""Error lines of the commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kedit_train.cli.console import ending_interrupts, leave, plain, print_error


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    print_error("first\n  second")
    assert capsys.readouterr().err == "error: first second\n"


def test_an_error_of_several_processes_is_printed_once(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    print_error("the same")
    print_error("the same")
    print_error("another")
    assert capsys.readouterr().err == "error: the same\nerror: another\n"


def test_control_characters_are_escaped() -> None:
    assert plain("a\x1b[2Jb") == r"a\x1b[2Jb"
    assert plain("Zürich") == "Zürich"


def test_leaving_without_a_process_group_raises_system_exit() -> None:
    with pytest.raises(SystemExit) as ended:
        leave(3)
    assert ended.value.code == 3


def test_an_interrupt_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as ended, ending_interrupts():
        raise KeyboardInterrupt
    assert (ended.value.code, capsys.readouterr().err) == (130, "error: interrupted\n")


@pytest.mark.parametrize(
    "command", [["-m", "kedit_train", "fit"], ["-m", "kedit_train.cli.launcher", "run", "quickstart"]]
)
def test_an_interrupt_during_the_imports_is_one_line(command: list[str], tmp_path: Path) -> None:
    # The first import of torch interrupts the process, as ^C does.
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    paths = [str(tmp_path), str(Path(__file__).resolve().parents[2])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("RANK", None)
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")
