"""The benchmarks run and write their sections. The numbers that they measure are not checked."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("script", "section", "row"),
    [
        ("step_time.py --only (b) (d)_loss_head (e)", "## Time of a step, tiny", "| (b) "),
        pytest.param(
            "equal_reliability.py", "## Edits a second at equal reliability, small", "| (b) ", marks=pytest.mark.slow
        ),
        pytest.param("integrity.py", "## Cost of the integrity checks, tiny", "| the checks", marks=pytest.mark.slow),
        pytest.param("arithmetic.py", "## Arithmetic with edits, world, tiny", "|---", marks=pytest.mark.slow),
        pytest.param("evaluation.py", "## Evaluation, factlm, tiny", "|---", marks=pytest.mark.slow),
    ],
)
def test_a_benchmark_writes_its_section_in_place(shared, tmp_path, monkeypatch, script, section, row):
    results = tmp_path / "RESULTS.md"
    results.write_text(f"# Before\n\n## First\n\n1\n\n{section}\n\nof the last run\n\n## Last\n\n2\n")
    name, *options = script.split()
    # The script runs in this process, which has already imported the libraries. Their import takes most of the time.
    monkeypatch.syspath_prepend(str(HERE))
    options = [option.replace("_", " ") for option in options]
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--results", str(results), *options])
    runpy.run_path(str(HERE / name), run_name="__main__")
    found = results.read_text()
    assert found.index("## First\n\n1\n") < found.index(section) < found.index("## Last\n\n2\n")
    assert "of the last run" not in found
    assert row in found


def test_every_second_of_a_profile_belongs_to_the_innermost_phase(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    now = 0.0

    def spend(seconds):
        nonlocal now
        now += seconds

    phases = importlib.import_module("phases").Phases(lambda: now)
    spend(1)
    with phases.phase("forward"):
        spend(2)
        phases.around("penalty", spend)(4)
        spend(8)
    spend(16)
    with phases.phase("statistics of texts"):
        phases.around("forward", spend)(32)
    assert phases.stop() == {"rest of training": 17, "forward": 10, "penalty": 4, "statistics of texts": 32}


def gpu(monkeypatch, out, *options):
    """Run the benchmark for a GPU on the CPU, and return its tables and its results."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick", "--device", "cpu", "--out", str(out), *options])
    runpy.run_path(str(HERE / "gpu.py"), run_name="__main__")
    return (out / "RESULTS_GPU.md").read_text(), json.loads((out / "RESULTS_GPU.json").read_text())


def test_the_gpu_benchmark_names_what_it_left_out(tmp_path, monkeypatch):
    text, found = gpu(monkeypatch, tmp_path, "--seconds", "0", "--only", "(b)", "loss head, Second")
    assert found["left_out"] == [
        f"tiny, {part}, {name}"
        for part in ("step", "run")
        for name in ("(b) stock, frozen to the scope", "(d) loss head, SecondOrderLocality")
    ]
    assert "Left out, because the time was up: tiny, step, (b) stock" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TimedSecondOrder. max_grad_norm=")
def test_the_gpu_benchmark_measures_every_variant_and_goes_on_after_an_error(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    step_time = importlib.import_module("step_time")

    def broken(self):
        raise RuntimeError("CUDA out of memory.\nMore lines.")

    monkeypatch.setattr(step_time.Workload, "_lora", broken)
    text, found = gpu(monkeypatch, tmp_path)
    results = found["models"]["tiny"]
    lora = "(c) stock, LoRA r=16 (q_proj, v_proj)"
    for part in ("steps", "runs"):
        assert len(results[part]) == 10
        errors = {name: entry["error"] for name, entry in results[part].items() if "error" in entry}
        assert errors == {lora: "RuntimeError: CUDA out of memory."}
    assert text.count(f"| {lora} | RuntimeError: CUDA out of memory. |") == 2
    assert "in broken" in (tmp_path / "RESULTS_GPU.errors.txt").read_text()
    assert results["factors"]["tokens"] > 0
    assert found["left_out"] == []


def test_the_benchmark_without_checks_replaces_every_check(monkeypatch):
    from kedit_train.core.integrity import Integrity

    monkeypatch.syspath_prepend(str(HERE))
    without = runpy.run_path(str(HERE / "integrity.py"))["NoChecks"]
    assert {name for name in vars(Integrity) if not name.startswith("_")} <= set(vars(without))
