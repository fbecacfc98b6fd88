"""Error lines of the commands."""

from __future__ import annotations

import pytest

from kedit_train.cli.console import leave, plain, print_error


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
