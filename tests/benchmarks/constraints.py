"""Compare the constraints: the same edits, steps and optimizer under each of them, scored by generated answers.

python tests/benchmarks/constraints.py --model world
python tests/benchmarks/constraints.py --model factlm --rows "NullSpace,LowCurvature"

Every constraint runs with its defaults, which were chosen on other edits (``--edits 1``) than those reported. Prints a
Markdown table. A row takes about ten seconds on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kedit_train import EditDataset, world
from kedit_train.callbacks import (
    GradientMask,
    KLLocality,
    LowCurvature,
    NormBall,
    NullSpace,
    ParameterScope,
    TokenSmoothing,
    WeightAnchor,
    editing,
)
from kedit_train.data import Edit
from kedit_train.data.tokenization import collate, pad_token_id
from kedit_train.errors import EditError
from kedit_train.evaluation import Report, evaluate

FACTLM = Path(__file__).resolve().parents[3] / "shared" / "models" / "factlm"


@dataclass(frozen=True)
class Setting:
    """A model and what all rows share: edits, texts that must stay, scope, training budget and KL weight."""

    path: Path
    edits: list[Edit]
    texts: list[str]
    layers: Any
    learning_rate: float
    epochs: int
    batch_size: int
    kl_weight: float


def embedded(number: int = 0) -> Setting:
    edits = world.edits(24, seed=number)
    texts = world.locality_texts(exclude=edits)
    return Setting(world.path(), edits, texts, "0.3-1.0", 1e-3, 60, 12, 100.0)


def factlm(number: int = 0) -> Setting:
    """Use a block of 60 records as edits, and true statements of other records, without scored prompts, as texts."""
    if not FACTLM.exists():
        raise EditError(f"there is no model factlm at {FACTLM}; use --model world")
    data = EditDataset.load(FACTLM / "records.json")
    edits = list(data[60 * number : 60 * number + 60])
    prompts = [p.prompt for e in edits for p in (e, *(p for kind in e.locality.values() for p in kind))]
    prompts += [r for e in edits for r in e.rephrases]
    texts = [f"{e.prompt} {e.old_target}." for e in data[1000:1300]]
    texts = [text for text in texts if not any(prompt in text for prompt in prompts)]
    return Setting(FACTLM, edits, texts, 0.9, 3e-3, 40, 20, 4.0)


MODELS: dict[str, Callable[[int], Setting]] = {"world": embedded, "factlm": factlm}

# Each row adds its callbacks to ParameterScope and the token loss.
ROWS: dict[str, Callable[[Setting], list[Any]]] = {
    "scope only": lambda s: [],
    "KLLocality": lambda s: [KLLocality(s.texts, weight=s.kl_weight, batch_size=32)],
    "NormBall linf": lambda s: [NormBall()],
    "NormBall l2": lambda s: [NormBall(norm="l2", fraction=0.5)],
    "NullSpace": lambda s: [NullSpace(s.texts, batch_size=64)],
    "LowCurvature": lambda s: [LowCurvature(s.texts, batch_size=64)],
    "GradientMask": lambda s: [GradientMask(edits=s.edits)],
    "L2-SP": lambda s: [WeightAnchor("l2sp")],
    "EWC": lambda s: [WeightAnchor("ewc", texts=s.texts)],
}
COLUMNS = ("reliability", "generality", "portability", "locality")


def load(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)


def train(setting: Setting, constraints: Sequence[Any], seed: int = 0) -> tuple[Any, Any, dict[str, float]]:
    """Return the edited model, its tokenizer and the last metrics."""
    torch.manual_seed(seed)
    model, tokenizer = load(setting.path)
    examples, pad_id = EditDataset(setting.edits).encode(tokenizer), pad_token_id(tokenizer)
    scope = ParameterScope(setting.layers, modules="mlp.down_proj")
    with editing(model, [scope, TokenSmoothing(), *constraints], tokenizer=tokenizer) as edit:
        optimizer = torch.optim.Adam(edit.parameters(), lr=setting.learning_rate)
        for _ in range(setting.epochs):
            for batch in torch.randperm(len(examples)).split(setting.batch_size):
                edit.before_step()
                model(**collate([examples[i] for i in batch], pad_id=pad_id)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        metrics = edit.run.collect()
    return model.eval(), tokenizer, metrics


def table_row(name: str, report: Report, metrics: dict[str, float]) -> str:
    scores = [report.metrics[column]["generated"].value for column in COLUMNS]
    cells = ["-" if score is None else f"{score:.3f}" for score in scores]
    cells.append(f"{metrics['edit/drift/relative']:.3f}")
    return f"| {' | '.join([name, *cells])} |"


def main() -> None:
    from rich.console import Console
    from rich.progress import Progress

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="world")
    parser.add_argument("--edits", type=int, default=0, help="draw of the edits (defaults were chosen on 1, not 0)")
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated, from: %(default)s")
    arguments = parser.parse_args()
    names = [name.strip() for name in arguments.rows.split(",")]
    if unknown := set(names) - set(ROWS):
        parser.error(f"unknown row {sorted(unknown)[0]!r}; choose from {', '.join(ROWS)}")
    setting = MODELS[arguments.model](arguments.edits)
    model, tokenizer = load(setting.path)
    before = evaluate(model.eval(), tokenizer, setting.edits, progress=False)
    columns = ["constraint", *COLUMNS, "drift"]
    print(
        f"{arguments.model}: {len(setting.edits)} edits, {setting.epochs} epochs in batches of {setting.batch_size}\n"
    )
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    # The bar goes to stderr, so that the table can be redirected to a file.
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(arguments.model, total=len(names))
        for name in names:
            progress.update(task, description=f"{arguments.model}: {name}")
            model, tokenizer, metrics = train(setting, ROWS[name](setting))
            report = evaluate(model, tokenizer, setting.edits, unedited=before, progress=False)
            print(table_row(name, report, metrics), flush=True)
            progress.advance(task)


if __name__ == "__main__":
    main()
