"""Breadth-first training against one edit at a time: how many edits are retained as their number grows.

python tests/benchmarks/sequential.py --edits 1000 --figure retention.png

The edits are CounterFact records on a small Llama that knows the true facts; one thread. Breadth-first trains the
unedited model anew for each number of edits. One at a time is one long sequence, in which each edit is trained until it
is learned. Both train the same weights with the same objective and, by default, the same learning rate.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kedit_train import EditDataset
from kedit_train.callbacks import ParameterScope
from kedit_train.data.tokenization import separator
from kedit_train.evaluation.reporting.report_lines import format_interval, format_number
from kedit_train.evaluation.scoring.capability import CapabilityProbe
from kedit_train.modes import ModeResult, TrainLoop, retention_curve, run_edits, survey

FACTLM = Path(__file__).resolve().parents[3] / "shared" / "models" / "factlm"
COLUMNS = ("reliability", "latest", "generality", "locality", "agreement", "kl", "perplexity")


def loop(tokenizer: Any, arguments: argparse.Namespace, lr: float, batch_size: int) -> TrainLoop:
    scope = ParameterScope(arguments.layer, modules="mlp.down_proj")
    return TrainLoop(tokenizer, callbacks=[scope], learning_rate=lr, batch_size=batch_size, epochs=arguments.epochs)


def rows(label: str, result: ModeResult) -> None:
    for checkpoint in result.checkpoints:
        own = checkpoint.scores()
        cells = [
            format_number(own[name].value) + (f" ({format_interval(own[name])})" if own[name].low is not None else "")
            for name in COLUMNS
        ]
        print(f"| {label} | {checkpoint.edits} | " + " | ".join(cells) + f" | {checkpoint.seconds:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--layer", type=float, default=0.7)
    parser.add_argument("--lr", type=float, default=3e-3, help="for breadth-first training")
    parser.add_argument("--batch-size", type=int, default=25, help="for breadth-first training")
    parser.add_argument("--sequential-lr", type=float, default=3e-3, help="for one edit at a time")
    parser.add_argument("--only", choices=("batch", "sequential"), help="run only one of the two")
    parser.add_argument("--figure", type=Path, help="where to write the retention curve, .png")
    parser.add_argument("--json", type=Path, help="folder for the full results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(FACTLM)
    unedited = AutoModelForCausalLM.from_pretrained(FACTLM).eval()
    # Every sentence in the training of this model ends with a full stop. Edits without it would teach the model to
    # leave it out everywhere, and the divergence on other texts would measure little else.
    records = EditDataset.load(FACTLM / "records.json")
    records = EditDataset([replace(e, target=f"{e.target}.") for e in records], name=records.name)
    edits, others = records[: arguments.edits], records[-300:]
    if arguments.edits > len(records) - len(others):
        raise SystemExit(
            f"{len(records) - len(others)} edits at most; the other records belong to the capability probe"
        )
    known = [f"{e.prompt}{separator(e.prompt, e.old_target or '')}{e.old_target}." for e in others]
    probe = CapabilityProbe(known, prompts=[e.prompt for e in others], max_new_tokens=8)
    common: dict[str, Any] = {"capability": probe, "progress": False}
    print(f"{len(edits)} CounterFact edits; probe: {len(others)} other facts; {arguments}\n")
    print("| how | edits | " + " | ".join(COLUMNS) + " | seconds of training |")
    print("|---|" + "---:|" * (len(COLUMNS) + 2))
    results: dict[str, ModeResult] = {}
    if arguments.only != "sequential":
        whole: list[ModeResult] = []
        for count in [c for c in (1, 10, 100, 1000) if c < len(edits)] + [len(edits)]:
            model = copy.deepcopy(unedited)
            train = loop(tokenizer, arguments, arguments.lr, arguments.batch_size)
            whole.append(run_edits(model, tokenizer, edits[:count], mode="batch", train=train, **common))
            rows("breadth-first", whole[-1])
        results["breadth-first"] = replace(whole[-1], checkpoints=[r.checkpoints[0] for r in whole])
    if arguments.only != "batch":
        train = loop(tokenizer, arguments, arguments.sequential_lr, 1)
        model = copy.deepcopy(unedited)
        results["one at a time"] = run_edits(model, tokenizer, edits, mode="sequential", train=train, **common)
        rows("one at a time", results["one at a time"])
    print(f"\n{time.process_time() - began:.0f} s of CPU time\n")
    print(survey(*results.values()).markdown())
    if arguments.figure:
        retention_curve(results, arguments.figure)
    for label, result in results.items() if arguments.json else ():
        result.save(arguments.json / f"{label.replace(' ', '-')}.json")


if __name__ == "__main__":
    main()
