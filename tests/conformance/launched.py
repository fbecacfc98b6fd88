"""Train a few steps in the training loop that the arguments name, and save what the run was.

A launcher starts this script: ``launched.py HOST FOLDER [DEVICES]``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conformance.hosts import HOSTS

from kedit_train import world
from kedit_train.callbacks import ParameterScope
from kedit_train.core.checksums import checksums
from kedit_train.core.processes import rank, world_size
from kedit_train.data import EditDataset
from kedit_train.errors import EditError
from kedit_train.processes import end_process_group


def main(host: str, folder: Path, devices: str = "") -> int:
    model, tokenizer = world.load()
    extra = {"devices": int(devices), "strategy": "ddp"} if devices else {}
    try:
        HOSTS[host](model, tokenizer, EditDataset(world.edits(n=8)), [ParameterScope(2)], 1, **extra)
    except EditError as error:
        # Processes that are not connected all have rank 0.
        name = os.environ.get("RANK", "0")
        (folder / f"refused-{name}.json").write_text(json.dumps(str(error)))
        return 1
    sums = checksums(p.detach() for p in model.parameters())
    (folder / f"run-{rank()}.json").write_text(json.dumps({"processes": world_size(), "weights": sums}))
    end_process_group()
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
    # Gloo may abort the process during an ordinary exit, after the work is done.
    sys.stdout.flush()
    os._exit(code)
