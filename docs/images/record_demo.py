"""Draw the picture of a run for the README: run the recipe quickstart, and draw what it prints.

python docs/images/record_demo.py        # takes about a minute, writes docs/images/demo.svg and runs/quickstart

The picture leaves out what other libraries print, and shows four of the answers.
"""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from kedit_train import Report

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMMAND = [str(Path(sys.executable).parent / "lightning"), "run", "recipes/quickstart.yaml"]
# The first words of the lines that kedit-train prints before the report.
OWN = ("edits ", "may change ", "callbacks ", "    ", "epoch ")


def main() -> None:
    ended = subprocess.run(COMMAND, cwd=ROOT, capture_output=True, text=True, check=True)
    own = [line for line in ended.stderr.splitlines() if line.startswith(OWN)]
    epochs = [line for line in own if line.startswith("epoch ")]
    console = Console(record=True, width=92, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print("[bold green]$[/] make demo\n")
    for line in (*(line for line in own if line not in epochs), epochs[0], epochs[len(epochs) // 2], epochs[-1], ""):
        console.print(Text(line))
    Report.load(ROOT / "runs" / "quickstart" / "report.json").print(console, answers=4)
    console.print(Text(ended.stdout.splitlines()[-1]))
    (HERE / "demo.svg").write_text(console.export_svg(title="lightning run recipes/quickstart.yaml"), encoding="utf-8")


if __name__ == "__main__":
    main()
