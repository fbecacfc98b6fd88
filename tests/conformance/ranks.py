"""Every host on the processes that torchrun started (or on one), the weights of each rank written to a folder."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conformance.hosts import HOSTS, collator
from conformance.resuming import TEXTS
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from kedit_train import world
from kedit_train.callbacks import GradientMask, KLLocality, NormBall, ParameterScope, TokenSmoothing, editing
from kedit_train.data import EditDataset
from kedit_train.errors import EditError

STEPS, BATCH = 3, 4


def callbacks() -> list[Any]:
    return [
        ParameterScope(layers="2-3", modules="mlp.down_proj"),
        TokenSmoothing(reduction="sample"),
        KLLocality(texts=TEXTS, batch_size=2),
        NormBall(2e-3),
        GradientMask(score="magnitude", density=0.5),
    ]


def loop(model: Any, tokenizer: Any, edits: EditDataset, used: list[Any], rank: int, size: int) -> None:
    rows, put = edits.encode(tokenizer), collator(tokenizer)
    model.train()
    with editing(model, used, tokenizer=tokenizer) as edit:
        optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-3)
        wrapped: Any = DistributedDataParallel(model) if size > 1 else model
        for step in range(STEPS):
            edit.before_step()
            batch = rows[BATCH * step : BATCH * (step + 1)]
            wrapped(**put(batch[rank * BATCH // size : (rank + 1) * BATCH // size])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    del wrapped


def refusals(tokenizer: Any, edits: EditDataset) -> str:
    """FSDP1 flattens and slices parameters: refused before the first step."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, _ = world.load()
    try:
        with editing(model, callbacks(), tokenizer=tokenizer) as edit:
            FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
            edit.before_step()
    except EditError as error:
        return str(error)
    return "not refused"


def main(folder: Path) -> None:
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    edits = EditDataset(world.edits(n=BATCH * STEPS))
    if size > 1:
        dist.init_process_group("gloo")
    each = BATCH // size
    ours: dict[str, Any] = {"per_device_train_batch_size": each} | ({"ddp_backend": "gloo"} if size > 1 else {})
    options: dict[str, dict[str, Any]] = {
        "Trainer": dict(ours),
        "SFTTrainer": dict(ours),
        # Lightning's own sampler for several processes would shuffle, which its loader for one does not.
        "Lightning": {
            "batch_size": each,
            "devices": size,
            "strategy": "ddp" if size > 1 else "auto",
            "use_distributed_sampler": False,
            "sampler": lambda rows: DistributedSampler(rows, size, rank, shuffle=False),
        },
    }
    for host in ("loop", *options):
        torch.manual_seed(0)
        model, tokenizer = world.load()
        if host == "loop":
            loop(model, tokenizer, edits, callbacks(), rank, size)
        else:
            HOSTS[host](model, tokenizer, edits, callbacks(), STEPS, **options[host])
        state = {name: p.detach().clone() for name, p in model.named_parameters()}
        save_file(state, folder / f"{host}-{size}-{rank}.safetensors")
    if size > 1:
        (folder / f"fsdp1-{rank}.txt").write_text(refusals(tokenizer, edits))
        gc.collect()
        dist.barrier()
        # Gloo can abort in its own teardown after everything is done.
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
