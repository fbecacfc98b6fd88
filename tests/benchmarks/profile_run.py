"""Where the time of a run of kedit_default (or another recipe) on SmolLM2 goes, and what its matrix products need.

python tests/benchmarks/profile_run.py --recipe kedit_default

Every second of processor time belongs to one phase. The floating-point operations of the matrix products are counted in
runs of one and two epochs. The first epoch also fills the prefix cache, and all later epochs do what the second does.
The measured rate of the machine is that of products [1000, 576] x [576, 1536] in fp32, the shape of the model's layers.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
from methods import Method, load_recipe
from paired import arguments, record, table
from phases import STATISTICS, Phases, Place, statistics_of_texts, timed
from settings import HELD_OUT, load, missing, smollm2
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode

from kedit_train import callbacks
from kedit_train.core.steps import OptimizerSteps
from kedit_train.evaluation import evaluate
from kedit_train.modes import train_loop

HEAD = ("phase", "seconds", "share", "TFLOP", "seconds at the measured rate", "times the rate")
ORDER = (
    "end of answers",
    STATISTICS,
    "forward",
    "penalty",
    "backward",
    "step and constraints",
    "rest of training",
    "evaluation",
)


def places(model: Any) -> list[Place]:
    """Return the methods of training, and their phases."""
    step = "step and constraints"
    return [
        *statistics_of_texts(),
        (callbacks.KLLocality, "penalty", "penalty"),
        (torch.Tensor, "backward", "backward"),
        (torch.optim.AdamW, "step", step),
        (torch.optim.Adam, "step", step),
        # The hooks before and after the step run outside of the optimizer's own method.
        (OptimizerSteps, "before_optimizer_step", step),
        (OptimizerSteps, "apply_constraints", step),
        (type(model), "forward", "forward"),
        (train_loop, "decide_together", "end of answers"),
    ]


def rate() -> float:
    """Return the operations per second of a product of the size of the model's layers."""
    left, right = torch.randn(1000, 576), torch.randn(576, 1536)
    best = 0.0
    for _ in range(20):
        began = time.process_time()
        for _ in range(10):
            left @ right
        best = max(best, 10 * 2 * 1000 * 576 * 1536 / (time.process_time() - began))
    return best


def profile(
    recipe: str, edits: int, texts: int | None, now: Callable[[], float], epochs: int | None
) -> dict[str, float]:
    """Train (and evaluate, if ``epochs`` is None), and return the total of each phase."""
    setting = smollm2(HELD_OUT)
    model, tokenizer = load(setting.path)
    chosen = setting.edits(edits)
    config = load_recipe(recipe, model=setting.name)
    method = Method(setting, model, tokenizer, recipe, config, chosen, "batch", texts)
    method.epochs = epochs or method.epochs
    phases = Phases(now)
    with timed(phases, places(model)):
        method(model, chosen)
    if epochs is None:
        with phases.phase("evaluation"):
            evaluate(model, tokenizer, chosen, progress=False)
    return phases.stop()


class _NoModules(contextlib.nullcontext):
    """Replaces the module tracker of the counter, whose hooks forbid ``autograd.grad`` inside a forward pass."""

    parents = frozenset({"Global"})


def operations(recipe: str, edits: int, texts: int | None, epochs: int) -> dict[str, float]:
    """Return the operations of each phase in one run of ``epochs`` epochs."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with counter:
        return profile(recipe, edits, texts, lambda: float(counter.get_total_flops()), epochs)


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__, edits=50, texts=3300)
    parser.add_argument("--recipe", default="kedit_default")
    options = parser.parse_args()
    if path := missing("smollm2"):
        print(f"the profile is left out, because {path} does not exist (make smollm2)")
        return
    torch.set_num_threads(1)
    edits, texts = (4, 40) if options.quick else (options.edits, options.texts)
    per_second = rate()
    steps = 0

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1

    handle = register_optimizer_step_post_hook(count)
    seconds = profile(options.recipe, edits, texts, time.process_time, None)
    handle.remove()
    one, two = (operations(options.recipe, edits, texts, epochs) for epochs in (1, 2))
    epochs = steps / -(-edits // smollm2().batch_size)
    flops = {name: one.get(name, 0.0) + (epochs - 1) * (two.get(name, 0.0) - one.get(name, 0.0)) for name in two}
    total, rows = sum(seconds.values()), []
    for name in ORDER:
        spent = seconds.get(name, 0.0)
        if not spent:
            continue
        ideal = flops.get(name, 0.0) / per_second
        counted = name != "evaluation" and ideal > 0
        shown = (f"{flops[name] / 1e12:.2f}", f"{ideal:.1f}", f"{spent / ideal:.1f}") if counted else ("-", "-", "-")
        rows.append((name, f"{spent:.1f}", f"{spent / total:.0%}", *shown))
    lines = [
        f"{edits} edits, {texts} texts, {steps} steps, one thread. "
        f"Measured rate: {per_second / 1e9:.0f} GFLOP/s. Processor time.",
        table(HEAD, rows),
    ]
    record(f"Where the time goes, {options.recipe}, SmolLM2", "\n\n".join(lines), options)


if __name__ == "__main__":
    main()
