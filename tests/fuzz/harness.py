"""Run fuzzers: each input must give a result or a one-line error, in bounded time and memory."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from kedit_train import EditError

# The time for all fuzzers together. Each fuzzer takes an equal part.
SECONDS = float(os.environ.get("KEDIT_FUZZ_SECONDS", "6"))
SEED = int(os.environ.get("KEDIT_FUZZ_SEED", "0"))
# The most CPU time in seconds for one file, and the most memory in KiB. A small file must not keep a reader busy.
LIMIT, MEMORY = 5.0, 1 << 20


@dataclass(frozen=True)
class Fuzzer:
    """One kind of input.

    Args:
        name: the name of the fuzzer.
        file: the name of the file that is written.
        make: returns the content of a file, made with a random generator.
        use: reads the file and does what users do with it. Returns True if the result is that of the file before the
            mutation, and raises an AssertionError for a wrong result.
        refused: the smallest fraction of the files that must be refused, because a fuzzer should not test only valid
            files.
    """

    name: str
    file: str
    make: Callable[[random.Random], bytes]
    use: Callable[[Path], bool]
    refused: float = 0.2


class Hang(BaseException):
    """An input took too long. The class is not an ``Exception``, so the code under test does not catch it."""


def run(fuzzer: Fuzzer, content: bytes, folder: Path) -> str:
    """Use one file, and return "refused", "equal" or "accepted".

    Raises:
        AssertionError: reading the file neither succeeded nor raised a one-line error, or took too long or too much
            memory.
    """
    path = folder / fuzzer.file
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        # Waiting for the disk takes most of the time, and changes no result.
        with patch("os.fsync"), alarm(LIMIT), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outcome = "equal" if fuzzer.use(path) else "accepted"
    except EditError as error:
        check_message(str(error))
        outcome = "refused"
    except AssertionError:
        raise
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise AssertionError(f"raised {type(error).__name__}: {error}") from error
    for warning in caught:
        if warning.category is UserWarning:
            check_message(str(warning.message))
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert taken < MEMORY, f"took {taken >> 10} MiB of memory"
    return outcome


def check_message(message: str) -> None:
    assert "\n" not in message, f"more than one line: {message!r}"
    assert len(message) < 3000, f"{len(message)} characters: {message[:300]!r}"


def use_or_refuse(use: Callable[[], Any]) -> None:
    """Call a function that may refuse its arguments with a one-line error."""
    try:
        use()
    except EditError as error:
        check_message(str(error))


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise :class:`Hang` in the block after some seconds of CPU time, which other processes do not shorten."""

    def ring(*_: Any) -> None:
        raise Hang(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        # A signal that is still on its way would end the process if it had no handler.
        signal.signal(signal.SIGPROF, signal.SIG_IGN if before is signal.SIG_DFL else before)


def fuzz(fuzzer: Fuzzer, folder: Path, *, seconds: float, seed: int = SEED, least: int = 8) -> Counter[str]:
    """Run a fuzzer for some seconds, at least ``least`` files, and count the outcomes.

    Raises:
        AssertionError: a file failed. The message names its seed, and the file is still in ``folder``.
    """
    end, outcomes = time.monotonic() + seconds, Counter[str]()
    while time.monotonic() < end or outcomes.total() < least:
        content = fuzzer.make(random.Random(seed))
        try:
            outcomes[run(fuzzer, content, folder)] += 1
        except AssertionError as error:
            raise AssertionError(f"{fuzzer.name}, KEDIT_FUZZ_SEED={seed}: {error}") from error
        seed += 1
    return outcomes
