"""Write the results of ``gpu.py`` as JSON and Markdown after every change, so that a killed run leaves both valid."""

from __future__ import annotations

import json
import os
import statistics
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from paired import processor, ratios, spread, table

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


class Report:
    """The results so far, in two files of the same name.

    Args:
        folder: folder of ``RESULTS_GPU.md`` and ``RESULTS_GPU.json``. Tracebacks go to ``RESULTS_GPU.errors.txt``.
        device: "cuda" or "cpu".
        options: settings to store.
    """

    def __init__(self, folder: Path, device: str, options: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "RESULTS_GPU.md"
        self.errors = self.path.with_suffix(".errors.txt")
        self.errors.unlink(missing_ok=True)
        self.data: dict[str, Any] = {
            "started": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
            "card": torch.cuda.get_device_name() if device.startswith("cuda") else processor(),
            "versions": {name: _version(name) for name in PACKAGES} | {"python": sys.version.split()[0]},
            "options": {name: str(value) for name, value in options.items()},
            "models": {},
            "left_out": [],
        }
        self.say(self._head())
        self.write()

    def say(self, line: str) -> None:
        print(line, flush=True)

    def model(self, name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Add a model and return its results: name of the part -> name of the variant -> numbers or an error."""
        self.data["models"][name] = {"facts": dict(facts), "steps": {}, "runs": {}}
        self.say(f"{name}: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
        self.write()
        return self.data["models"][name]

    def failed(self, what: str, error: BaseException) -> dict[str, str]:
        """Print the first line of an error, append its traceback to a file, and return the entry of the variant."""
        first = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        self.say(f"{what}: failed, {first}")
        with self.errors.open("a") as file:
            file.write(f"== {what}\n{''.join(traceback.format_exception(error))}\n")
        return {"error": first}

    def left_out(self, what: str) -> None:
        self.say(f"{what}: left out, because the time is up")
        self.data["left_out"].append(what)
        self.write()

    def write(self) -> None:
        for path, text in (
            (self.path, self.markdown()),
            (self.path.with_suffix(".json"), json.dumps(self.data, indent=1) + "\n"),
        ):
            unfinished = path.with_name(f"{path.name}.unfinished")
            unfinished.write_text(text)
            os.replace(unfinished, path)

    def _head(self) -> str:
        versions = ", ".join(f"{name} {number}" for name, number in self.data["versions"].items())
        return f"{self.data['started']}, {self.data['card']}, {versions}"

    def markdown(self) -> str:
        options = self.data["options"]
        parts = [
            "# Measured on a GPU",
            f"Written by `make bench-gpu`. {self._head()}. Random weights in {options['dtype']}. ParameterScope keeps "
            "the trained matrix in fp32 during training, and stock fine-tuning in the dtype of the model.",
        ]
        for name, model in self.data["models"].items():
            facts = ", ".join(f"{key} {value}" for key, value in model["facts"].items())
            parts += [f"## {name}", f"{facts}.", "### Time of a step", steps_table(model["steps"])]
            parts += [
                "### Complete runs",
                f"{options['edits']} edits, {options['epochs']} epochs in batches of {options['batch']}; one at a "
                f"time: {options['single']} edits, 25 steps each. The time includes the creation of the trainer, the "
                "caches, copying the weight change to the CPU, and restoring the weights. Learning "
                f"rate {options['lr']} for all, not tuned, so *learned* (fraction of the edits whose target tokens are "
                "all the most probable ones) only shows that a variant trains.",
                runs_table(model["runs"]),
            ]
            if "factors" in model:
                factors = model["factors"]
                parts.append(
                    f"SecondOrderLocality, before the first step: {factors['passes']:.1f} s for the factors on "
                    f"{factors['texts']} texts ({factors['tokens']} tokens), {factors['roots']:.1f} s for their "
                    "inverse roots (eigenvalue decompositions in fp64)."
                )
        if self.data["left_out"]:
            parts.append("Left out, because the time was up: " + "; ".join(self.data["left_out"]) + ".")
        return "\n\n".join(parts) + "\n"


def steps_table(found: Mapping[str, Any], base: str = "(b)") -> str:
    stock = _entry(found, base)

    def cells(entry: Mapping[str, Any]) -> list[str]:
        row = [s / entry["rows"] for s in entry["seconds"]]
        times = spread(ratios([s / stock["rows"] for s in stock["seconds"]], row)) if stock else ""
        milliseconds = [1000 * s for s in entry["seconds"]]
        second = 1 / statistics.median(entry["seconds"])
        return [spread(milliseconds, 1), f"{second:.1f}", f"{1000 * statistics.median(row):.2f}", times]

    return _table(found, ["ms a step", "steps/s", "ms a row", "speed relative to (b), per sequence"], cells)


def runs_table(found: Mapping[str, Any], base: str = "(b)") -> str:
    stock = _entry(found, base)

    def cells(entry: Mapping[str, Any]) -> list[str]:
        rate = entry["edits"] / entry["seconds"]
        times = f"{rate * stock['seconds'] / stock['edits']:.2f}" if stock else ""
        memory = ["" if entry[key] is None else f"{entry[key]:.2f}" for key in ("peak_gb", "above_gb")]
        parts = [f"{entry[key]:.1f}" for key in ("seconds", "set_up")]
        return [f"{rate:.2f}", times, *parts, *memory, f"{entry['learned']:.2f}"]

    memory_heads = ["peak, GB", "above the start, GB"]
    return _table(found, ["edits/s", "speed relative to (b)", "s", "set-up, s", *memory_heads, "learned"], cells)


def _table(found: Mapping[str, Any], heads: list[str], cells: Callable[[Mapping[str, Any]], list[str]]) -> str:
    """Format one row per variant. The row of a variant that failed contains its error."""
    rows = []
    for name, entry in found.items():
        failed = [entry["error"].replace("|", "/"), *[""] * (len(heads) - 1)] if "error" in entry else None
        rows.append([name, *(failed or cells(entry))])
    return table(["variant", *heads], rows)


def _entry(found: Mapping[str, Any], base: str) -> Any:
    return next((e for n, e in found.items() if n.startswith(base) and "error" not in e), None)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"
