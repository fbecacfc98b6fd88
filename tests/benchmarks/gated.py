"""Edit SmolLM2 with a LoRA adapter, with and without a gate, and print a Markdown table.

    python tests/benchmarks/gated.py                       # 50 edits of draw 10
    python tests/benchmarks/gated.py --draw 100 --edits 15 --rows "gated, cross-entropy" --lr 1e-3 2e-3

Settings are chosen on draw 100. Every row trains the same adapter with the same stopping rule. The column "closed rows
that differ" counts prompts and texts outside of the radii for which a logit of the edited model is not bit for bit the
logit of the unedited model in the same batch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from compare import completions
from settings import load, smollm2

from kedit_train.callbacks import GatedAdapter, StopWhenEdited, TokenLoss, TokenSmoothing
from kedit_train.edit import scored_prompts
from kedit_train.evaluation import EvaluationOptions, Report, evaluate
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
COLUMNS = ("reliability", "generality", "PS", "others", "neighbors", "KL", "closed rows that differ", "seconds")


def measure(row: str, options: argparse.Namespace, rate: float) -> dict[str, Any]:
    """Train one row on a new model and return its scores."""
    from peft import get_peft_model

    torch.manual_seed(0)
    kind, objective = row.split(", ")
    setting = smollm2(options.draw)
    model, tokenizer = load(setting.path)
    edits, texts = setting.edits(options.edits), setting.texts([])[: options.texts]
    evaluation = EvaluationOptions(metrics=(), max_new_tokens=16, prose=setting.unrelated())
    before = evaluate(model, tokenizer, edits, options=evaluation)
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
    report: Report = evaluate(adapted.eval(), tokenizer, edits, options=evaluation, unedited=before)
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
        logits, cache = (output := model(**batch, use_cache=True)).logits, output.past_key_values
        is_open = cache.layers[-1].keys[:, 0, -1, 0]
        with model.disable_adapter():
            unedited = model(**batch, use_cache=False).logits
        real = batch["attention_mask"].bool()
        for row in (~is_open).nonzero().squeeze(-1).tolist():
            own, base = logits[row][real[row]], unedited[row][real[row]]
            closed += 1
            differ += not torch.equal(own.view(torch.int32), base.view(torch.int32))
    return closed, differ


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", type=int, default=10)
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--texts", type=int, default=700)
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    parser.add_argument("--lr", nargs="+", type=float, default=[2e-3])
    parser.add_argument("--layers", nargs="+", type=int, default=list(range(15, 30)))
    parser.add_argument("--modules", nargs="+", default=["up_proj", "down_proj"])
    parser.add_argument("--margin", type=float, default=0.5)
    parser.add_argument("--neighbors", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args()
    print(f"| row | rate | {' | '.join(COLUMNS)} |\n|---|{'---:|' * (len(COLUMNS) + 1)}", flush=True)
    for row in options.rows:
        for rate in options.lr:
            found = measure(row, options, rate)
            cells = [f"{v:.4g}" if isinstance(v := found.get(name, "-"), float) else str(v) for name in COLUMNS]
            print(f"| {row} | {rate:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
