"""Time variants of a task in turn in one process, and write their tables into RESULTS.md.

Variants take turns, so other load on the machine slows all of them, and ratios within a round stay comparable. The
default is wall-clock time. ``--clock cpu`` counts the processor seconds of the process, on which other load has little
effect.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).with_name("RESULTS.md")
_PREAMBLE = "# Measured\n\nWritten by `make bench`; each section is replaced by its own script.\n"

Taken = dict[str, list[float]]


def arguments(description: str | None, **numbers: int) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark and an integer option for each of ``numbers``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smallest sizes, to test that the benchmark runs")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to write the section into")
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser


def clock(options: argparse.Namespace) -> Callable[[], float]:
    """Return a clock in seconds that waits for the device."""
    read = time.process_time if options.clock == "cpu" else time.perf_counter

    def now() -> float:
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        return read()

    return now


def alternate(variants: Mapping[str, Callable[[], Any]], rounds: int, now: Callable[[], float]) -> Taken:
    """Return the seconds of each variant in each round. Each round starts with another variant."""
    taken: Taken = {name: [] for name in variants}
    order = list(variants)
    for round_ in range(rounds):
        first = round_ % len(order)
        for name in order[first:] + order[:first]:
            started = now()
            variants[name]()
            taken[name].append(now() - started)
    return taken


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return "median (minimum to maximum)"."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with its first column aligned to the left."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" + "|---:" * (len(head) - 1) + "|", *lines[1:]])


def machine(options: argparse.Namespace) -> str:
    """Return one line with date, machine, versions and clock."""
    if options.device.startswith("cuda"):
        where = torch.cuda.get_device_name()
    else:
        where = f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"
    timed = "processor seconds of the process" if options.clock == "cpu" else "wall clock"
    return f"{date.today()}, {where}, torch {torch.__version__}, {options.dtype}, {timed}."


def resident_peak() -> int:
    """Return the peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # A child process inherits ru_maxrss from its parent, so it is not used here.
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def record(title: str, body: str, options: argparse.Namespace) -> None:
    """Print a section and replace the section with this title in the results file, atomically."""
    section = f"## {title}\n\n{machine(options)}\n\n{body.strip()}\n"
    print(f"\n{section}", flush=True)
    old = options.results.read_text() if options.results.exists() else _PREAMBLE
    parts = re.split(r"^(?=## )", old, flags=re.MULTILINE)
    kept = [part.strip() for part in parts if not part.startswith(f"## {title}\n")]
    at = next((i for i, part in enumerate(parts) if part.startswith(f"## {title}\n")), len(kept))
    kept.insert(at, section.strip())
    unfinished = options.results.with_suffix(f".{os.getpid()}.unfinished")
    try:
        unfinished.write_text("\n\n".join(kept) + "\n")
        os.replace(unfinished, options.results)
    finally:
        unfinished.unlink(missing_ok=True)


class Stepwise:
    """A trainer of transformers or TRL that takes one optimizer step per call.

    Its loop runs in a thread, which waits after each step for the next call.

    Args:
        trainer: a ``Trainer``; its arguments must allow as many steps as there are calls.
    """

    def __init__(self, trainer: Any) -> None:
        from transformers import PrinterCallback, TrainerCallback

        self.trainer = trainer
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._ended, self._failed = False, list[BaseException]()
        self._thread: threading.Thread | None = None

        def pause(control: Any) -> None:
            self._done.release()
            self._go.acquire()
            control.should_training_stop |= self._ended

        class Pause(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                pause(control)

        trainer.remove_callback(PrinterCallback)
        # This callback is the last one, so that the work of all other callbacks belongs to the step.
        trainer.add_callback(Pause())

    def __call__(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._train, daemon=True)
            self._thread.start()
        else:
            self._go.release()
        self._done.acquire()
        if self._failed:
            raise self._failed[0]

    def close(self) -> None:
        """End the training."""
        self._ended = True
        if self._thread is not None:
            self._go.release()
            self._thread.join()

    def _train(self) -> None:
        try:
            self.trainer.train()
        except BaseException as error:
            self._failed.append(error)
        self._done.release()


def processor() -> str:
    with suppress(OSError):
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()
