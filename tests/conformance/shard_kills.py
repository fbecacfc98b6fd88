"""Train under FSDP2 on the processes that torchrun started; kill them after a checkpoint, or continue from it.

``python -m conformance.shard_kills FOLDER kill`` writes a checkpoint after the second step and kills the processes.
``python -m conformance.shard_kills FOLDER resume`` trains without interruption, and then continues from the checkpoint.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conformance.hosts import collator
from conformance.settings import TEXTS
from conformance.shards import BATCH, STEPS, scope, shard, smoothing
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from kedit_train import world
from kedit_train.callbacks import NormBall, NullSpace, SaveDelta, SecondOrderLocality, WeightAnchor, editing
from kedit_train.core.fsdp import full_tensor
from kedit_train.core.state_file import load_state, save_state
from kedit_train.data import EditDataset

SAVED = 2


def callbacks(path: Path) -> list[Any]:
    kept = [NullSpace(texts=TEXTS, batch_size=1), SecondOrderLocality(texts=TEXTS, batch_size=1)]
    return [scope(), smoothing(), *kept, NormBall(0.05, norm="l2"), WeightAnchor(strength=5.0), SaveDelta(str(path))]


def train(folder: Path, name: str, rank: int, *, kill: bool = False, resume: bool = False) -> None:
    torch.manual_seed(0)
    loaded, tokenizer = world.load()
    model: Any = loaded
    rows, put = EditDataset(world.edits(n=BATCH * STEPS)).encode(tokenizer), collator(tokenizer)
    model.train()
    checkpoint = folder / "checkpoint"
    with editing(model, callbacks(folder / f"{name}.safetensors"), tokenizer=tokenizer) as edit:
        shard(model, "layers")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        if resume:
            weights, averages = get_state_dict(model, optimizer)
            dcp.load({"weights": weights, "averages": averages}, checkpoint_id=checkpoint)
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=averages)
            state = load_state(checkpoint)
            assert state is not None
            edit.load_state_dict(state)
        for step in range(SAVED if resume else 0, STEPS):
            edit.before_step()
            batch = rows[BATCH * step : BATCH * (step + 1)]
            model(**put(batch[rank::2])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if kill and step + 1 == SAVED:
                weights, averages = get_state_dict(model, optimizer)
                dcp.save({"weights": weights, "averages": averages}, checkpoint_id=checkpoint)
                state = edit.state_dict()
                if rank == 0:
                    save_state(checkpoint, state)
                dist.barrier()
                os.kill(os.getpid(), signal.SIGKILL)
    found = {name: full_tensor(p.detach()).clone() for name, p in model.named_parameters()}
    save_file(found, folder / f"{name}-{rank}-weights.safetensors")


def main(folder: Path, action: str) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    if action == "kill":
        train(folder, "killed", rank, kill=True)
    train(folder, "whole", rank)
    train(folder, "resumed", rank, resume=True)
    gc.collect()
    dist.barrier()
    # Gloo may abort the process during an ordinary exit, after the work is done.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
