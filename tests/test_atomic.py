"""Files and folders are written completely or not at all, and leftovers of killed writers are removed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kedit_train import EditDataset, EditDelta, EditError, owners
from kedit_train.atomic_write import check_writable, unfinished_name, writing
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


def leftover_of_killed(path: Path, kind: str = "file") -> Path:
    """Kill a process while it writes ``path``, and return what it leaves."""
    before = set(path.parent.iterdir())
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), kind], check=False)
    assert done.returncode == -signal.SIGKILL
    (leftover,) = set(path.parent.iterdir()) - before
    return leftover


def fail(path: Path, folder: bool = False) -> None:
    with writing(path) as unfinished:
        if folder:
            unfinished.mkdir()
        (unfinished / "part" if folder else unfinished).write_text("half")
        raise KeyError


def test_an_error_leaves_the_previous_file(tmp_path):
    path = tmp_path / "new" / "scores.json"
    with writing(path) as unfinished:
        assert not path.exists()
        unfinished.write_text("complete")
    with pytest.raises(KeyError):
        fail(path)
    assert path.read_text() == "complete"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "model"
    with pytest.raises(KeyError):
        fail(path, folder=True)
    assert list(tmp_path.iterdir()) == []
    with writing(path) as unfinished:
        (unfinished / "deep").mkdir(parents=True)
        (unfinished / "deep" / "weights").write_text("complete")
        assert not path.exists()
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.*")] == []
    assert (path / "deep" / "weights").read_text() == "complete"


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL exists on POSIX only")
def test_the_next_save_of_the_same_name_removes_leftovers(tmp_path):
    path = tmp_path / "edits.v1.jsonl"
    edits = EditDataset([Edit("The capital of Ruritania is", "Strelsau")])
    edits.save(path)
    leftover = leftover_of_killed(path)
    assert len(EditDataset.load(path)) == 1
    other, folder = leftover_of_killed(tmp_path / "other.jsonl"), leftover_of_killed(tmp_path / "model", "folder")
    # Names as version 0.2.0 wrote them. They do not say whether their writer is still running.
    here, remote = f"{socket.gethostname()}.{os.getppid()}", f"far.away.{os.getppid()}"
    in_progress = [tmp_path / f".edits.v1.jsonl.{writer}.unfinished" for writer in (here, remote)]
    for file in in_progress:
        file.write_text("half")
    edits.save(path)
    assert not leftover.exists()
    assert sorted(tmp_path.iterdir()) == sorted([path, other, folder, *in_progress])
    with writing(tmp_path / "model") as unfinished:
        assert not folder.exists()
        unfinished.mkdir()
    assert sorted(tmp_path.iterdir()) == sorted([path, other, tmp_path / "model", *in_progress])


def test_threads_that_save_one_path_do_not_disturb_each_other(tmp_path):
    path, errors = tmp_path / "scores.json", []

    def save(letter: str) -> None:
        try:
            for _ in range(20):
                with writing(path) as unfinished:
                    unfinished.write_text(letter * 10_000)
                assert path.read_text() in {other * 10_000 for other in "abc"}
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(letter,)) for letter in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="process ids are checked on POSIX only")
def test_a_writer_in_another_pid_namespace_is_left_alone_for_a_day(tmp_path, monkeypatch):
    """In another container, the same process id belongs to another process, or to none."""
    path = tmp_path / "scores.json"
    monkeypatch.setattr(owners, "_place", lambda: "another.place")
    live = unfinished_name(path)
    live.mkdir()
    monkeypatch.undo()
    with writing(path) as unfinished:
        unfinished.write_text("complete")
    assert live.exists()
    os.utime(live, (0, 0))
    with writing(path) as unfinished:
        unfinished.write_text("complete")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="process ids are checked on POSIX only")
def test_a_leftover_of_an_earlier_process_with_the_same_id_is_removed(tmp_path):
    """In a restarted container, the new process often has the id of the process that was killed."""
    path = tmp_path / "scores.json"
    leftover = unfinished_name(path)
    leftover.mkdir()
    owners.release(leftover)
    with writing(path) as unfinished:
        unfinished.write_text("complete")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="file permissions exist on POSIX only")
def test_written_files_have_the_permissions_of_any_new_file(tmp_path):
    import torch
    from safetensors.torch import save_file

    (tmp_path / "plain").write_text("text")
    EditDelta.between({"w": torch.zeros(4)}, {"w": torch.ones(4)}).save(tmp_path / "a.safetensors")
    with writing(tmp_path / "model") as unfinished:
        unfinished.mkdir()
        save_file({"w": torch.ones(4)}, unfinished / "model.safetensors")
    expected = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "a.safetensors").stat().st_mode == expected
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode == expected
    assert os.access(tmp_path / "model", os.X_OK)


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL exists on POSIX only")
def test_saving_a_delta_and_a_text_removes_leftovers(tmp_path):
    import torch

    from kedit_train.cli.kedit.output import write_text

    delta = EditDelta.between({"w": torch.zeros(4)}, {"w": torch.ones(4)})
    for path, save in [(tmp_path / "a.safetensors", delta.save), (tmp_path / "a.md", lambda p: write_text(p, "text"))]:
        leftover = leftover_of_killed(path)
        assert leftover.name.startswith(f".{path.name}.")
        save(path)
        assert not leftover.exists()
        assert path.is_file()
    assert unfinished_name(tmp_path / "a.md").parent == tmp_path


def test_checking_a_path_creates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_writable("new/folder/x.json")
    check_writable("x.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("folder", "folder cannot be written, because it is a folder"),
        ("file/x.json", "file is not a folder"),
        ("link/x.json", "link is not a folder"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(EditError, match=reason):
        check_writable(tmp_path / name)
