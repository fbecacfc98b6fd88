"""Time of a training step: stock fine-tuning, LoRA, one edit at a time, and each feature of this package.

    python tests/benchmarks/step_time.py                          # 12 layers, width 768, vocabulary 32,000
    python tests/benchmarks/step_time.py --model wide             # vocabulary 151,936
    python tests/benchmarks/step_time.py --model 1b --device cuda --dtype bfloat16
    python tests/benchmarks/step_time.py --memory                 # peak memory, each variant in its own process

The model is a Llama with random weights. A step trains one down-projection matrix at three quarters of the depth on 16
sequences of about 32 tokens, 4 to 6 of them targets. All variants take one step each in turn. All but (e) run in an
unmodified ``SFTTrainer``. The first epoch, which fills caches, is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from paired import Stepwise, Taken, alternate, arguments, clock, ratios, record, resident_peak, spread, table
from workload import SIZES, edited_layer, llama, matrix, one_edit, rows_of, sft, twin, words

from kedit_train.callbacks import ActiveSet, GradientMask, KLLocality, NormBall, ParameterScope, PrefixCache, TokenLoss
from kedit_train.callbacks import TokenSmoothing as Smoothing

# Batches per epoch. With few of them, the first epoch ends soon.
BATCHES = 2
FULL, STOCK, LORA, SINGLE = (
    "(a) stock, every parameter",
    "(b) stock, frozen to the scope",
    "(c) stock, LoRA r=16 (q_proj, v_proj)",
    "(e) one edit, full logits, Adam",
)
SCOPE, BALL = "(d) ParameterScope", "(d) ParameterScope + GradientMask + NormBall"
PLAIN, SMOOTH = "(d) loss head, cross-entropy", "(d) loss head, TokenSmoothing"
ACTIVE, LOCALITY = f"{SMOOTH}, ActiveSet (nothing learned yet)", f"{SMOOTH}, KLLocality"
CACHE_STOCK, CACHE = "(d) PrefixCache, the host's loss", f"{SMOOTH}, PrefixCache"
CACHE_LOCALITY = f"{SMOOTH}, PrefixCache, KLLocality"
EVERYTHING = "(d) all of these"


class Workload:
    """A model and its examples, shared by all variants.

    Args:
        options: the options of the command line.
        model: the model and its tokenizer. None creates them.
        batches: number of batches in an epoch.
    """

    def __init__(
        self, options: argparse.Namespace, model: tuple[Any, Any] | None = None, batches: int = BATCHES
    ) -> None:
        self.options = options
        vocab = SIZES[options.model][2]
        self.model, self.tokenizer = model or (llama(options.model, options), words(vocab))
        self.layer, self.size = edited_layer(self.model), options.batch
        self.rows = rows_of(batches * self.size, vocab)
        # As many texts as examples in an epoch, of the same length, in words of the tokenizer.
        self.texts = [self.tokenizer.decode(r.input_ids) for r in rows_of(batches * self.size, vocab, seed=1)]
        self.text_tokens = sum(len(ids) for ids in self.tokenizer(self.texts)["input_ids"]) / batches
        self.edit_tokens = sum(len(row.input_ids) for row in self.rows) / batches
        self.target_tokens = sum(len(row.input_ids) - row.target_start for row in self.rows) / batches

    def variants(self) -> dict[str, Callable[[], Callable[[], Any]]]:
        """Return name -> function that sets a variant up and returns its step."""
        locality = lambda: KLLocality(self.texts, batch_size=self.size)  # noqa: E731
        mask, ball = (lambda: GradientMask(score="random")), NormBall
        exact = TokenLoss
        return {
            FULL: lambda: self._stock(None),
            STOCK: lambda: self._stock(self.layer),
            LORA: self._lora,
            SINGLE: self.single,
            SCOPE: self.ours(),
            BALL: self.ours(mask, ball),
            PLAIN: self.ours(exact),
            SMOOTH: self.ours(Smoothing),
            ACTIVE: self.ours(Smoothing, ActiveSet),
            LOCALITY: self.ours(Smoothing, locality),
            CACHE_STOCK: self.ours(PrefixCache),
            CACHE: self.ours(Smoothing, PrefixCache),
            CACHE_LOCALITY: self.ours(Smoothing, PrefixCache, locality),
            EVERYTHING: self.ours(Smoothing, PrefixCache, ActiveSet, mask, ball, locality),
        }

    def trainer(self, model: Any, **rest: Any) -> Any:
        return Stepwise(sft(model, self.rows, self.tokenizer, self.options, batch_size=self.size, lr=1e-5, **rest))

    def _stock(self, layer: int | None) -> Stepwise:
        return self.trainer(twin(self.model, layer))

    def _lora(self) -> Stepwise:
        from peft import LoraConfig

        lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return self.trainer(twin(self.model, self.layer), lora=lora)

    def ours(self, *callbacks: Callable[[], Any]) -> Callable[[], Stepwise]:
        def build() -> Stepwise:
            made = [ParameterScope(self.layer, modules="mlp.down_proj"), *(make() for make in callbacks)]
            return self.trainer(twin(self.model, self.layer), callbacks=made)

        return build

    def single(self) -> Callable[[], Any]:
        model = twin(self.model, self.layer)
        weight = matrix(model, self.layer)
        taken = (done for row in cycle(self.rows) for done in one_edit(model, weight, row, lr=1e-5))
        return lambda: next(taken)


def compared(work: Workload, taken: Taken) -> str:
    rows = []
    for name, seconds in taken.items():
        per_row = statistics.median(seconds) / (1 if name == SINGLE else work.size)
        each = [s / (1 if name == SINGLE else work.size) for s in seconds]
        stock = [s / work.size for s in taken[STOCK]]
        rows.append([name, f"{statistics.median(seconds):.4f}", f"{1000 * per_row:.1f}", spread(ratios(stock, each))])
    return table(["variant", "s a step", "ms a row", "times as fast as (b), by the row"], rows)


def bars(work: Workload, taken: Taken) -> str:
    """Return the table of ratios with their targets."""

    def locality(name: str, without: str, own: str) -> list[float]:
        added = [a - b for a, b in zip(taken[name], taken[without], strict=True)]
        per_edit_token = [s / work.edit_tokens for s in taken[own]]
        return ratios([s / work.text_tokens for s in added], per_edit_token)

    rows = [
        ["ParameterScope + GradientMask + NormBall / (b)", spread(ratios(taken[BALL], taken[STOCK])), "<= 1.05"],
        ["the same / ParameterScope alone", spread(ratios(taken[BALL], taken[SCOPE])), "<= 1.05"],
        ["TokenSmoothing / cross-entropy, in the loss head", spread(ratios(taken[SMOOTH], taken[PLAIN])), "<= 1.10"],
        ["KLLocality, a text's token / (b), an edit's token", spread(locality(LOCALITY, SMOOTH, STOCK)), "<= 1.1"],
        ["KLLocality / our step with the loss head, the same", spread(locality(LOCALITY, SMOOTH, SMOOTH)), "<= 1.1"],
        ["KLLocality / (b), with PrefixCache, the same", spread(locality(CACHE_LOCALITY, CACHE, STOCK)), ""],
        ["(b) / PrefixCache with TokenSmoothing", spread(ratios(taken[STOCK], taken[CACHE])), ">= 3"],
        ["(b) / PrefixCache with the host's loss", spread(ratios(taken[STOCK], taken[CACHE_STOCK])), ""],
    ]  # fmt: skip
    return table(["ratio", "median (least to greatest)", "bar"], rows)


def measure(options: argparse.Namespace) -> None:
    work, built, taken = Workload(options), dict[str, Any](), Taken()
    chosen = {n: v for n, v in work.variants().items() if options.only is None or any(o in n for o in options.only)}
    try:
        for name, build in chosen.items():
            built[name] = build()
            for _ in range(BATCHES + 1):
                built[name]()
        taken = alternate(built, options.rounds, clock(options))
    finally:
        for step in built.values():
            if isinstance(step, Stepwise):
                step.close()
    layers, width, vocab, *_ = SIZES[options.model]
    what = (
        f"Llama of {layers} layers, width {width}, vocabulary {vocab:,}; {work.size} sequences and "
        f"{work.edit_tokens:.0f} tokens a step, {work.target_tokens:.0f} of them targets; layer {work.layer}; "
        f"texts of KLLocality: {work.text_tokens:.0f} tokens a step; {options.rounds} rounds."
    )
    body = f"{what}\n\n{compared(work, taken)}" + (f"\n\n{bars(work, taken)}" if options.only is None else "")
    record(f"Time of a step, {options.model}", body, options)


def peak(options: argparse.Namespace, name: str) -> None:
    """Print the memory of this process in MB before the first step, and its peak."""
    work = Workload(options)
    step = work.variants()[name]()
    before = _resident(options)
    for _ in range(2 * BATCHES):
        step()
    print(json.dumps([before, _resident(options)]), flush=True)
    # The thread of the trainer waits for its next step.
    os._exit(0)


def _resident(options: argparse.Namespace) -> float:
    if options.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e6
    return resident_peak() / 1e6


def memory(options: argparse.Namespace) -> None:
    rows = []
    for name in (FULL, STOCK, LORA, SINGLE, SMOOTH, CACHE, EVERYTHING):
        command = [sys.executable, __file__, "--model", options.model, "--device", options.device]
        command += ["--dtype", options.dtype, "--batch", str(options.batch), "--one", name]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        start, most = json.loads(found.stdout.splitlines()[-1])
        rows.append([name, f"{most:,.0f}", f"{most - start:,.0f}"])
    record(
        f"Peak memory of a step, {options.model}",
        f"Of the whole process ({'resident' if options.device == 'cpu' else 'allocated on the GPU'}), and the increase "
        f"after the model and the trainer were created; {options.batch} sequences of about 32 tokens.\n\n"
        + table(["variant", "peak, MB", "above the start, MB"], rows),
        options,
    )


def main() -> None:
    parser = arguments(__doc__, rounds=7, batch=16)
    parser.add_argument("--model", choices=list(SIZES), default="small")
    parser.add_argument("--only", nargs="+", help="only variants whose names contain one of these")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.model, options.rounds, options.batch = "tiny", 2, 4
    if options.one:
        peak(options, options.one)
    elif options.memory:
        memory(options)
    else:
        measure(options)


if __name__ == "__main__":
    main()
