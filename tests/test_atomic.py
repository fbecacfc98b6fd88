"""Files and folders are there whole or not at all, and what a killed writer left goes with the next save."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kedit_train import EditDataset, EditDelta
from kedit_train.atomic_write import unfinished_name, writing
from kedit_train.data import Edit

KILLED = """
import os, signal, sys
from pathlib import Path
from kedit_train.atomic_write import writing
with writing(sys.argv[1]) as unfinished:
    if sys.argv[2] == "folder":
        unfinished.mkdir()
        unfinished = unfinished / "part"
    unfinished.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(path: Path, kind: str = "file") -> Path:
    """What a process leaves that is killed while it writes ``path``."""
    before = set(path.parent.iterdir())
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), kind], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = set(path.parent.iterdir()) - before
    return left


def fail(path: Path, folder: bool = False) -> None:
    with writing(path) as unfinished:
        if folder:
            unfinished.mkdir()
        (unfinished / "part" if folder else unfinished).write_text("half")
        raise KeyError


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "new" / "scores.json"
    with writing(path) as unfinished:
        assert not path.exists()
        unfinished.write_text("whole")
    with pytest.raises(KeyError):
        fail(path)
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "model"
    with pytest.raises(KeyError):
        fail(path, folder=True)
    assert list(tmp_path.iterdir()) == []
    with writing(path) as unfinished:
        (unfinished / "deep").mkdir(parents=True)
        (unfinished / "deep" / "weights").write_text("whole")
        assert not path.exists()
    assert [found.relative_to(tmp_path).as_posix() for found in tmp_path.rglob("*.*")] == []
    assert (path / "deep" / "weights").read_text() == "whole"


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is of POSIX")
def test_the_next_save_of_the_name_removes_what_a_killed_one_left(tmp_path):
    path = tmp_path / "edits.v1.jsonl"
    edits = EditDataset([Edit("The capital of Ruritania is", "Strelsau")])
    edits.save(path)
    left = killed(path)
    assert len(EditDataset.load(path)) == 1
    other, folder = killed(tmp_path / "other.jsonl"), killed(tmp_path / "model", "folder")
    # A process that runs, and one of another host, of which nothing is known.
    here, away = f"{socket.gethostname()}.{os.getppid()}", f"far.away.{os.getppid()}"
    kept = [tmp_path / f".edits.v1.jsonl.{writer}.unfinished" for writer in (here, away)]
    for file in kept:
        file.write_text("half")
    edits.save(path)
    assert not left.exists()
    assert sorted(tmp_path.iterdir()) == sorted([path, other, folder, *kept])
    with writing(tmp_path / "model") as unfinished:
        assert not folder.exists()
        unfinished.mkdir()
    assert sorted(tmp_path.iterdir()) == sorted([path, other, tmp_path / "model", *kept])


@pytest.mark.skipif(os.name != "posix", reason="permissions are of POSIX")
def test_what_is_written_may_be_read_by_whom_any_new_file_may(tmp_path):
    import torch
    from safetensors.torch import save_file

    (tmp_path / "usual").write_text("text")
    EditDelta.between({"w": torch.zeros(4)}, {"w": torch.ones(4)}).save(tmp_path / "a.safetensors")
    with writing(tmp_path / "model") as unfinished:
        unfinished.mkdir()
        save_file({"w": torch.ones(4)}, unfinished / "model.safetensors")
    usual = (tmp_path / "usual").stat().st_mode
    assert (tmp_path / "a.safetensors").stat().st_mode == usual
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode == usual
    assert os.access(tmp_path / "model", os.X_OK)


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is of POSIX")
def test_a_delta_and_a_report_clean_up_alike(tmp_path):
    import torch

    from kedit_train.cli.kedit.output import write_text

    delta = EditDelta.between({"w": torch.zeros(4)}, {"w": torch.ones(4)})
    for path, save in [(tmp_path / "a.safetensors", delta.save), (tmp_path / "a.md", lambda p: write_text(p, "text"))]:
        left = killed(path)
        assert left.name.startswith(f".{path.name}.")
        save(path)
        assert not left.exists()
        assert path.is_file()
    assert unfinished_name(tmp_path / "a.md").parent == tmp_path
