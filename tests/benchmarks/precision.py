"""Make the same edit of SmolLM2 with its base model in fp32, bf16, 8 bit and 4 bit, and compare the scores.

    python tests/benchmarks/precision.py                       # seeds 0 to 2, into docs/results.md
    python tests/benchmarks/precision.py --bases 8bit --seeds 3
    python tests/benchmarks/precision.py report                # write the table only

The edits are the 20 facts of recipes/smollm2/facts.jsonl. A LoRA adapter is trained with OverTone and ``KLLocality``.
The settings are the same for every base model, and were chosen on no base. The seed changes the initial values of the
adapter and the order of the examples. 8 bit and 4 bit need bitsandbytes. In the bf16 row, the factors of the adapter
are bf16, too; ``ParameterScope`` trains them in fp32 and rounds them at the end.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compare_report import PAGE, replaced
from result_rows import add_measurement, read_rows
from settings import SMOLLM2

from kedit_train import EditDataset
from kedit_train.callbacks import KLLocality, ParameterScope, StopWhenEdited, TokenSmoothing
from kedit_train.data import Edit
from kedit_train.evaluation import EvaluationOptions, Report, evaluate
from kedit_train.modes import TrainLoop

RESULTS = Path(__file__).with_name("precision.jsonl")
DATA = Path(__file__).resolve().parents[2] / "recipes" / "smollm2"
BASES = {"fp32": "fp32", "bf16": "bf16, fp32 masters", "8bit": "8 bit", "4bit": "4 bit (NF4)"}
# The texts that KLLocality reads; the texts after them measure the divergence.
TRAINED_TEXTS, HELD_TEXTS = 320, 40
SHAPE = {"r": 8, "lora_alpha": 32, "target_modules": ["down_proj"], "layers_to_transform": list(range(15, 30))}
COLUMNS = (
    ("megabytes", 0), ("reliability", 2), ("generality", 2), ("locality", 2), ("kl", 4), ("base_kl", 4), ("seconds", 0),
)  # fmt: skip
HEADINGS = ("base model", "weights, MB", "reliability", "generality", "locality", "KL", "KL of the base", "seconds")


def load(base: str) -> Any:
    """Return the unedited model with its weights in the given precision."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.bfloat16 if base == "bf16" else torch.float32}
    if base == "8bit":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif base == "4bit":
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model: Any = AutoModelForCausalLM.from_pretrained(SMOLLM2, device_map="cpu", **options)
    return model.eval()


def texts() -> list[str]:
    return (DATA / "keep.txt").read_text(encoding="utf-8").splitlines()


def options() -> EvaluationOptions:
    return EvaluationOptions(max_new_tokens=12, prose=texts()[TRAINED_TEXTS : TRAINED_TEXTS + HELD_TEXTS])


@dataclass
class Base:
    """An unedited model, with what is measured before its edits.

    Args:
        megabytes: the size of its parameters.
        report: its evaluation, which contains the distributions that the edited models are compared with.
        kl: the divergence of its predictions from those of the unedited model in fp32.
    """

    megabytes: float
    report: Report
    kl: float


def measure(base: str, tokenizer: Any, edits: Sequence[Edit], full: Report) -> Base:
    """Measure an unedited model. ``full`` is the evaluation of the fp32 model on the first edit."""
    model = load(base)
    compared = evaluate(model, tokenizer, edits[:1], options=options(), unedited=full, progress=False)
    report = evaluate(model, tokenizer, edits, options=options(), progress=False)
    megabytes = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    return Base(megabytes, report, compared.metrics["prose"]["kl"].value)


def edit(base: str, before: Base, seed: int, tokenizer: Any, edits: Sequence[Edit]) -> dict[str, Any]:
    """Train a new adapter on a new model, and return the scores.

    Args:
        base: a key of ``BASES``.
        before: the unedited model.
        seed: seed of the adapter and of the order of the examples.
        tokenizer: the tokenizer of SmolLM2.
        edits: the edits.
    """
    from peft import LoraConfig, get_peft_model

    model = load(base)
    torch.manual_seed(seed)
    adapted: Any = get_peft_model(
        model, LoraConfig(**SHAPE, task_type="CAUSAL_LM"), autocast_adapter_dtype=base != "bf16"
    )
    callbacks = [
        ParameterScope(modules="down_proj"),
        TokenSmoothing(label_weight=0.1, epsilon=0.05, n_sigma=0.5, reduction="sample"),
        KLLocality(texts=texts()[:TRAINED_TEXTS], batch_size=8),
        StopWhenEdited(loss=None, idle_steps="epoch"),
    ]
    loop = TrainLoop(tokenizer, callbacks=callbacks, epochs=40, batch_size=10, learning_rate=1e-3, stop_loss=0.0)
    began = time.process_time()
    loop(adapted, edits)
    seconds = time.process_time() - began
    report = evaluate(adapted.eval(), tokenizer, edits, options=options(), unedited=before.report, progress=False)
    names = ("reliability", "generality", "locality")
    found = {name: report.metrics[name]["generated"].value for name in names}
    return {
        "base": base, "seed": seed, **found, "kl": report.metrics["prose"]["kl"].value,
        "base_kl": before.kl, "megabytes": before.megabytes, "seconds": seconds,
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a table in Markdown with the means over the seeds."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|---|" + "---:|" * (len(HEADINGS) - 1)]
    for base, label in BASES.items():
        if own := [row for row in rows if row["base"] == base]:
            cells = (f"{sum(r[key] for r in own) / len(own):.{digits}f}" for key, digits in COLUMNS)
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run", "report"], default="run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--facts", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    # The 8-bit layers log a line for every call.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if given.what == "run":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
        edits = list(EditDataset.load(DATA / "facts.jsonl", limit=given.facts))
        full = evaluate(load("fp32"), tokenizer, edits[:1], options=options(), progress=False)
        measured: dict[str, Base] = {}
        for seed in given.seeds:
            for base in given.bases:
                if base not in measured:
                    measured[base] = measure(base, tokenizer, edits, full)
                row = edit(base, measured[base], seed, tokenizer, edits)
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
                # A part of the facts is a trial, whose row is not kept.
                if given.facts == 20:
                    add_measurement(RESULTS, row)
    if rows := read_rows(RESULTS):
        marks = "<!-- precision: written by precision.py -->", "<!-- precision: end -->"
        PAGE.write_text(replaced(PAGE.read_text(), marks, ["\n".join(table(rows))]))


if __name__ == "__main__":
    main()
