"""Edit SmolLM2 with a LoRA adapter, with and without a gate, and print a Markdown table.

    python tests/benchmarks/gated.py                       # 50 edits of draw 10
    python tests/benchmarks/gated.py --draw 100 --edits 15 --rows "gated, cross-entropy" --lr 1e-3 2e-3
    python tests/benchmarks/gated.py world                 # block and margin on the bundled model
    python tests/benchmarks/gated.py radii [--facts]       # which prompts of draw 100 lie within a radius, no training

Settings are chosen on draw 100. Every row trains the same adapter with the same stopping rule. The column "closed rows
that differ" counts prompts and texts outside of the radii for which a logit of the edited model is not bit for bit the
logit of the unedited model in the same batch.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from compare import completions
from settings import HELD_OUT, Setting, load, smollm2

from kedit_train import EditDataset, world
from kedit_train.callbacks import GatedAdapter, StopWhenEdited, TokenLoss, TokenSmoothing, editing
from kedit_train.compatibility import read_cache
from kedit_train.edit import scored_prompts
from kedit_train.evaluation import EvaluationOptions, Report, evaluate
from kedit_train.functional.key_distance import key_distances
from kedit_train.modes import TrainLoop
from kedit_train.pretrained import lora_config

OBJECTIVES: dict[str, Callable[[], list[Any]]] = {
    "cross-entropy": lambda: [TokenLoss(reduction="sample"), StopWhenEdited(loss=0.01)],
    # The settings of the OverTone paper for LoRA.
    "OverTone": lambda: [
        TokenSmoothing(label_weight=0.1, epsilon=0.05, n_sigma=0.5, reduction="sample"),
        StopWhenEdited(loss=None, idle_steps="epoch"),
    ],
}
ROWS = [f"{kind}, {objective}" for objective in OBJECTIVES for kind in ("plain", "gated")]
FACTS = Path(__file__).resolve().parents[2] / "recipes" / "smollm2" / "facts.jsonl"
MODULES = ["up_proj", "down_proj"]
COLUMNS = ("reliability", "generality", "PS", "others", "neighbors", "KL", "closed rows that differ", "seconds")


def scores(setting: Setting) -> EvaluationOptions:
    """Return what is measured: the scores of the comparison of recipes (compare.py)."""
    return EvaluationOptions(metrics=(), max_new_tokens=16, prose=setting.unrelated())


def measure(row: str, options: argparse.Namespace, rate: float, setting: Setting, before: Report) -> dict[str, Any]:
    """Train one row on a new model and return its scores."""
    from peft import get_peft_model

    torch.manual_seed(0)
    kind, objective = row.split(", ")
    model, tokenizer = load(setting.path)
    edits, texts = setting.edits(options.edits), setting.texts([])[: options.texts]
    lora = {"r": 8, "lora_alpha": 32, "target_modules": options.modules, "layers_to_transform": options.layers}
    adapted: Any = get_peft_model(model, lora_config(lora))
    gated = GatedAdapter(texts, margin=options.margin, neighbors=options.neighbors, edits=edits)
    loop = TrainLoop(
        tokenizer,
        callbacks=[*OBJECTIVES[objective](), *([gated] if kind == "gated" else [])],
        epochs=options.epochs,
        batch_size=setting.batch_size,
        learning_rate=rate,
        stop_loss=0.0,
    )
    began = time.process_time()
    loop(adapted, edits)
    seconds = time.process_time() - began
    report: Report = evaluate(adapted.eval(), tokenizer, edits, options=scores(setting), unedited=before)
    found: dict[str, Any] = {name: report.metrics[name]["generated"].value for name in ("reliability", "generality")}
    found |= completions(report, before) | {"seconds": round(seconds)}
    if gated.gate is not None:
        prompts = [p for edit in edits for p in (edit.prompt, *scored_prompts(edit))]
        prompts += setting.unrelated() or []
        closed, differ = differing(adapted, tokenizer, prompts)
        found["closed rows that differ"] = f"{differ} of {closed}"
    return found


@torch.no_grad()
def differing(model: Any, tokenizer: Any, prompts: Sequence[str]) -> tuple[int, int]:
    """Return how many rows the gate leaves closed, and in how many of these a logit differs from the base model."""
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    closed = differ = 0
    for start in range(0, len(prompts), 16):
        batch = tokenizer(list(prompts[start : start + 16]), return_tensors="pt", padding=True)
        logits, cache = (output := model(**batch, use_cache=True)).logits, read_cache(output)
        is_open = cache.layers[-1].keys[:, 0, -1, 0]
        with model.disable_adapter():
            unedited = model(**batch, use_cache=False).logits
        real = batch["attention_mask"].bool()
        for row in (~is_open).nonzero().squeeze(-1).tolist():
            own, base = logits[row][real[row]], unedited[row][real[row]]
            closed += 1
            differ += not torch.equal(own.view(torch.int32), base.view(torch.int32))
    return closed, differ


def on_world() -> None:
    """Print scores of the bundled model for the first block with an adapter and the margin, on two draws."""
    from peft import get_peft_model

    names = ("reliability", "generality", "portability", "locality")
    print(f"| draw | first block | margin | {' | '.join(names)} |\n|---|{'---:|' * 6}", flush=True)
    for draw, first, margin in itertools.product((1, 2), (3, 5), (0.5, 0.8, 1.0)):
        torch.manual_seed(0)
        model, tokenizer = world.load()
        edits = EditDataset(world.edits(24, seed=draw))
        before = evaluate(model.eval(), tokenizer, edits, progress=False)
        lora = {"r": 8, "lora_alpha": 32, "target_modules": MODULES, "layers_to_transform": list(range(first, 6))}
        adapted: Any = get_peft_model(model, lora_config(lora))
        gated = GatedAdapter("world", neighbors=8, edits=edits, margin=margin, limit=600)
        loop = TrainLoop(tokenizer, callbacks=[gated, *OBJECTIVES["OverTone"]()], epochs=60, batch_size=12,
                         learning_rate=2e-3, stop_loss=0.0)  # fmt: skip
        loop(adapted, edits)
        report = evaluate(adapted.eval(), tokenizer, edits, unedited=before, progress=False)
        cells = [f"{report.metrics[name]['generated'].value:.3f}" for name in names]
        print(f"| {draw} | {first} | {margin} | {' | '.join(cells)} |", flush=True)


def within_radii(options: argparse.Namespace) -> None:
    """Print which fraction of the prompts of a draw lies within a radius. Nothing is trained."""
    from peft import get_peft_model

    setting = smollm2(options.draw)
    edits: Sequence[Any] = EditDataset.load(FACTS) if options.facts else setting.edits(options.edits)
    texts = setting.texts([])[: options.texts]
    asked: dict[str, list[str]] = {"rephrases": [r for e in edits for r in e.rephrases], "neighbors": [], "others": []}
    for edit in edits:
        for kind, probes in edit.locality.items():
            asked["others" if kind == "others" else "neighbors"] += [probe.prompt for probe in probes]
    asked = {name: prompts for name, prompts in asked.items() if prompts}
    columns = ("block", "held prompts per edit", "margin", *asked)
    print(f"| {' | '.join(columns)} |\n|{'---:|' * len(columns)}", flush=True)
    for block, neighbors in itertools.product(options.blocks, (8,) if options.facts else (0, 8)):
        model, tokenizer = load(setting.path)
        lora = {"r": 1, "target_modules": MODULES, "layers_to_transform": [block]}
        adapted: Any = get_peft_model(model, lora_config(lora))
        gated = GatedAdapter(texts, margin=1.0, neighbors=neighbors, edits=edits)
        with editing(adapted, [gated], tokenizer=tokenizer) as run:
            run.before_step()
        gate: Any = gated.gate
        nearest = {name: smallest_ratios(adapted, tokenizer, gate, block, prompts) for name, prompts in asked.items()}
        for margin in (0.3, 0.5, 0.8, 1.0):
            cells = [f"{(ratios <= margin).float().mean():.2f}" for ratios in nearest.values()]
            print(f"| {block} | {neighbors} | {margin} | {' | '.join(cells)} |", flush=True)


@torch.no_grad()
def smallest_ratios(model: Any, tokenizer: Any, gate: Any, block: int, prompts: Sequence[str]) -> torch.Tensor:
    """Return for each prompt the smallest ratio of a distance to the radius of the key, over positions and keys."""
    found = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        states = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[block][0]
        found.append((key_distances(states, gate.keys) / gate.radii).min())
    return torch.stack(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="smollm2", choices=("smollm2", "world", "radii"))
    parser.add_argument("--draw", type=int, default=None, help="default: 10, and 100 for radii")
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--texts", type=int, default=700)
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    parser.add_argument("--lr", nargs="+", type=float, default=[2e-3])
    parser.add_argument("--layers", nargs="+", type=int, default=list(range(15, 30)))
    parser.add_argument("--modules", nargs="+", default=MODULES)
    parser.add_argument("--margin", type=float, default=0.5)
    parser.add_argument("--neighbors", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--blocks", nargs="+", type=int, default=[15, 28], help="for radii")
    parser.add_argument("--facts", action="store_true", help="radii of the facts of recipes/smollm2")
    options = parser.parse_args()
    options.draw = options.draw or (HELD_OUT if options.what == "radii" else 10)
    if options.what == "world":
        on_world()
        return
    if options.what == "radii":
        within_radii(options)
        return
    setting = smollm2(options.draw)
    before = evaluate(*load(setting.path), setting.edits(options.edits), options=scores(setting))
    print(f"| row | rate | {' | '.join(COLUMNS)} |\n|---|{'---:|' * (len(COLUMNS) + 1)}", flush=True)
    for row in options.rows:
        for rate in options.lr:
            found = measure(row, options, rate, setting, before)
            cells = [f"{v:.4g}" if isinstance(v := found.get(name, "-"), float) else str(v) for name in COLUMNS]
            print(f"| {row} | {rate:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
