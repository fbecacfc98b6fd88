"""Draw the picture of a run for the README: run `make demo` first, then this script.

python docs/images/record_demo.py        # reads runs/quickstart/report.json, writes docs/images/demo.svg
"""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from kedit_train import Report

HERE = Path(__file__).resolve().parent
REPORT = HERE.parents[1] / "runs" / "quickstart" / "report.json"


def main() -> None:
    console = Console(record=True, width=92, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print("[bold green]$[/] make demo\n")
    Report.load(REPORT).print(console, answers=4)
    (HERE / "demo.svg").write_text(console.export_svg(title="lightning run recipes/quickstart.yaml"), encoding="utf-8")


if __name__ == "__main__":
    main()
