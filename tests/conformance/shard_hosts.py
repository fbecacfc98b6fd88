"""Train under FSDP2 in Lightning and in Fabric on the processes that torchrun started, or unsharded in one process."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from conformance.hosts import PlainModule, collator
from conformance.settings import TEXTS
from conformance.shards import BATCH, STEPS, scope, smoothing
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from kedit_train import world
from kedit_train.callbacks import GradientMask, NullSpace, PolyakStep, SaveDelta, editing
from kedit_train.core.fsdp import full_tensor
from kedit_train.data import EditDataset


def callbacks(path: Path) -> list[Any]:
    mask = GradientMask("magnitude", density=0.5)
    return [scope(), smoothing(), NullSpace(texts=TEXTS, batch_size=1), PolyakStep(0.05), mask, SaveDelta(str(path))]


def strategy(size: int, network: Any) -> Any:
    if size == 1:
        return "auto"
    kind = L.fabric.strategies if network else L.pytorch.strategies
    options = {"parallelize_fn": shard_network} if network else {}
    return kind.ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1, **options)


def shard_network(model: Any, mesh: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


class ShardedModule(PlainModule):
    def configure_model(self) -> None:
        if self.device_mesh is None or isinstance(next(self.parameters()), torch.distributed.tensor.DTensor):
            return
        for layer in self.network.model.layers:
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.network, mesh=self.device_mesh["data_parallel"])


def batches(tokenizer: Any, rank: int, size: int) -> DataLoader[Any]:
    rows = EditDataset(world.edits(n=BATCH * STEPS)).encode(tokenizer)
    own = [row for start in range(0, len(rows), BATCH) for row in rows[start : start + BATCH][rank::size]]
    return DataLoader(own, batch_size=BATCH // size, collate_fn=collator(tokenizer))  # type: ignore[arg-type]


def in_lightning(model: Any, tokenizer: Any, path: Path, rank: int, size: int) -> None:
    trainer = L.Trainer(
        max_steps=STEPS,
        callbacks=callbacks(path),
        accelerator="cpu",
        devices=size,
        strategy=strategy(size, False),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(ShardedModule(model, tokenizer), batches(tokenizer, rank, size))


def in_fabric(model: Any, tokenizer: Any, path: Path, rank: int, size: int) -> None:
    fabric = L.Fabric(accelerator="cpu", devices=size, strategy=strategy(size, True))
    fabric.launch()
    with editing(model, callbacks(path), tokenizer=tokenizer) as edit:
        wrapped = fabric.setup_module(model)
        optimizer = fabric.setup_optimizers(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
        for batch in batches(tokenizer, rank, size):
            edit.before_step()
            fabric.backward(wrapped(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()


HOSTS = {"Lightning": in_lightning, "Fabric": in_fabric}


def main(folder: Path) -> None:
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    for name, host in HOSTS.items():
        torch.manual_seed(0)
        model, tokenizer = world.load()
        model.to(torch.float64).train()
        host(model, tokenizer, folder / f"{name}-{size}.delta.safetensors", rank, size)
        weights = {n: full_tensor(p.detach()).clone() for n, p in model.named_parameters()}
        save_file(weights, folder / f"{name}-{size}-{rank}.safetensors")
    if size > 1:
        gc.collect()
        dist.barrier()
        # Gloo may abort the process during an ordinary exit, after the work is done.
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
