"""Check the types that a user of the package sees: no public symbol may have an unknown type.

pyright --verifytypes reads the package as an installed, typed library. The completeness score is the fraction of
symbols whose type every type checker infers in the same way. The score must not fall below SCORE.

Usage: make lint, or python .ci/public_types.py [--list]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCORE = 0.96


def verify() -> dict[str, Any]:
    """Return what pyright reports about the types of the package."""
    # In this mode, pyright looks for packages in the Python that it finds first in PATH.
    folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = [folder / "pyright", "--verifytypes", "kedit_train", "--ignoreexternal", "--outputjson"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return json.loads(ended.stdout)["typeCompleteness"]


def main() -> int:
    report = verify()
    score = report["completenessScore"]
    exported = [symbol for symbol in report["symbols"] if symbol["isExported"]]
    unknown = [s for s in exported if not s["isTypeKnown"] and not s["isTypeAmbiguous"]]
    incomplete = [s for s in exported if not s["isTypeKnown"] or s["isTypeAmbiguous"]]
    listed = incomplete if "--list" in sys.argv else unknown
    for symbol in listed:
        message = next((d["message"] for d in symbol["diagnostics"]), "unknown type")
        print(f"{symbol['name']}: {' '.join(message.split())}")
    print(f"types of {len(exported)} public symbols: score {score:.3f}, unknown {len(unknown)}")
    if unknown or score < SCORE:
        print(f"error: expected no symbol of unknown type and a score of at least {SCORE}; annotate the symbols that "
              "python .ci/public_types.py --list prints", file=sys.stderr)  # fmt: skip
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
