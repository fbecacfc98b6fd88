"""Train with each callback under FSDP2 or DeepSpeed ZeRO-2 on the processes that torchrun started, or in one process.

``python -m conformance.sharded_table FOLDER STRATEGY`` saves the weights of each run, or its error message.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conformance import shards, zero
from conformance.ranks import even_edits
from conformance.settings import SETTINGS
from safetensors.torch import save_file

from kedit_train import world
from kedit_train.callbacks import ParameterScope, TokenLoss
from kedit_train.errors import EditError


def callbacks(name: str, edits: Any) -> list[Any]:
    made = [one for one in SETTINGS[name](edits) if not isinstance(one, ParameterScope)]
    losses = [] if any(isinstance(one, TokenLoss) for one in made) else [TokenLoss("cross_entropy")]
    return [*made, *losses, shards.scope()]


def train(name: str, strategy: str, edits: Any, rank: int, size: int) -> dict[str, torch.Tensor]:
    case = callbacks(name, edits)
    if strategy == "zero":
        return zero.train(case, 2 if size > 1 else 0, rank, size, edits=edits)
    # Steps of Adam enlarge the rounding errors of fp32, so fp64 is used. This is not possible with DeepSpeed, which
    # keeps fp32 copies of the weights.
    loss = lambda model, batch: model(**batch).loss  # noqa: E731
    return shards.train(case, "layers", rank, size, edits=edits, loss=loss, dtype=torch.float64)


def main(folder: Path, strategy: str) -> None:
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        dist.init_process_group("gloo")
    edits = even_edits(world.load()[1])
    for name in SETTINGS:
        path = folder / f"{name}-{size}-{rank}.safetensors"
        try:
            save_file(train(name, strategy, edits, rank, size), path)
        except EditError as error:
            path.with_suffix(".txt").write_text(str(error))
    (folder / f"done-{size}-{rank}").touch()
    if size > 1:
        gc.collect()
        dist.barrier()
        # Gloo may abort the process during an ordinary exit, after the work is done.
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
