"""Time of the quickstart from the command to its report, each time in a new process.

python tests/benchmarks/quickstart.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from paired import arguments, record, spread

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    options = parser.parse_args()
    command = [sys.executable, "-m", "kedit_train", "fit", "--config", str(ROOT / "recipes" / "quickstart.yaml")]
    if options.quick:
        options.rounds = 1
        command += ["--trainer.max_epochs", "1", "--data.limit", "2"]
    # Wall-clock time, because the processor seconds of single child processes cannot be separated.
    options.clock = "wall"
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            started = time.perf_counter()
            subprocess.run(command, check=True, cwd=folder, capture_output=True)
            seconds.append(time.perf_counter() - started)
    record(
        "Quickstart", f"{spread(seconds, 1)} s from the command to the end of the report. Target: below 60 s.", options
    )


if __name__ == "__main__":
    main()
