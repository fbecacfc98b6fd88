"""Measure the peak memory of every loss through the output head, each in its own process.

    python tests/benchmarks/head_memory.py                     # V = 151,936, d = 1,024, 4,096 supervised tokens
    python tests/benchmarks/head_memory.py --vocab 32000 --losses overtone jsd

Writes a Markdown table: how much the peak rises while 4,096 tokens are scored forward and backward, above the model,
the hidden states and the resulting gradients. With ``--full`` the last row is cross-entropy over full logits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from paired import arguments, record, resident_peak, table
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from kedit_train.core import OutputHead
from kedit_train.functional import (
    chunk_length,
    chunked,
    dynamic_cross_entropy,
    overtone,
    token_divergence,
    uniform,
)

# These losses are computed from logits and labels.
LABELLED: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "cross-entropy": lambda z, y: (F.cross_entropy(z, y, reduction="none"),),
    "overtone": overtone,
    "uniform": uniform,
    "dft": dynamic_cross_entropy,
}
DIRECTIONS = ("forward", "reverse", "jsd")
LOSSES = (*LABELLED, *DIRECTIONS)


def measure(loss: str, trained: bool, vocab: int, width: int, tokens: int) -> float:
    """Return the extra peak in MB of one loss, forward and backward, in chunks unless its name says "full logits"."""
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False)
    model.lm_head.requires_grad_(trained)
    head = OutputHead(model)
    hidden, reference_states = torch.randn(tokens, width).requires_grad_(), torch.randn(tokens, width)
    labels = torch.randint(0, vocab, (tokens,))
    name, _, whole = loss.partition(", ")

    def score(states: Tensor, targets: Tensor, reference: Tensor) -> tuple[Tensor, ...]:
        if name in LABELLED:
            return LABELLED[name](head.project(states), targets)
        with torch.no_grad():
            reference_logits = head.project(reference)
        return (token_divergence(reference_logits, head.project(states), direction=name),)  # pyright: ignore[reportArgumentType]

    kept = width * tokens * 4 + (vocab * width * 4 if trained else 0)
    chunk = tokens if whole else chunk_length(vocab)
    start = resident_peak()
    chunked(score, hidden, labels, reference_states, chunk=chunk, parameters=head.trained)[0].mean().backward()
    extra = resident_peak() - start - kept
    if extra <= 0:
        raise SystemExit("building the model took more memory than the step, so the step cannot be measured")
    return extra / 1e6


def measured(loss: str, trained: bool, vocab: int, width: int, tokens: int) -> float:
    """Run :func:`measure` in its own process."""
    wanted: list[Any] = [loss, trained, vocab, width, tokens]
    command = [sys.executable, __file__, "--one", json.dumps(wanted)]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    ended = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}: {ended.stderr[-2000:]}")
    return float(ended.stdout)


def main() -> None:
    parser = arguments(__doc__, vocab=151_936, width=1024, tokens=4096)
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=LOSSES)
    parser.add_argument("--full", action="store_true", help="also cross-entropy over full logits (many GB)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(measure(*json.loads(given.one)))
        return
    if given.quick:
        given.vocab, given.width, given.tokens, given.losses = 32_768, 16, 2048, ["overtone"]
    rows = []
    for loss in [*given.losses, *(["cross-entropy, full logits"] if given.full else [])]:
        frozen, trained = (measured(loss, t, given.vocab, given.width, given.tokens) for t in (False, True))
        rows.append([loss, f"{frozen:.0f}", f"{trained:.0f}"])
    what = f"V = {given.vocab:,}, d = {given.width:,}, {given.tokens:,} tokens; a CPU. Limit: 600 MB."
    body = f"{what}\n\n{table(['loss', 'head frozen, MB', 'head trained, MB'], rows)}"
    record("Peak memory of the losses through the output head", body, given)


if __name__ == "__main__":
    main()
