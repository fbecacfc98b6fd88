"""Train in a plain loop under FSDP2 on the processes that torchrun started, or unsharded in one; save the results."""

from __future__ import annotations

import gc
import json
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conformance.hosts import collator
from conformance.settings import TEXTS
from conformance.shard_products import compared
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from kedit_train import world
from kedit_train.callbacks import (
    EditCallback,
    GradientMask,
    KLLocality,
    LowCurvature,
    NormBall,
    NullSpace,
    ParameterScope,
    PolyakStep,
    SaveDelta,
    SecondOrderLocality,
    SubjectTokens,
    SubjectValues,
    TokenSmoothing,
    WeightAnchor,
    editing,
)
from kedit_train.core.fsdp import full_tensor
from kedit_train.data import EditDataset
from kedit_train.errors import EditError

STEPS, BATCH = 3, 4


def scope() -> ParameterScope:
    return ParameterScope(layers="2-3", modules="mlp.down_proj")


def smoothing() -> TokenSmoothing:
    return TokenSmoothing(epsilon=0.01, reduction="sample")


def subjects() -> SubjectTokens:
    return SubjectTokens(edits=EditDataset(world.edits(n=BATCH * STEPS)))


def mask_by_gradient() -> GradientMask:
    return GradientMask("gradient", edits=EditDataset(world.edits(n=BATCH)))


def kfac() -> WeightAnchor:
    return WeightAnchor("kfac", strength=10.0, texts=TEXTS)


CASES: dict[str, Callable[[], list[Any]]] = {
    "exact": lambda: [scope(), NormBall(2e-3), GradientMask("magnitude", density=0.5), WeightAnchor(strength=10.0)],
    "l2": lambda: [
        scope(),
        NullSpace(texts=TEXTS, batch_size=1),
        NormBall(2e-2, norm="l2", per="scope"),
        WeightAnchor(strength=5.0, decoupled=False),
    ],
    "kl": lambda: [scope(), KLLocality(texts=TEXTS, batch_size=2, weight=100.0)],
    "smoothing": lambda: [scope(), smoothing()],
    # The head, tied to the embedding, is among the parameters that FSDP2 keeps gathered until the backward pass.
    "everything": lambda: [
        ParameterScope(modules="*"),
        smoothing(),
        KLLocality(texts=TEXTS, batch_size=2, weight=10.0),
    ],
    # With batches of one text, the second process has one batch less than the first one.
    "null space": lambda: [scope(), NullSpace(texts=TEXTS, batch_size=1), smoothing(), PolyakStep(0.05), subjects()],
    "curvature": lambda: [scope(), LowCurvature(texts=TEXTS, batch_size=1), kfac()],
    "fisher": lambda: [scope(), WeightAnchor("ewc", strength=100.0, texts=TEXTS), mask_by_gradient()],
    "subject values": lambda: [
        scope(),
        smoothing(),
        SubjectValues(texts=TEXTS, edits=EditDataset(world.edits(n=BATCH * STEPS)), batch_size=1),
    ],
    "second order": lambda: [scope(), smoothing(), SecondOrderLocality(texts=TEXTS, batch_size=1)],
}


class Gathered(EditCallback):
    """Records how many entries of gathered tensors exist at the same time while ``SaveDelta`` writes its file."""

    order = 94

    def attach(self, run: Any) -> None:
        self.most = 0
        self._alive: dict[int, int] = {}
        self._gather = DTensor.full_tensor

    def finish(self, run: Any) -> None:
        def full_tensor(tensor: Any, **options: Any) -> Tensor:
            whole = self._gather(tensor, **options)
            number = len(self._alive) + 1
            while number in self._alive:
                number += 1
            self._alive[number] = whole.numel()
            weakref.finalize(whole, self._alive.pop, number)
            self.most = max(self.most, sum(self._alive.values()))
            return whole

        DTensor.full_tensor = full_tensor

    def detach(self, run: Any) -> None:
        DTensor.full_tensor = self._gather


# Adam divides by the size of each gradient entry, which enlarges rounding errors. In fp64, they stay small.
IN_FP64 = ("null space", "curvature", "fisher", "second order", "subject values")


class Rows(EditCallback):
    """Records the metrics of every step, and logits of the edited, the reference and again the edited model."""

    order = 90

    def attach(self, run: Any) -> None:
        self.rows: list[dict[str, float]] = []

    def after_step(self, run: Any) -> None:
        self.rows.append(run.collect())

    @torch.no_grad()
    def finish(self, run: Any) -> None:
        ids = torch.arange(3, 11).unsqueeze(0)
        run.model.eval()
        now = run.model(input_ids=ids).logits
        with run.reference_model():
            before = run.model(input_ids=ids).logits
        self.answers = {"now": now, "before": before, "again": run.model(input_ids=ids).logits}


def shard(model: Any, style: str) -> None:
    if style in ("layers", "head", "resharded"):
        for layer in model.model.layers:
            fully_shard(layer)
    if style == "head":
        fully_shard(model.lm_head)
    fully_shard(model, reshard_after_forward=True if style == "resharded" else None)


def loss_of(model: Any, rows: Any, own: Any, size: int) -> Tensor:
    """Return the mean cross-entropy over the tokens of all processes, times the number of processes."""
    labels = own["labels"][:, 1:].flatten()
    logits = model(input_ids=own["input_ids"], attention_mask=own["attention_mask"]).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") * size / (rows["labels"] != -100).sum()


def train(
    case: list[Any],
    style: str,
    rank: int,
    size: int,
    *,
    before: bool = False,
    dtype: torch.dtype = torch.float32,
    loss: Any = None,
    edits: Any = None,
) -> dict[str, Tensor]:
    """Train and return the gathered weights. ``before`` shards the model before the edit begins."""
    torch.manual_seed(0)
    loaded, tokenizer = world.load()
    model: Any = loaded
    model.to(dtype)
    if style == "head":
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    rows, put = (edits or EditDataset(world.edits(n=BATCH * STEPS))).encode(tokenizer), collator(tokenizer)
    model.train()
    if before and size > 1:
        shard(model, style)
    with editing(model, case, tokenizer=tokenizer) as edit:
        if not before and size > 1:
            shard(model, style)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
        for step in range(STEPS):
            edit.before_step()
            batch = rows[BATCH * step : BATCH * (step + 1)]
            own = put(batch[rank * BATCH // size : (rank + 1) * BATCH // size])
            if loss is not None:
                loss(model, own).backward()
            elif any(isinstance(callback, TokenSmoothing) for callback in case):
                model(**own).loss.backward()
            else:
                loss_of(model, put(batch), own, size).backward()
            optimizer.step()
            optimizer.zero_grad()
    return {name: full_tensor(p.detach()).clone() for name, p in model.named_parameters()}


def refusal(case: list[Any], style: str, rank: int, size: int, **options: Any) -> str:
    stepped: list[Any] = []
    handle = register_optimizer_step_post_hook(lambda *_: stepped.append(1))
    try:
        train(case, style, rank, size, **options)
    except EditError as error:
        return f"after {len(stepped)} steps: {error}"
    finally:
        handle.remove()
    return "no error"


def past_the_outputs(model: Any, own: Any) -> Tensor:
    """Return a loss that is not computed from the output of the model, so that FSDP2 does not notice it."""
    caught: list[Tensor] = []
    handle = model.model.norm.register_forward_hook(lambda module, args, output: caught.append(output))
    model(**own)
    handle.remove()
    return caught[0].square().mean()


def main(folder: Path) -> None:
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        dist.init_process_group("gloo")
    for name, case in ((n, CASES[n]) for n in json.loads((folder / "cases.json").read_text())):
        for style in json.loads((folder / "styles.json").read_text()) if size > 1 else ("one",):
            rows, gathered = Rows(), Gathered()
            # One style is applied before the edit begins, the other one during it.
            dtype = torch.float64 if name in IN_FP64 else torch.float32
            saved = [gathered, SaveDelta(str(folder / f"{name}-{style}.delta.safetensors"))] if name == "exact" else []
            weights = train([*case(), rows, *saved], style, rank, size, before=style == "root", dtype=dtype)
            save_file(weights, folder / f"{name}-{style}-{rank}.safetensors")
            save_file(rows.answers, folder / f"{name}-{style}-{rank}-answers.safetensors")
            (folder / f"{name}-{style}-{rank}.json").write_text(json.dumps(rows.rows))
            if saved:
                (folder / f"gathered-{style}-{rank}.json").write_text(json.dumps(gathered.most))
    if size > 1:
        (folder / f"products-{rank}.json").write_text(json.dumps(list(compared(size))))
        refused = {}
        refused["head again"] = refusal(CASES["smoothing"](), "resharded", rank, size)
        refused["head alone"] = refusal(CASES["everything"](), "head", rank, size)
        refused["gradients"] = refusal([scope(), NormBall(1e-3)], "root", rank, size, loss=past_the_outputs)
        for before in (False, True):
            half = refusal([scope()], "layers", rank, size, before=before, dtype=torch.bfloat16)
            refused[f"half precision, {before}"] = half
        (folder / f"refused-{rank}.json").write_text(json.dumps(refused))
        gc.collect()
        dist.barrier()
        # Gloo may abort the process during an ordinary exit, after the work is done.
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
