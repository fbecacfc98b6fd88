"""Measure the memory of an edit on a random checkpoint in the shape of a large model, and compare it with the formulas.

    python tests/benchmarks/rehearsal.py make /tmp/large            # 32 layers of Llama-3.1-8B: 16 GB in bf16
    python tests/benchmarks/rehearsal.py run /tmp/large             # about 10 minutes of one core
    python tests/benchmarks/rehearsal.py report                     # only write the tables of docs/large_models.md

``from_pretrained`` maps the files of the checkpoint into memory, so the frozen weights stay in the page cache, which
the system can free. Only the anonymous memory of the process is measured, above its size after a first forward pass.
Each part runs in its own process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rehearsal_formulas as formulas
import torch
from compare_report import replaced
from delta_memory import Peak
from paired import table
from result_rows import add_measurement, read_rows
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from kedit_train.callbacks import NullSpace, ParameterScope, PrefixCache, SaveDelta, TokenLoss, editing

RESULTS = Path(__file__).with_name("rehearsal.jsonl")
PAGE = Path(__file__).parents[2] / "docs" / "large_models.md"
MARKS = "<!-- rehearsal: written by rehearsal.py -->", "<!-- rehearsal: end -->"
NEEDS = "<!-- needs: written by rehearsal.py -->", "<!-- needs: end -->"
MODULES = "mlp.down_proj.weight"
TOKENS = 32
LABELS = {
    "scope": "scope, with all checks before the first step",
    "step of Adam": "step of Adam",
    "statistics": "statistics of `NullSpace`",
    "step with NullSpace": "step with `NullSpace`, without the scope",
    "delta file": "delta file",
}


def make(folder: Path, config: Any) -> None:
    """Write a bf16 checkpoint with random weights, one file per layer. All layers have the same numbers, shifted."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    shapes = {name: p.shape for name, p in formulas.on_meta(config).named_parameters()}
    values = (torch.randn(max(map(torch.Size.numel, shapes.values()))) * 0.02).bfloat16()
    files: dict[str, dict[str, Any]] = {}
    where: dict[str, str] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        key = parts[2] if parts[:2] == ["model", "layers"] else "others"
        where[name] = f"model-{key}.safetensors"
        files.setdefault(where[name], {})[name] = shape
    for number, (file, own) in enumerate(files.items()):
        tensors = {}
        for name, shape in own.items():
            start = 1009 * number % (len(values) - shape.numel() + 1)
            random = values[start : start + shape.numel()].clone().view(shape)
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else random
        save_file(tensors, folder / file, metadata={"format": "pt"})
        print(f"{file}: {sum(t.nbytes for t in tensors.values()) / 1e9:.2f} GB", flush=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def batches(config: Any, count: int, tokens: int) -> list[dict[str, torch.Tensor]]:
    """Return forward passes of one sequence each."""
    ids = torch.randint(10, config.vocab_size, (count, 1, tokens), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]


def load(folder: Path) -> Any:
    """Load the model, and run it once, so that the buffers of the matrix products exist."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        model(**batches(model.config, 1, TOKENS)[0], use_cache=False)
    return model


def train(model: Any, edit: Any, optimizer: Any, inputs: dict[str, torch.Tensor], steps: int) -> None:
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    for _ in range(steps):
        edit.before_step()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def measure_scope(model: Any, scope: ParameterScope, expected: Any, texts: int) -> dict[str, Any]:
    """Measure the scope and the checks before the first step."""
    with Peak() as peak, editing(model, [scope, TokenLoss()]) as edit:
        edit.before_step()
    return {"scope": [peak.megabytes, formulas.scope_bytes(expected) / 1e6]}


def measure_step(model: Any, scope: ParameterScope, expected: Any, texts: int) -> dict[str, Any]:
    """Measure two steps of Adam, and the delta."""
    path = Path(tempfile.mkdtemp()) / "edit.safetensors"
    with Peak() as peak:
        manager = editing(model, [scope, TokenLoss(), SaveDelta(str(path))])
        edit = manager.__enter__()
        optimizer = torch.optim.Adam(edit.parameters(), lr=1e-4)
        train(model, edit, optimizer, batches(model.config, 1, TOKENS)[0], 2)
    found = {"step of Adam": [peak.megabytes, formulas.step_bytes(expected) / 1e6]}
    del optimizer
    with Peak() as peak:
        manager.__exit__(None, None, None)
    size = path.stat().st_size
    path.unlink()
    return found | {"delta file": [size / 1e6, formulas.delta_bytes(expected) / 1e6], "saving": [peak.megabytes, None]}


def measure_null_space(model: Any, scope: ParameterScope, expected: Any, texts: int) -> dict[str, Any]:
    """Measure the statistics of NullSpace, and two steps with it."""
    callback = NullSpace(batches(model.config, texts, TOKENS))
    with Peak() as whole, editing(model, [scope, TokenLoss(), callback]) as edit:
        with Peak() as peak:
            edit.before_step()
        space = next(iter(callback._projection.subspaces.values()))
        kept = formulas.directions_bytes(expected, space.rank)
        stored = sum(one.basis.nbytes for one in callback._projection.subspaces.values())
        found = {
            "statistics": [peak.megabytes, formulas.statistics_bytes(expected, texts * TOKENS) / 1e6],
            "directions": [stored / 1e6, kept / 1e6],
        }
        with Peak() as peak:
            train(model, edit, torch.optim.Adam(edit.parameters(), lr=1e-4), batches(model.config, 1, TOKENS)[0], 2)
        step = formulas.null_space_step_bytes(expected) - formulas.scope_bytes(expected)
        found["step with NullSpace"] = [peak.megabytes, step / 1e6]
    return found | {"rank": space.rank, "whole run": [whole.megabytes, None]}


def measure_cache(model: Any, scope: ParameterScope, expected: Any, texts: int) -> dict[str, Any]:
    """Measure the stored hidden states of PrefixCache."""
    with editing(model, [scope, TokenLoss(), PrefixCache()], log_every_n_steps=1) as edit:
        optimizer = torch.optim.Adam(edit.parameters(), lr=1e-4)
        seconds = []
        for _ in range(2):
            began = time.process_time()
            train(model, edit, optimizer, batches(model.config, 1, TOKENS)[0], 1)
            seconds.append(time.process_time() - began)
        stored = edit.history[-1]["edit/cache/memory_bytes"]
    return {"PrefixCache": [stored / 1e6, formulas.hidden_state_bytes(expected, TOKENS) / 1e6], "seconds": seconds}


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "scope": measure_scope,
    "step": measure_step,
    "null_space": measure_null_space,
    "cache": measure_cache,
}


def measure(part: str, folder: Path, layers: str, texts: int) -> dict[str, Any]:
    """Run one part in this process."""
    torch.set_num_threads(1)
    with Peak() as loading:
        model = load(folder)
    chosen: Any = layers if "-" in layers else float(layers)
    expected = formulas.Scope.of(model, chosen, MODULES)
    found = PARTS[part](model, ParameterScope(chosen, modules=MODULES), expected, texts)
    sizes = {"parameters": expected.parameters, "matrices": len(expected.shapes), "shape": expected.shapes[0]}
    about = {"part": part, "depth": model.config.num_hidden_layers, "tokens": TOKENS * texts, "layers": layers}
    return about | sizes | {"first forward pass": loading.megabytes, "found": found}


def run(folder: Path, layers: str, texts: int, parts: list[str]) -> None:
    for part in parts:
        command = [sys.executable, __file__, "one", str(folder), "--layers", layers, "--texts", str(texts)]
        ended = subprocess.run(
            [*command, "--parts", part], check=False, stdout=subprocess.PIPE, text=True, env=os.environ
        )
        if ended.returncode:
            raise SystemExit(f"rehearsal: part {part} ended with status {ended.returncode}; see the error above.")
        row = json.loads(ended.stdout.splitlines()[-1])
        print(row, flush=True)
        add_measurement(RESULTS, row)


def measured_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of measured and computed memory. A later measurement replaces an earlier one."""
    lines = {}
    for row in rows:
        out, d = row["shape"]
        matrices = "1 matrix" if row["matrices"] == 1 else f"{row['matrices']} matrices"
        what = f"{row['parameters'] / 1e9:.2f} B, {matrices} [{out:,}, {d:,}]"
        for name, value in row["found"].items():
            if name in LABELS:
                error = f"{(value[1] - value[0]) / value[0]:+.0%}"
                lines[row["parameters"], name] = [what, LABELS[name], f"{value[0]:,.1f}", f"{value[1]:,.1f}", error]
    ordered = sorted(lines.items(), key=lambda item: (-item[0][0], list(LABELS).index(item[0][1])))
    head = ["parameters, scope", "peak or size", "measured, MB", "formula, MB", "error of the formula"]
    return table(head, [cells for _, cells in ordered])


def needs_table() -> str:
    """Return the table of what an edit of large models needs, by formula."""
    columns = []
    for name, config in formulas.MODELS.items():
        model = formulas.on_meta(config())
        modules = "self_attn.o_proj.weight" if "A22B" in name else MODULES
        for label, layers in (("1 layer", 0.7), ("0.5-0.8", "0.5-0.8")):
            columns.append((f"{name}, {label}", formulas.Scope.of(model, layers, modules)))
    gigabytes = {
        "weights in bf16": formulas.weights,
        "scope: fp32 weights and their values before the edit": formulas.scope_bytes,
        "peak of a step of Adam": formulas.step_bytes,
        "peak while `NullSpace` reads many texts, with the scope": lambda scope: (
            formulas.scope_bytes(scope) + formulas.statistics_bytes(scope, 10**6)
        ),
        "peak of a step with `NullSpace`, with the largest number of stored directions": lambda scope: (
            formulas.null_space_step_bytes(scope) + formulas.directions_bytes(scope, scope.shapes[0][-1] // 2)
        ),
        "`PrefixCache` or `KLLocality`, 100,000 tokens": lambda scope: formulas.hidden_state_bytes(scope, 100_000),
        "delta file": formulas.delta_bytes,
    }
    body = [[label, *(f"{of(scope) / 1e9:,.1f}" for _, scope in columns)] for label, of in gigabytes.items()]
    first = ["edited entries, millions", *(f"{scope.entries / 1e6:,.0f}" for _, scope in columns)]
    return table(["GB", *(name for name, _ in columns)], [first, *body])


def report() -> str:
    """Return docs/large_models.md with both tables."""
    page = replaced(PAGE.read_text(encoding="utf-8"), NEEDS, [needs_table()])
    rows = read_rows(RESULTS)
    return replaced(page, MARKS, [measured_table(rows)]) if rows else page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "run", "one", "report"])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--depth", type=int, default=32, help="make: number of layers")
    parser.add_argument("--width", type=int, default=4096, help="make: width of the hidden states")
    parser.add_argument("--intermediate", type=int, default=14_336, help="make: width of the feed-forward network")
    parser.add_argument("--vocabulary", type=int, default=128_256, help="make: size of the vocabulary")
    parser.add_argument("--layers", default="0.7", help="run: the layers of the scope")
    parser.add_argument("--texts", type=int, default=4, help=f"run: texts of {TOKENS} tokens for NullSpace")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    given = parser.parse_args()
    if given.what == "make":
        heads = max(1, given.width // 128)
        kinds = {"vocab_size": given.vocabulary, "num_key_value_heads": min(8, heads)}
        make(given.folder, formulas.llama(given.depth, given.width, given.intermediate, heads, **kinds))
    elif given.what == "one":
        print(json.dumps(measure(given.parts[0], given.folder, given.layers, given.texts)))
    elif given.what == "run":
        assert AutoConfig.from_pretrained(given.folder)
        run(given.folder, given.layers, given.texts, given.parts)
    if given.what in ("run", "report"):
        PAGE.write_text(report(), encoding="utf-8")


if __name__ == "__main__":
    main()
