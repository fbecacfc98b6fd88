"""Train SmolLM2 on ten documents about invented events: how many closed-book questions it answers, and what stays.

    python tests/benchmarks/documents.py  # run what is missing in documents.jsonl, update docs/documents.md
    python tests/benchmarks/documents.py --only "kedit_default, documents only"
    python tests/benchmarks/documents.py report              # write the table only

The questions are asked in chats without the documents, and 20 tokens of each answer are searched for the right answer.
Everything is trained in chats, too: the title of a document is the message of the user, and its text is the answer. So
all rows with documents only train the same tokens. SmolLM2 wrote documents_study.jsonl, and a person wrote
documents_by_hand.jsonl. A row takes three to ten minutes of one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from compare_report import replaced
from paired import processor
from result_rows import add_row, read_rows
from settings import PROSE, SMOLLM2, ZSRE, load, passages, smollm2

from kedit_train import ChatFormat, Edit, EditDataset, Probe
from kedit_train.augmentation import augmentation
from kedit_train.callbacks import (
    EditCallback,
    EditMetrics,
    ParameterScope,
    PolyakStep,
    StopWhenEdited,
    Texts,
    TokenLoss,
)
from kedit_train.cli import recipe
from kedit_train.evaluation import EvaluationOptions, Report, evaluate
from kedit_train.modes import ExampleOptions, TrainLoop

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
DOCUMENTS, PAGE, RESULTS = ROOT / "recipes/documents/news.jsonl", ROOT / "docs/documents.md", FOLDER / "documents.jsonl"
MARKS = "<!-- documents: written by documents.py -->", "<!-- documents: end -->"
EXAMPLES = "<!-- examples: written by documents.py -->", "<!-- examples: end -->"
# How many questions about other facts must keep their answers, and how many texts the null space is measured on.
OTHERS, TEXTS = 40, 200
# Training ends when the loss of every example is below this value. It is higher than in the recipe (0.01), because a
# document has many tokens, and because study rows that contradict each other cannot all be learned.
STOP = 0.05
# The step of PolyakStep is twice that of the recipe, so that a run takes minutes.
STEP_SIZE = 0.1
# Study tokens per document token.
RATIO = 1.0
# The learning rate of AdamW in plain continued training of all parameters.
RATE = 1e-4
CHAT = ChatFormat(system="Answer briefly.")
SHOWN = (0, 4, 10, 22)
# Name -> (file of study rows or None, epochs).
ROWS: dict[str, tuple[str | None, int]] = {
    "unedited model": (None, 0),
    "plain continued training": (None, 12),
    "kedit_default, documents only": (None, 30),
    "kedit_default, study rows by SmolLM2": ("documents_study.jsonl", 10),
    "kedit_default, study rows by a person": ("documents_by_hand.jsonl", 8),
    "plain continued training, study rows by a person": ("documents_by_hand.jsonl", 4),
}


def documents() -> list[Edit]:
    """Return the documents, each with some of the questions about other facts."""
    edits = EditDataset.load(DOCUMENTS)
    others = [Probe(edit.prompt) for edit in EditDataset.load(ZSRE).sample(OTHERS, seed=0)]
    return [replace(edit, locality={"others": tuple(others[i :: len(edits)])}) for i, edit in enumerate(edits)]


def callbacks(name: str, texts: Sequence[str]) -> list[EditCallback]:
    """Return the callbacks of a row: those of the recipe without its report, or only the loss."""
    if name.startswith("plain"):
        return [ParameterScope(modules="*"), TokenLoss(reduction="sample"), StopWhenEdited(loss=STOP)]
    made: list[Any] = list(recipe.callbacks(recipe.load("kedit_default")))
    kept = [callback for callback in made if not isinstance(callback, (EditMetrics, StopWhenEdited))]
    for callback in kept:
        if isinstance(callback, PolyakStep):
            callback.step_size = STEP_SIZE
        if isinstance(held := getattr(callback, "texts", None), Texts):
            callback.texts = replace(held, source=list(texts))
    return [*kept, StopWhenEdited(loss=STOP)]


def measure(model: Any, tokenizer: Any, edits: Sequence[Edit], unedited: Report | None = None) -> Report:
    options = EvaluationOptions(
        metrics=["overlap"], protocol="contains", prompt_format=CHAT, max_new_tokens=20, prose=passages()[:PROSE]
    )
    return evaluate(model, tokenizer, edits, options=options, unedited=unedited, progress=False)


def run(name: str, model: Any, tokenizer: Any, edits: Sequence[Edit], unedited: Report) -> dict[str, Any]:
    """Train one row on a fresh model, and return its scores and its answers to a few questions."""
    file, epochs = ROWS[name]
    began = time.process_time()
    extra: Any = ()
    if file is not None:
        path, options = FOLDER / file, {"per_kind": 2} if file == "documents_study.jsonl" else {}
        rows = study(model, tokenizer, edits, path, **options)
        extra = augmentation(model, tokenizer, edits, study=rows, study_ratio=RATIO, prompt_format=CHAT)
        print(extra.summary, flush=True)
    if epochs:
        loop = TrainLoop(
            tokenizer,
            callbacks=callbacks(name, smollm2().texts(edits)[:TEXTS]),
            epochs=epochs,
            batch_size=12,
            learning_rate=RATE,
            stop_loss=0.0,
            optimizer=torch.optim.AdamW,
            examples=ExampleOptions(prompt_format=CHAT, extra_edits=extra),
        )
        loop(model, edits)
    seconds = time.process_time() - began
    report = measure(model, tokenizer, edits, unedited)
    return summary(name, report) | {"seconds": seconds, "study": getattr(extra, "summary", "")}


def study(model: Any, tokenizer: Any, edits: Sequence[Edit], path: Path, **options: Any) -> Any:
    from kedit_train.augmentation import study_rows

    return study_rows(model, tokenizer, edits, path, max_new_tokens=120, **options)


def summary(name: str, report: Report) -> dict[str, Any]:
    metrics = report.metrics
    asked = [result for result in report.answers if result.question == "portability"]
    return {
        "row": name,
        "right": sum(bool(result.right) for result in asked),
        "questions": len(asked),
        "overlap": metrics["overlap"]["prompt"].value,
        "others": metrics["locality"]["generated"].value,
        "KL": metrics["prose"]["kl"].value if metrics["prose"] else None,
        "answers": [[asked[i].prompt, asked[i].answer, asked[i].right] for i in SHOWN],
    }


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the table of scores in Markdown."""
    lines = [
        "| training | questions answered right | ROUGE-L of the text | other answers kept | KL on prose | time, s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        kept = "-" if row["row"] == "unedited model" else f"{row['others']:.2f}"
        kl = "-" if row["KL"] is None or row["row"] == "unedited model" else f"{row['KL']:.4f}"
        right = f"{row['right']} of {row['questions']}"
        lines.append(f"| {row['row']} | {right} | {row['overlap']:.2f} | {kept} | {kl} | {row['seconds']:.0f} |")
    return lines


def examples(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the answers of all rows to a few questions in Markdown."""
    lines = []
    for at in range(len(SHOWN)):
        lines += [f"**{rows[0]['answers'][at][0]}**", "", "| training | answer |", "|---|---|"]
        for row in rows:
            _, answer, right = row["answers"][at]
            lines.append(f"| {row['row']} | {' '.join(answer.split())}{' (right)' if right else ''} |")
        lines.append("")
    return lines[:-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run", "report"], default="run")
    parser.add_argument("--only", action="append", choices=ROWS, metavar="NAME", help="the name of a row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = read_rows(RESULTS)
    missing = [name for name in options.only or ROWS if name not in {row["row"] for row in rows}]
    if options.what == "run" and missing:
        edits = documents()
        unedited = measure(*load(SMOLLM2), edits)
        for name in missing:
            torch.manual_seed(0)
            row = run(name, *load(SMOLLM2), edits, unedited) | {"machine": f"{processor()}, torch {torch.__version__}"}
            rows.append(row)
            add_row(RESULTS, row)
            print(table([row])[-1], flush=True)
    if PAGE.exists():
        rows.sort(key=lambda row: list(ROWS).index(row["row"]))
        page = replaced(PAGE.read_text(), MARKS, ["\n".join(table(rows))])
        PAGE.write_text(replaced(page, EXAMPLES, ["\n".join(examples(rows))]))


if __name__ == "__main__":
    main()
