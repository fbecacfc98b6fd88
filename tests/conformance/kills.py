"""Kill runs at every write, file operation and step, continue them in a new process, and compare the results.

As a script: ``KEDIT_KILLS=500 python -m conformance.kills FOLDER [HOST ...]`` kills at random and prints a table of the
boundaries. A child process is forked for each run, so the libraries are imported once.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conformance import killed_runs
from safetensors import safe_open
from torch.optim.optimizer import register_optimizer_step_post_hook

from kedit_train import EditDelta
from kedit_train.core.state_file import FILE, load_state
from kedit_train.delta import delta_file
from kedit_train.errors import EditError

# Audit events of Python for operations that change files. Compiled code (safetensors, torch) sends no events when it
# writes, but the operations before and after its writes are in this list.
_OPERATIONS = {
    "open",
    "os.chmod",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.truncate",
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# A run takes seconds. This limit is meant for a busy machine.
_SECONDS = 1800


class Outcome(NamedTuple):
    """The end of a run: SHA-256 of weights and delta, and the names of all files except older checkpoints."""

    weights: str
    delta: str
    files: list[str]


class Boundaries:
    """Counts the boundaries of this process: steps, and operations on files in the current directory.

    Args:
        kill_at: the number of the boundary before which the process kills itself. None records the boundaries.
    """

    def __init__(self, kill_at: int | None = None) -> None:
        self.kill_at, self.folder = kill_at, os.getcwd()
        self.passed: list[str] = []
        self._inside = False
        sys.addaudithook(self._audit)
        register_optimizer_step_post_hook(lambda *_: self.cross("step"))

    def cross(self, name: str) -> None:
        if self.kill_at == len(self.passed):
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed.append(name)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _OPERATIONS or self._inside:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITES):
            return
        self._inside = True
        try:
            paths = [os.path.abspath(os.fsdecode(a)) for a in arguments if isinstance(a, str | bytes | os.PathLike)]
            for path in paths:
                if path.startswith(self.folder + os.sep):
                    self.cross(f"{kind(path[len(self.folder) + 1 :])}: {event.removeprefix('os.')}")
                    break
        finally:
            self._inside = False


def kind(path: str) -> str:
    """Return what a path in the folder of a run belongs to."""
    if FILE in path:
        return "state"
    if killed_runs.DELTA in path:
        return "delta"
    return "cache" if path.startswith("cache") else "checkpoint"


def run_child(folder: Path, work: Callable[[], Any], *, kill_after: float | None = None) -> Any:
    """Run ``work`` in a forked process, in ``folder``.

    Args:
        folder: the current directory of the process.
        work: its result must be a JSON value.
        kill_after: seconds until the process is killed. None waits for its end.

    Returns:
        The result, or None if the process was killed.

    Raises:
        AssertionError: ``work`` raised an error, or does not end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    answer, log = folder.with_suffix(".json"), folder.with_suffix(".log")
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.chdir(folder)
            answer.write_text(json.dumps(work()))
            code = 0
        except BaseException:
            log.write_text(traceback.format_exc())
        finally:
            os._exit(code)
    started = time.monotonic()
    hung = False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        passed = time.monotonic() - started
        if passed > (_SECONDS if kill_after is None else kill_after):
            hung = kill_after is None
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.002)
    assert not hung, f"the run in {folder} did not end within {_SECONDS} seconds"
    if os.WIFSIGNALED(status):
        return None
    assert os.WEXITSTATUS(status) == 0, log.read_text()[-3000:]
    return json.loads(answer.read_text())


def outcome(weights: dict[str, torch.Tensor]) -> Outcome:
    """Return the state at the end of a run in the current directory, which is compared with that of other runs."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].contiguous().view(torch.uint8).numpy().tobytes())
    # The trainer does not go back to a checkpoint that it was deleting when it was killed.
    last = f"checkpoint-{killed_runs.STEPS}"
    files = sorted(
        p for p in map(str, Path().rglob("*")) if ".unfinished" in p or p.startswith(last) or "check" not in p
    )
    return Outcome(digest.hexdigest(), contents(Path(killed_runs.DELTA)), files)


def contents(path: Path) -> str:
    """Verify the checksum of a delta file, and return it."""
    EditDelta.load(path)
    # The bytes of the file cannot be compared, because safetensors writes the metadata in a random order.
    with safe_open(path, "pt") as file:
        return file.metadata()[f"{delta_file.KIND}.sha256"]


class Matrix:
    """Compares killed runs of one host with an uninterrupted run.

    Args:
        host: a name in ``killed_runs.RUNS``.
        folder: where the runs write.

    Attributes:
        boundaries: the names of all boundaries of the uninterrupted run, in their order.
        seconds: duration of the uninterrupted run.
    """

    def __init__(self, host: str, folder: Path) -> None:
        self.host, self.folder = host, folder / host
        # A first run in this process imports the modules that the trainer imports late, so that no child process
        # imports them.
        (self.folder / "first").mkdir(parents=True)
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
            patch.chdir(self.folder / "first")
            killed_runs.train(host)
        # Otherwise each child process would search all objects of this process for garbage.
        gc.freeze()
        self.seconds = time.monotonic()
        self.boundaries, whole = run_child(self.folder / "whole", self._record)
        self.seconds = time.monotonic() - self.seconds
        self.whole = Outcome(*whole)

    def _record(self) -> tuple[list[str], Outcome]:
        boundaries = Boundaries()
        weights = killed_runs.train(self.host)
        boundaries.cross("end")
        return boundaries.passed, outcome(weights)

    def _killed(self, at: int | None, resume: bool) -> None:
        boundaries = Boundaries(at)
        if resume:
            killed_runs.train_on(self.host)
        else:
            killed_runs.train(self.host)
        boundaries.cross("end")

    def _resumed(self) -> tuple[Outcome, list[str]]:
        weights, refused = killed_runs.train_on(self.host)
        return outcome(weights), refused

    def check(self, *kills: int | float) -> list[str]:
        """Kill a run, continue it in a new process, and compare the end.

        Args:
            kills: where to kill: the number of a boundary, or seconds after the start of the process as a float.
                The second and later kills hit the process that continues.

        Returns:
            The errors for incomplete checkpoints.

        Raises:
            AssertionError: the end differs from the end of the uninterrupted run.
        """
        folder = self.folder / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        for number, kill in enumerate(kills):
            at, seconds = (kill, None) if isinstance(kill, int) else (None, kill)
            # The boundary may be beyond the end of a run that continues.
            run_child(folder, lambda at=at, resume=number > 0: self._killed(at, resume), kill_after=seconds)
            self._check_files(folder)
        found, refused = run_child(folder, self._resumed)
        end = Outcome(*found)
        assert end.files == self.whole.files, sorted(set(end.files) ^ set(self.whole.files))
        assert end.weights == self.whole.weights, "the weights differ"
        assert end.delta == self.whole.delta, "the delta differs"
        shutil.rmtree(folder)
        return refused

    def _check_files(self, folder: Path) -> None:
        """Check the files of a killed run: a delta is complete, and a state of the edit can be read."""
        delta = folder / killed_runs.DELTA
        assert not delta.exists() or contents(delta) == self.whole.delta, "the killed run has left a wrong delta"
        for path in folder.rglob(f"*{FILE}"):
            unfinished = any(part.endswith(".unfinished") for part in path.parts)
            try:
                load_state(path.parent, file=path.name)
            except EditError:
                assert unfinished, f"the killed run has left a damaged state in {path}"


def random_kills(folder: Path, hosts: list[str], count: int, seed: int = 0) -> dict[str, Any]:
    """Kill ``count`` runs at random. Return the counts by host and boundary, and the failures."""
    draw = random.Random(seed)
    matrices = {host: Matrix(host, folder) for host in hosts}
    kills: Counter[str] = Counter()
    failures = []
    # EditSFTTrainer evaluates the edits during the run, which takes three times as long.
    weights = [1 if host == "EditSFTTrainer" else 3 for host in hosts]
    for number in range(count):
        matrix = matrices[draw.choices(hosts, weights)[0]]
        chosen: list[int | float] = []
        for _ in range(draw.choice((1, 1, 1, 2))):
            if draw.random() < 0.3:
                chosen.append(draw.random() * matrix.seconds)
            else:
                # The kind of boundary is drawn before its place, so that rare kinds are hit as often as frequent kinds.
                name = draw.choice(sorted({boundary.split(":")[0] for boundary in matrix.boundaries}))
                chosen.append(draw.choice([i for i, b in enumerate(matrix.boundaries) if b.split(":")[0] == name]))
        what = matrix.boundaries[chosen[0]].split(":")[0] if isinstance(chosen[0], int) else "any moment"
        kills[f"{matrix.host}, {what}{', killed again' if len(chosen) > 1 else ''}"] += 1
        try:
            matrix.check(*chosen)
        except AssertionError as error:
            places = [matrix.boundaries[kill] if isinstance(kill, int) else f"{kill:.3f} s" for kill in chosen]
            failures.append(f"{matrix.host}, {chosen} ({', '.join(places)}): {error}")
            print(failures[-1], flush=True)
            kept = matrix.folder / f"failed-{number}"
            if (matrix.folder / "killed").exists():
                (matrix.folder / "killed").rename(kept)
        if (number + 1) % 10 == 0:
            print(f"{number + 1} kills, {len(failures)} failures", flush=True)
    return {"kills": dict(sorted(kills.items())), "failures": failures}


def main() -> None:
    torch.set_num_threads(1)
    hosts = sys.argv[2:] or list(killed_runs.RUNS)
    found = random_kills(
        Path(sys.argv[1]), hosts, int(os.environ.get("KEDIT_KILLS", "60")), int(os.environ.get("KEDIT_SEED", "0"))
    )
    print(json.dumps(found, indent=2))
    sys.exit(bool(found["failures"]))


if __name__ == "__main__":
    main()
