"""Train with callbacks in each host, on one process or on those that torchrun started, and save the weights.

All runs share one pair of processes, because starting processes costs more than a run.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conformance.hosts import ARGUMENTS, HOSTS, Rows, collator
from conformance.settings import ALL, TEXTS, load
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DistributedSampler
from transformers import Trainer, TrainingArguments

from kedit_train import world
from kedit_train.callbacks import GradientMask, KLLocality, NormBall, ParameterScope, TokenSmoothing, editing
from kedit_train.data import EditDataset
from kedit_train.errors import EditError

STEPS, BATCH = 3, 4
TOGETHER = "all constraints under AdamW"


def callbacks(name: str, edits: EditDataset) -> list[Any]:
    if name != TOGETHER:
        made = ALL[name](edits)
        scoped = any(isinstance(one, ParameterScope) for one in made)
        return made if scoped else [*made, ParameterScope(layers=0.5, modules="mlp.down_proj")]
    return [
        ParameterScope(layers="2-3", modules="mlp.down_proj"),
        TokenSmoothing(reduction="sample"),
        KLLocality(texts=TEXTS, batch_size=2),
        NormBall(2e-3),
        GradientMask(score="magnitude", density=0.5),
    ]


def even_edits(tokenizer: Any) -> EditDataset:
    """Return edits with the same number of supervised tokens, so that every host computes the same mean loss."""
    every = EditDataset(world.edits(n=8 * BATCH * STEPS))
    counts = [len(row.input_ids) - row.target_start for row in every.encode(tokenizer)]
    usual = Counter(counts).most_common(1)[0][0]
    chosen = [edit for edit, count in zip(every, counts, strict=True) if count == usual][: BATCH * STEPS]
    assert len(chosen) == BATCH * STEPS
    return EditDataset(chosen)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def options(host: str, name: str, rank: int, size: int) -> dict[str, Any]:
    """Return options for plain gradient descent. The first steps of Adam are signs, which amplify rounding."""
    each, plain = BATCH // size, name != TOGETHER
    if host in ("Trainer", "SFTTrainer"):
        spread = {"ddp_backend": "gloo"} if size > 1 else {}
        descent = {"optim": "sgd", "learning_rate": 0.05} if plain else {}
        return {"per_device_train_batch_size": each} | spread | descent
    optimizer = {"optimizer": sgd} if plain else {}
    if host == "Lightning":
        # The sampler that Lightning adds for several processes shuffles; its loader for one process does not.
        spread = {
            "devices": size,
            "strategy": "ddp" if size > 1 else "auto",
            "use_distributed_sampler": False,
            "sampler": lambda rows: DistributedSampler(rows, size, rank, shuffle=False),
        }
    else:
        spread = {"rank": rank, "processes": size}
        spread |= {"devices": size, "strategy": "ddp" if size > 1 else "auto"} if host == "Fabric" else {}
    return {"batch_size": each} | spread | optimizer


def refusal(run: Callable[[], Any]) -> str:
    """Return the error message of ``run``, and the number of optimizer steps before it."""
    stepped: list[Any] = []
    handle = register_optimizer_step_post_hook(lambda *_: stepped.append(1))
    try:
        run()
    except EditError as error:
        return f"after {len(stepped)} steps: {error}"
    finally:
        handle.remove()
    return "no error"


def fsdp1() -> None:
    """Wrap the model during an edit with FSDP1, which flattens and slices parameters."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, tokenizer = world.load()
    with editing(model, callbacks(TOGETHER, even_edits(tokenizer)), tokenizer=tokenizer) as edit:
        FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        edit.before_step()


def wrapped_first(within: bool) -> None:
    """Start an edit after DDP has wrapped the model."""
    model, tokenizer = world.load()
    wrapped = DistributedDataParallel(model)
    with editing(
        wrapped if within else model, callbacks("ParameterScope", even_edits(tokenizer)), tokenizer=tokenizer
    ) as e:
        for _ in range(2):
            e.before_step()
            wrapped(input_ids=torch.arange(8).unsqueeze(0), labels=torch.arange(8).unsqueeze(0)).loss.backward()
            torch.optim.SGD(e.parameters(), lr=0.1).step()


def added_late(**extra: Any) -> dict[str, torch.Tensor]:
    """Add callbacks to an existing trainer, so that they freeze parameters after accelerate has wrapped the model."""
    torch.manual_seed(0)
    model, tokenizer = world.load()
    edits = even_edits(tokenizer)
    extra |= options("Trainer", "ParameterScope", 0, dist.get_world_size())
    arguments = TrainingArguments(**({"output_dir": tempfile.mkdtemp(), "max_steps": STEPS} | ARGUMENTS | extra))
    arguments.remove_unused_columns = False
    trainer = Trainer(model, arguments, train_dataset=Rows(edits.encode(tokenizer)), data_collator=collator(tokenizer))
    for callback in callbacks("ParameterScope", edits):
        trainer.add_callback(callback)
    trainer.train()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def traps(folder: Path, rank: int) -> None:
    refused = {
        "fsdp1": refusal(fsdp1),
        "the model of DDP": refusal(lambda: wrapped_first(False)),
        "DDP itself": refusal(lambda: wrapped_first(True)),
        "a trainer": refusal(lambda: added_late(ddp_find_unused_parameters=False)),
    }
    save_file(added_late(), folder / f"late-{rank}.safetensors")
    (folder / f"refused-{rank}.json").write_text(json.dumps(refused))


def main(folder: Path) -> None:
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        # If only one rank fails, the other one gets an error after this time.
        dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    pairs = [tuple(pair) for pair in json.loads((folder / "pairs.json").read_text())]
    for name, host in pairs:
        torch.manual_seed(0)
        model, tokenizer = load(name)
        edits = even_edits(tokenizer)
        out = folder / f"{host}-{name}-{size}-{rank}"
        try:
            HOSTS[host](model, tokenizer, edits, callbacks(name, edits), STEPS, **options(host, name, rank, size))
        except Exception:
            out.with_suffix(".txt").write_text(traceback.format_exc())
            continue
        state = {name: p.detach().clone() for name, p in model.named_parameters()}
        save_file(state, out.with_suffix(".safetensors"))
    if size > 1:
        traps(folder, rank)
        gc.collect()
        dist.barrier()
        # Gloo may abort the process during an ordinary exit, after the work is done.
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
