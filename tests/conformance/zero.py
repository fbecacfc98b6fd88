"""Train with DeepSpeed ZeRO-1 and ZeRO-2 on the processes that torchrun started, or in a plain loop in one process."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conformance.hosts import collator
from conformance.settings import TEXTS
from conformance.shards import BATCH, STEPS, scope, smoothing, subjects
from safetensors.torch import save_file

from kedit_train import world
from kedit_train.callbacks import (
    EditCallback,
    GradientMask,
    KLLocality,
    NormBall,
    NullSpace,
    PolyakStep,
    SaveDelta,
    WeightAnchor,
    editing,
)
from kedit_train.data import EditDataset
from kedit_train.errors import EditError


class SkipSecond(EditCallback):
    """Skips the second optimizer step."""

    skips = True

    def skip_step(self, run: Any) -> bool:
        return run.step == 1


CASES: dict[str, Callable[[], list[Any]]] = {
    "exact": lambda: [
        scope(),
        smoothing(),
        NormBall(2e-3),
        GradientMask("magnitude", density=0.5),
        KLLocality(texts=TEXTS, batch_size=2, weight=100.0),
        WeightAnchor(strength=10.0),
    ],
    "null space": lambda: [scope(), smoothing(), subjects(), NullSpace(texts=TEXTS, batch_size=1), PolyakStep(0.05)],
    # Two micro-batches per optimizer step.
    "accumulated": lambda: [
        scope(),
        smoothing(),
        NullSpace(texts=TEXTS, batch_size=1),
        # The weight is so large that the penalty dominates from the second step on.
        KLLocality(texts=TEXTS, batch_size=2, weight=1e5),
    ],
    "skipped": lambda: [scope(), smoothing(), SkipSecond(), NormBall(0.5, norm="l2")],
}


def configuration(stage: int, size: int, accumulate: int, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": BATCH // size // accumulate,
        "gradient_accumulation_steps": accumulate,
        # DeepSpeed clips gradients at 1.0 by default.
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        **more,
    }


def train(
    case: list[Any], stage: int, rank: int, size: int, *, accumulate: int = 1, edits: Any = None, **more: Any
) -> dict[str, torch.Tensor]:
    """Train and return the weights. Stage 0 is a plain loop."""
    torch.manual_seed(0)
    loaded, tokenizer = world.load()
    model: Any = loaded
    rows, put = (edits or EditDataset(world.edits(n=BATCH * STEPS))).encode(tokenizer), collator(tokenizer)
    model.train()
    with editing(model, case, tokenizer=tokenizer) as edit:
        optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-3, weight_decay=0.1)
        engine = None
        if stage:
            import deepspeed

            settings = configuration(stage, size, accumulate, **more)
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        for step in range(STEPS):
            batch = rows[BATCH * step : BATCH * (step + 1)][rank::size]
            edit.before_step()
            for part in range(accumulate):
                own = put(batch[part::accumulate])
                if engine is not None:
                    engine.backward(engine(**own).loss)
                    engine.step()
                else:
                    (model(**own).loss / accumulate).backward()
            if engine is None:
                optimizer.step()
                optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def main(folder: Path, stages: list[int]) -> None:
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        dist.init_process_group("gloo")
    for name, case in CASES.items():
        for stage in stages:
            delta = SaveDelta(str(folder / f"{name}-{stage}.delta.safetensors"))
            accumulate = 2 if name == "accumulated" else 1
            weights = train([*case(), delta], stage, rank, size, accumulate=accumulate)
            save_file(weights, folder / f"{name}-{stage}-{rank}.safetensors")
    if size > 1:
        refused: dict[str, str] = {}
        for name, stage, more in (("ZeRO-3", 3, {}), ("bf16", 1, {"bf16": {"enabled": True}})):
            try:
                train([scope(), smoothing()], stage, rank, size, **more)
            except EditError as error:
                refused[name] = str(error)
        (folder / f"refused-{rank}.json").write_text(json.dumps(refused))
        gc.collect()
        dist.barrier()
        # Gloo may abort the process during an ordinary exit, after the work is done.
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(stage) for stage in sys.argv[2:]])
