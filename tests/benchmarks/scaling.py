"""Time of an epoch for more edits, and of a step for a deeper edited layer.

    python tests/benchmarks/scaling.py                 # 100, 1,000 and 10,000 edits; depths of 12 layers
    python tests/benchmarks/scaling.py --only edits

The number of edits is varied with stories260K, where almost all time is overhead. The depth is varied with a Llama with
random weights, 12 layers, width 768 and a vocabulary of 32,000.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from paired import Taken, alternate, arguments, clock, ratios, record, spread, table
from torch.utils.data import RandomSampler
from workload import SIZES, STORIES, counterfact, llama, plain_loop, rows_of, twin

from kedit_train.callbacks import ActiveSet, ParameterScope, PrefixCache, TokenSmoothing
from kedit_train.data.length_buckets import LengthBuckets
from kedit_train.data.tokenization import Encoded, pad_token_id

BATCH = 32


def loops(
    model: Any, rows: list[Encoded], pad_id: int, layer: int, batch_size: int, stack: ExitStack, *, buckets: bool
) -> dict[str, Callable[[], Any]]:
    """Return name -> step of a plain loop, each on a model with its own trained matrix."""
    lengths = [len(row.input_ids) for row in rows]

    def bucketed() -> Any:
        return iter(LengthBuckets(RandomSampler(rows), batch_size, False, lengths))

    def scope() -> ParameterScope:
        return ParameterScope(layer, modules="mlp.down_proj")

    made: dict[str, tuple[list[Any], Any]] = {
        "stock, frozen to the scope": ([scope()], None),
        "loss head": ([scope(), TokenSmoothing()], None),
        "loss head, PrefixCache": ([scope(), TokenSmoothing(), PrefixCache()], None),
    }
    if buckets:
        made["loss head, PrefixCache, ActiveSet"] = [scope(), TokenSmoothing(), PrefixCache(), ActiveSet()], None
        made["loss head, PrefixCache, LengthBuckets"] = [scope(), TokenSmoothing(), PrefixCache()], bucketed
        made["stock, LengthBuckets"] = [scope()], bucketed
    return {
        name: stack.enter_context(
            plain_loop(twin(model, layer), rows, pad_id, callbacks, lr=1e-5, batch_size=batch_size, batches=batches)
        )
        for name, (callbacks, batches) in made.items()
    }


def against_edits(options: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not STORIES.exists():
        raise SystemExit(f"this benchmark needs stories260K at {STORIES}")
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).to(options.device).train()
    tokenizer, now = AutoTokenizer.from_pretrained(STORIES), clock(options)
    layer = model.config.num_hidden_layers * 3 // 4
    rows = []
    for count in (32, 64) if options.quick else (100, 1000, 10_000):
        encoded = counterfact(count).encode(tokenizer)
        steps = -(-len(encoded) // BATCH)
        with ExitStack() as stack:
            step_of = loops(model, encoded, pad_token_id(tokenizer), layer, BATCH, stack, buckets=True)
            epochs = {n: (lambda s=step, k=steps: [s() for _ in range(k)]) for n, step in step_of.items()}
            first = alternate(epochs, 1, now)
            taken = alternate(epochs, max(1, min(options.rounds, 3000 // count)), now)
        for name, seconds in taken.items():
            stock = taken["stock, frozen to the scope"]
            each = statistics.median(seconds)
            rows.append(
                [
                    f"{len(encoded):,}, {name}",
                    f"{first[name][0]:.2f}",
                    f"{each:.2f}",
                    f"{1000 * each / len(encoded):.2f}",
                    spread(ratios(stock, seconds)),
                ]
            )
    head = ["records, loop", "first epoch, s", "later epochs, s", "ms an edit", "times as fast as stock"]
    what = f"stories260K, down_proj of layer {layer}, batches of {BATCH}, plain loops; the first epoch fills caches"
    record("Cost against the number of edits", f"{what}.\n\n{table(head, rows)}", options)


def against_depth(options: argparse.Namespace) -> None:
    size = "tiny" if options.quick else "small"
    layers, width, vocab, *_ = SIZES[size]
    model, now, rows = llama(size, options), clock(options), []
    encoded = rows_of(4 if options.quick else 32, vocab)
    batch = len(encoded) // 2
    for layer in (1, 3) if options.quick else (1, 3, 6, 9, 11):
        model.requires_grad_(True)
        with ExitStack() as stack:
            steps = loops(model, encoded, 0, layer, batch, stack, buckets=False)
            for step in steps.values():
                for _ in range(3):
                    step()
            taken: Taken = alternate(steps, options.rounds, now)
        stock, head, cache = taken.values()
        rows.append(
            [
                f"{layer} of {layers}",
                *(f"{statistics.median(seconds):.3f}" for seconds in (stock, head, cache)),
                spread(ratios(stock, head)),
                spread(ratios(stock, cache)),
            ]
        )
    what = (
        f"Llama of {layers} layers, width {width}, vocabulary {vocab:,}; {batch} edits of about 32 tokens; plain loop"
    )
    heads = ["edited layer", "stock, s a step", "loss head", "and PrefixCache", "stock / head", "stock / PrefixCache"]
    record("Cost against the depth of the scope", f"{what}.\n\n{table(heads, rows)}", options)


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--only", choices=["edits", "depth"])
    options = parser.parse_args()
    if options.quick:
        options.rounds = 1
    if options.only != "depth":
        against_edits(options)
    if options.only != "edits":
        against_depth(options)


if __name__ == "__main__":
    main()
