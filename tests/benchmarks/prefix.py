"""Time saved by PrefixCache: the stock frozen step, the same with the loss head, and with the cache as well.

python tests/benchmarks/prefix.py [--layer 9] [--rounds 7] [--dtype float32] [--device cpu] [--clock cpu]

The model is a Llama with random weights; one down-projection matrix is trained. In every round, each variant takes one
step on the same batch, so other load on the machine slows all of them. Ratios are medians over rounds. ``--clock cpu``
counts the processor seconds of the process.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from kedit_train.callbacks import ParameterScope, PrefixCache, TokenLoss, editing


def build(options: argparse.Namespace) -> Any:
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.width,
        intermediate_size=options.width * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 64,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(options.device, getattr(torch, options.dtype)).train()


def batches(options: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """Return batches of prompts with a target of a few tokens at the end, which alone is supervised."""
    made = []
    for _ in range(options.batches):
        ids = torch.randint(options.vocab, (options.batch_size, options.length), device=options.device)
        labels = ids.clone()
        labels[:, : -options.targets] = -100
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def stepper(
    model: Any, callbacks: list[Any], stack: ExitStack, clock: Callable[[], float]
) -> Callable[[dict[str, torch.Tensor]], float]:
    """Return a function that takes one step and returns its seconds."""
    edit = stack.enter_context(editing(model, callbacks, log_every_n_steps=10**9))
    optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-4)

    def step(batch: dict[str, torch.Tensor]) -> float:
        started = clock()
        edit.before_step()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if batch["labels"].is_cuda:
            torch.cuda.synchronize()
        return clock() - started

    return step


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of each round for every variant."""
    model, data = build(options), batches(options)

    def scope() -> ParameterScope:
        return ParameterScope(options.layer, modules="mlp.down_proj", full_precision=False)

    variants: dict[str, list[Any]] = {
        "stock, frozen to the scope": [scope()],
        "with the loss head": [scope(), TokenLoss()],
        "with the loss head and PrefixCache": [scope(), TokenLoss(), PrefixCache()],
        "stock loss and PrefixCache": [scope(), PrefixCache()],
    }
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    with ExitStack() as stack:
        steps = {name: stepper(copy.deepcopy(model), made, stack, clock) for name, made in variants.items()}
        for batch in data:
            # The first epoch fills the cache and warms everything up.
            for step in steps.values():
                step(batch)
        taken: dict[str, list[float]] = {name: [] for name in steps}
        for round_ in range(options.rounds):
            for name, step in steps.items():
                taken[name].append(step(data[round_ % len(data)]))
    return taken


def table(taken: dict[str, list[float]]) -> str:
    first = next(iter(taken.values()))
    lines = ["| step | seconds, median | stock / this, median of the rounds (least, greatest) |", "|---|---|---|"]
    for name, seconds in taken.items():
        ratios = [a / b for a, b in zip(first, seconds, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
        lines.append(f"| {name} | {statistics.median(seconds):.4f} | {spread} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"layers": 12, "width": 768, "vocab": 32000, "layer": 9, "batch_size": 16, "length": 32, "targets": 4}
    for name, default in (numbers | {"batches": 2, "rounds": 7, "threads": 1}).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = (
        torch.cuda.get_device_name()
        if options.device == "cuda"
        else f"CPU, {options.threads} thread(s), {options.clock} time"
    )
    print(
        f"Llama of {options.layers} layers, width {options.width}, vocabulary {options.vocab}, {options.dtype}; "
        f"{options.batch_size} x {options.length} tokens, {options.targets} of them supervised, layer {options.layer}; "
        f"{machine}; torch {torch.__version__}\n"
    )
    print(table(measure(options)))


if __name__ == "__main__":
    main()
