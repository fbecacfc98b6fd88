"""Measure heterogeneous token overfitting: the loss of each target position over the steps, and ablations of OverTone.

    python tests/benchmarks/token_overfitting.py --model world --figure recipes/figures/token_overfitting.png
    python tests/benchmarks/token_overfitting.py --model factlm

The paper (arXiv 2502.00602) trains one edit at a time, scores it under teacher forcing, and ablates the clip, the
dynamic filter, the check and the filter. Here every objective trains the same matrix of the same model for the same
number of epochs, one edit at a time and all edits breadth-first. The scores are of generated answers.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from settings import SETTINGS, load
from torch import Tensor, nn
from torch.nn import functional as F

from kedit_train import EditDataset
from kedit_train.callbacks import ParameterScope, editing
from kedit_train.data import Edit
from kedit_train.data.tokenization import collate, pad_token_id
from kedit_train.evaluation import EvaluationOptions
from kedit_train.evaluation.reporting.plots import new_figure, save_figure
from kedit_train.evaluation.reporting.report_lines import format_interval, format_number
from kedit_train.functional import IGNORE_INDEX, overtone, overtone_target, smoothed_loss
from kedit_train.modes import run_edits

LABEL_WEIGHT, EPSILON, SIGMA = 0.1, 0.01, 0.5
SCORES = ("reliability", "generality", "portability", "locality")
# logits, logits of the reference model (both [N, V]), labels [N] -> loss [N], active [N]
Objective = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def cross_entropy(now: Tensor, _: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(now, labels, reduction="none"), torch.ones_like(labels, dtype=torch.bool)


def static(now: Tensor, reference: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """OverTone with the filtered distribution of the reference model."""
    target, *_ = overtone_target(reference, labels, label_weight=LABEL_WEIGHT, n_sigma=SIGMA)
    return smoothed_loss(now, target, epsilon=EPSILON)


def unchecked(now: Tensor, _: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """OverTone with the mixture even if the label is not its most probable token."""
    with torch.no_grad():
        keep = now > now.amax(-1, keepdim=True) - SIGMA * now.std(-1, keepdim=True)
        filtered = now.masked_fill(~keep, -torch.inf).softmax(-1)
        target = (1 - LABEL_WEIGHT) * filtered + LABEL_WEIGHT * F.one_hot(labels, now.shape[-1])
    return smoothed_loss(now, target, epsilon=EPSILON)


OBJECTIVES: dict[str, Objective] = {
    "cross-entropy": cross_entropy,
    "OverTone": lambda z, _, y: overtone(z, y, label_weight=LABEL_WEIGHT, epsilon=EPSILON, n_sigma=SIGMA),
    "without the clip": lambda z, _, y: overtone(z, y, label_weight=LABEL_WEIGHT, epsilon=0.0, n_sigma=SIGMA),
    "static filter": static,
    "without the check": unchecked,
    "without the filter": lambda z, _, y: overtone(z, y, label_weight=LABEL_WEIGHT, epsilon=EPSILON, n_sigma=1e9),
    "clip alone (cross-entropy)": lambda z, _, y: overtone(z, y, label_weight=1.0, epsilon=EPSILON, n_sigma=SIGMA),
}


class Train:
    """``train(model, edits)`` for a number of epochs. Records the loss of every target position at every epoch."""

    def __init__(self, tokenizer: Any, objective: Objective, lr: float, epochs: int, batch_size: int) -> None:
        self.tokenizer, self.objective, self.lr = tokenizer, objective, lr
        self.epochs, self.batch_size = epochs, batch_size
        # (epoch, position) -> loss of each target that has such a position
        self.seen: dict[tuple[int, int], list[float]] = defaultdict(list)

    def __call__(self, model: nn.Module, edits: Sequence[Edit]) -> None:
        encoded, pad_id = EditDataset(edits).encode(self.tokenizer), pad_token_id(self.tokenizer)
        batches = [encoded[i : i + self.batch_size] for i in range(0, len(encoded), self.batch_size)]
        inputs = [collate(rows, pad_id=pad_id) for rows in batches]
        with torch.no_grad():
            reference = [_scored(model, batch)[0] for batch in inputs]
        with editing(model, [ParameterScope(0.66, modules="mlp.down_proj")], tokenizer=self.tokenizer) as edit:
            optimizer = torch.optim.Adam(edit.parameters(), lr=self.lr)
            for epoch in range(self.epochs):
                for number in torch.randperm(len(inputs)).tolist():
                    logits, labels, positions = _scored(model, inputs[number])
                    for place, loss in zip(positions.tolist(), _nats(logits, labels), strict=True):
                        self.seen[epoch, place].append(loss)
                    losses, active = self.objective(logits, reference[number], labels)
                    if not bool(active.any()):
                        continue
                    edit.before_step()
                    losses.mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()

    def curve(self, position: int) -> list[float]:
        """Return the mean loss of a position at each epoch."""
        return [sum(self.seen[e, position]) / len(self.seen[e, position]) for e in range(self.epochs)]

    def positions(self) -> list[int]:
        """Return the positions that at least a third of the targets have."""
        return [p for e, p in sorted(self.seen) if e == 0 and 3 * len(self.seen[0, p]) >= len(self.seen[0, 0])]


def _scored(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits and labels of the target tokens, and the position of each in its target."""
    labels = batch["labels"][:, 1:]
    where = labels != IGNORE_INDEX
    places = where.cumsum(-1) - 1
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return logits[:, :-1][where].float(), labels[where], places[where]


def _nats(logits: Tensor, labels: Tensor) -> list[float]:
    return F.cross_entropy(logits.detach(), labels, reduction="none").tolist()


def draw(trained: dict[tuple[str, str], Train], path: Path) -> None:
    """Draw loss (top) and probability (bottom): one column per regime and objective, one line per position."""
    columns = [(mode, name) for mode in ("single", "batch") for name in ("cross-entropy", "OverTone")]
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    drawing = new_figure(12, 5.6)
    axes = drawing.subplots(2, len(columns), sharex="col", sharey="row")
    for column, key in enumerate(columns):
        train = trained[key]
        above, below = axes[0][column], axes[1][column]
        for place in train.positions():
            losses = train.curve(place)
            colour = colours[place % len(colours)]
            above.plot(losses, color=colour, label=f"token {place + 1}")
            below.plot([2.718281828**-loss for loss in losses], color=colour)
        above.axhline(EPSILON, color="0.5", linewidth=1, linestyle=":")
        above.set(
            yscale="log", title=f"{key[1]},\n" + ("one edit at a time" if key[0] == "single" else "breadth-first")
        )
        below.set(xlabel="epoch" if key[0] == "batch" else "step", ylim=(0, 1.02))
    axes[0][0].set_ylabel("loss of the target's token, nats")
    axes[1][0].set_ylabel("its probability (geometric mean)")
    axes[0][0].legend(fontsize=8, loc="upper right")
    save_figure(drawing, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SETTINGS), default="world")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--draw", type=int, default=0)
    parser.add_argument("--edits", type=int, nargs=2, default=(30, 100), help="one at a time, and breadth-first")
    parser.add_argument("--lr", type=float, nargs=2, default=(1e-3, 1e-2), help="one at a time, and breadth-first")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = SETTINGS[options.model](options.draw)
    trained: dict[tuple[str, str], Train] = {}
    print(f"{options.model}: {options.edits} edits, {options.epochs} epochs, rates {options.lr}, draw {options.draw}\n")
    print("| | objective | " + " | ".join(SCORES) + " | first token / last token, nats |")
    print("|---|---|" + "---:|" * (len(SCORES) + 1))
    for mode, count, lr in zip(("single", "batch"), options.edits, options.lr, strict=True):
        edits = setting.edits(count)
        for name, objective in OBJECTIVES.items():
            model, tokenizer = load(setting.path)
            train = trained[mode, name] = Train(tokenizer, objective, lr, options.epochs, setting.batch_size)
            options_: dict[str, Any] = {
                "checkpoints": (),
                "progress": False,
                "options": EvaluationOptions(max_new_tokens=16),
            }
            result = run_edits(model, tokenizer, edits, mode=mode, train=train, **options_)
            scores = [result.checkpoints[-1].report.metrics[score]["generated"] for score in SCORES]
            cells = [format_number(s.value) + (f" ({format_interval(s)})" if s.low is not None else "") for s in scores]
            places = train.positions()
            ends = " / ".join(f"{train.curve(place)[-1]:.4f}" for place in (places[0], places[-1]))
            regime = "one at a time" if mode == "single" else "breadth-first"
            print(f"| {regime} | {name} | " + " | ".join(cells) + f" | {ends} |", flush=True)
    if options.figure:
        draw(trained, options.figure)


if __name__ == "__main__":
    main()
