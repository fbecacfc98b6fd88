"""Compare two quadratic estimates of a KL divergence with the exact value, for changes of growing size.

    python tests/benchmarks/quadratic_kl.py                    # SmolLM2: about 10 minutes of one core
    python tests/benchmarks/quadratic_kl.py report             # write the plot and the table only

K-FAC estimates the divergence from the change D of the weights alone, ``1/2 tr(S D A Dᵀ)``, summed over the matrices.
The hidden-space estimate needs a forward pass, but no output head: ``1/2 dᵀ Cov(w) d`` for the change d of the last
hidden state. w are the rows of the head, weighted by the probabilities before the edit (of all tokens, or of the most
probable ones). Three changes of the down-projections are multiplied by factors: that of plain fine-tuning (one layer),
that of kedit_default (nine layers), and random numbers (nine layers).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from compare_report import PAGE, replaced
from methods import Method, load_recipe
from paired import processor
from result_rows import read_rows
from settings import HELD_OUT, load, smollm2
from torch import Tensor, nn

from kedit_train.callbacks import ParameterScope, WeightAnchor, editing
from kedit_train.core.output_head import OutputHead
from kedit_train.evaluation.reporting.plots import new_figure, save_figure
from kedit_train.functional.second_order import second_order_divergence

RESULTS = Path(__file__).with_name("quadratic_kl.jsonl")
PICTURE = PAGE.parent / "images" / "quadratic_kl.png"
MARKS = "<!-- quadratic: written by quadratic_kl.py -->", "<!-- quadratic: end -->"
FACTORS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
TOP = 64
LAYERS = {"ft_m": "0.66", "kedit_default": "0.5-0.8", "random": "0.5-0.8"}
ESTIMATES = {"kfac": "K-FAC", "hidden": "hidden space", "top": f"hidden space, {TOP} tokens"}


def trained_change(recipe: str, edits: int) -> dict[str, Tensor]:
    """Return the change of each weight that a recipe makes with edits of the held-out draw."""
    setting = smollm2(HELD_OUT)
    model, tokenizer = load(setting.path)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    chosen = setting.edits(edits)
    Method(setting, model, tokenizer, recipe, load_recipe(recipe, model="smollm2"), chosen, "batch")(model, chosen)
    changes = {name: weight.detach() - before[name] for name, weight in model.named_parameters()}
    return {name: change for name, change in changes.items() if change.any()}


def random_change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return random numbers with 1 % of the norm of each weight."""
    generator = torch.Generator().manual_seed(0)
    changes = {name: torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}
    return {name: 0.01 * change * (weights[name].norm() / change.norm()) for name, change in changes.items()}


@torch.no_grad()
def divergences(unedited: nn.Module, model: nn.Module, batches: list[Tensor]) -> dict[str, float]:
    """Return the exact divergence and both hidden-space estimates, in nats per token, without first tokens."""
    head, head_before = OutputHead(model), OutputHead(unedited)
    totals, count = dict.fromkeys(("exact", "hidden", "top"), 0.0), 0
    rows = head_before.module.weight
    for ids in batches:
        before, now = (one.hidden(input_ids=ids)[0, 1:] for one in (head_before, head))
        old, new = ((states @ rows.T).log_softmax(-1) for states in (before, now))
        probabilities = old.exp()
        totals["exact"] += float((probabilities * (old - new)).sum())
        moved = (now - before) @ rows.T
        totals["hidden"] += float(0.5 * variance(probabilities, moved).sum())
        likely, tokens = probabilities.topk(TOP, dim=-1)
        likely = likely / likely.sum(-1, keepdim=True)
        totals["top"] += float(0.5 * variance(likely, moved.gather(-1, tokens)).sum())
        count += len(before)
    return {name: total / count for name, total in totals.items()}


def variance(probabilities: Tensor, values: Tensor) -> Tensor:
    """Return the variance of values [n, k] under probabilities [n, k], as [n]."""
    mean = (probabilities * values).sum(-1, keepdim=True)
    return (probabilities * (values - mean).square()).sum(-1)


def factors(model: nn.Module, tokenizer: Any, layers: str, texts: list[str]) -> Any:
    """Return the K-FAC factors of the down-projections."""
    anchor = WeightAnchor("kfac", texts=texts, limit=None)
    scope = ParameterScope(float(layers) if "-" not in layers else layers, modules="mlp.down_proj.weight")
    with editing(model, [anchor, scope], tokenizer=tokenizer) as edit:
        edit.before_step()
        return anchor._factors


def run(edits: int, texts: int) -> None:
    setting = smollm2(HELD_OUT)
    model, tokenizer = load(setting.path)
    unedited = copy.deepcopy(model)
    chosen = setting.texts([])
    # The factors are computed on other texts than the divergence.
    measured, batches = chosen[: 2 * texts : 2], [
        torch.tensor([tokenizer(text)["input_ids"]]) for text in chosen[1 : 2 * texts : 2]
    ]  # fmt: skip
    lines = []
    for name, layers in LAYERS.items():
        moments = factors(model, tokenizer, layers, measured)
        weights = {weight: dict(unedited.named_parameters())[weight].detach() for weight in moments.inputs}
        changes = random_change(weights) if name == "random" else trained_change(name, edits)
        assert changes.keys() <= weights.keys(), "the change is outside of the layers"
        for factor in FACTORS:
            with torch.no_grad():
                for weight, change in changes.items():
                    model.get_parameter(weight).copy_(weights[weight] + factor * change)
            kfac = sum(
                float(second_order_divergence(factor * c, moments.gradients[w].mean, moments.inputs[w].mean))
                for w, c in changes.items()
            )
            size = math.sqrt(sum(float(c.square().sum()) for c in changes.values()))
            total = math.sqrt(sum(float(weights[w].square().sum()) for w in changes))
            row = {"change": name, "factor": factor, "size": factor * size / total, "kfac": kfac}
            row |= divergences(unedited, model, batches) | {"texts": texts, "edits": edits, "machine": processor()}
            lines.append(json.dumps(row))
            print(lines[-1], flush=True)
        model.load_state_dict(unedited.state_dict())
    RESULTS.write_text("\n".join(lines) + "\n")


def report() -> str:
    """Draw the plot, and return docs/results.md with the table."""
    rows = read_rows(RESULTS)
    figure = new_figure(11, 3.6)
    axes = figure.subplots(1, len(LAYERS), sharey=True)
    for axis, change in zip(axes, LAYERS, strict=True):
        own = [row for row in rows if row["change"] == change]
        for key, label in ESTIMATES.items():
            axis.plot([r["exact"] for r in own], [r[key] / r["exact"] for r in own], marker="o", label=label)
        axis.axhline(1.0, color="gray", linewidth=1)
        axis.set(xscale="log", yscale="log", title=change, xlabel="exact KL, nats per token")
    axes[0].set_ylabel("estimate / exact KL")
    axes[0].legend()
    save_figure(figure, PICTURE)
    names = {"ft_m": "`ft_m`, 1 layer", "kedit_default": "`kedit_default`, 9 layers", "random": "random, 9 layers"}
    table = [
        f"| change | size | exact KL | K-FAC | hidden space | {TOP} tokens |",
        "|---|---:|---:|---:|---:|---:|",
        *(
            f"| {names[r['change']]} x {r['factor']:g} | {r['size']:.2%} | {r['exact']:.2g} | "
            + " | ".join(f"{r[key] / r['exact']:.2f}" for key in ESTIMATES)
            + " |"
            for r in rows
        ),
    ]
    return replaced(PAGE.read_text(), MARKS, ["\n".join(table)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run", "report"], default="run")
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--texts", type=int, default=150, help="texts for the factors, and as many for the divergence")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "run":
        run(options.edits, options.texts)
    PAGE.write_text(report())


if __name__ == "__main__":
    main()
