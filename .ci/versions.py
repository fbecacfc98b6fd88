"""Run the tests with the oldest or the newest versions of all dependencies, and record the result in docs/versions.md.

The script creates a new environment for the versions. "oldest" installs the versions of constraints-lowest.txt with the
oldest Python that kedit-train supports. "newest" installs the newest versions that fit together with the newest Python
that is tested. Here, a warning is not an error: a name that one version needs can be deprecated in another version.

Usage: make test-oldest or make test-newest, or
python .ci/versions.py oldest|newest [--python COMMAND] [--folder FOLDER] [--no-install] [-- PYTEST ARGUMENTS]
If PYTEST ARGUMENTS are given, they replace the default arguments of pytest, and the result is not recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "versions.md"
PYTHON = {"oldest": "python3.10", "newest": "python3.13"}
# The same arguments as in `make test`.
ALL = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "-m", "not slow"]
# The packages in the table of docs/versions.md. Users choose the versions of these packages themselves.
LISTED = (
    *("torch", "transformers", "trl", "lightning", "accelerate", "peft", "datasets", "safetensors", "tokenizers"),
    *("jsonargparse", "torchmetrics", "wandb", "matplotlib", "gguf", "numpy"),
)


def install(which: str, python: str, folder: Path) -> None:
    """Create the environment, and install kedit-train with all extras that the tests use."""
    subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pins = ["--constraint", str(ROOT / "constraints-lowest.txt")] if which == "oldest" else []
    tools = ["peft", "pytest", "pytest-xdist", "hatchling"]
    subprocess.run([*pip, *pins, "--editable", ".[trl,wandb,report,gguf]", *tools], cwd=ROOT, check=True)


def installed(folder: Path) -> dict[str, str]:
    """Return the versions of Python and of all packages in the environment."""
    python = str(folder / "bin" / "python")
    listed = [python, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    packages = json.loads(subprocess.run(listed, capture_output=True, text=True, check=True).stdout)
    say = [python, "-c", "import platform; print(platform.python_version())"]
    own = subprocess.run(say, capture_output=True, text=True, check=True).stdout.strip()
    return {"python": own} | {one["name"].lower(): one["version"] for one in packages}


def test(folder: Path, arguments: list[str], report: Path) -> int:
    """Run the tests in the environment, and return the exit status of pytest."""
    report.parent.mkdir(parents=True, exist_ok=True)
    python = (folder / "bin" / "python").absolute()
    command = [str(python), "-m", "pytest", "-q", "-o", "filterwarnings=default", f"--junitxml={report}", *arguments]
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=os.environ | own).returncode


def counts(report: Path) -> dict[str, int]:
    """Return how many tests passed, failed and were skipped."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    read = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = read["failures"] + read["errors"]
    return {"passed": read["tests"] - failed - read["skipped"], "failed": failed, "skipped": read["skipped"]}


def record(which: str, found: dict[str, int], versions: dict[str, str]) -> None:
    """Write the result and the versions into the section of docs/versions.md for "oldest" or "newest"."""
    result = ", ".join(f"{number} {word}" for word, number in found.items())
    names = [("Python", versions["python"]), *((name, versions[name]) for name in LISTED if name in versions)]
    section = f"{date.today()}: {result}.\n\n| package | version |\n|---|---|\n"
    section += "".join(f"| {name} | {version} |\n" for name, version in names)
    begin, end = f"<!-- {which}: written by .ci/versions.py -->", f"<!-- {which}: end -->"
    text = PAGE.read_text(encoding="utf-8")
    pattern = f"{re.escape(begin)}.*?{re.escape(end)}"
    PAGE.write_text(re.sub(pattern, f"{begin}\n{section}\n{end}", text, flags=re.DOTALL), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=list(PYTHON))
    parser.add_argument("--python", help="the Python to use; by default python3.10 for oldest, python3.13 for newest")
    parser.add_argument("--folder", type=Path, help="the folder of the environment; by default .venv-WHICH")
    parser.add_argument("--no-install", action="store_true", help="use an environment that exists, and install nothing")
    parser.add_argument("tests", nargs="*", metavar="PYTEST ARGUMENTS", help="for example -- -x tests/core")
    args = parser.parse_args()
    folder = args.folder or ROOT / f".venv-{args.which}"
    if not args.no_install:
        install(args.which, args.python or PYTHON[args.which], folder)
    report = ROOT / "runs" / "versions" / f"{args.which}.xml"
    status = test(folder, args.tests or ALL, report)
    if report.is_file() and not args.tests:
        record(args.which, counts(report), installed(folder))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
