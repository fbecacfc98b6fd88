"""Steps, complete runs and peak memory of Llama shapes on one GPU, in at most 8 minutes (``make bench-gpu``).

    python tests/benchmarks/gpu.py                                  # 1 B and 8 B parameters, bf16, random weights
    python tests/benchmarks/gpu.py --quick --out runs/gpu           # a tiny model on the GPU first
    python tests/benchmarks/gpu.py --device cpu --model tiny --quick

Needs torch, transformers, accelerate, peft and lightning. On a machine without a network, what is missing can come from
a folder of wheels (``make bench-gpu WHEELS=folder``): trl 1.16.0, datasets 5.2.0, dill 0.4.1 and multiprocess 0.70.19.
They need pandas, pyarrow and xxhash. Nothing here imports jsonargparse.

The run prints one line for each variant, and writes ``RESULTS_GPU.md`` and ``RESULTS_GPU.json`` after the steps of a
model and after each complete run. If a variant fails, the tables contain its error, and the run continues. With N
models, the n-th model starts no variant after n/N of ``--seconds``.

For the time of a step, all variants take one step in turn. Each uses an unmodified ``SFTTrainer``, except "one edit".
For the complete runs, one variant runs at a time, and the peak of the allocated memory is read.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTED = time.monotonic()

import torch  # noqa: E402
from gpu_report import Report  # noqa: E402
from paired import Stepwise, alternate, clock  # noqa: E402
from step_time import BALL, BATCHES, CACHE, CACHE_LOCALITY, FULL, LORA, PLAIN, SCOPE, SINGLE, STOCK, Workload  # noqa: E402
from workload import SIZES, llama, matrix, one_edit, rows_of, sft, twin, words  # noqa: E402

from kedit_train.callbacks import SecondOrderLocality, TokenLoss  # noqa: E402
from kedit_train.data.tokenization import collate  # noqa: E402

SECOND = "(d) loss head, SecondOrderLocality"
# SecondOrderLocality comes last, because the decompositions of its factors take the longest.
VARIANTS = (STOCK, FULL, LORA, SINGLE, SCOPE, BALL, PLAIN, CACHE, CACHE_LOCALITY, SECOND)
# Only for these sizes, the GPU has memory for a copy of all parameters, their gradients and the state of Adam.
FULL_SIZES = ("tiny", "small", "wide", "1b")


class TimedSecondOrder(SecondOrderLocality):
    """Measures the seconds of the factors and of their inverse roots."""

    def time_with(self, now: Callable[[], float]) -> TimedSecondOrder:
        self.now, self.attached, self.roots = now, 0.0, 0.0
        return self

    def attach(self, run: Any) -> None:
        started = self.now()
        super().attach(run)
        self.attached = self.now() - started

    def _inverse_roots(self, run: Any, name: str) -> Any:
        started = self.now()
        found = super()._inverse_roots(run, name)
        self.roots += self.now() - started
        return found


class Steps(Workload):
    """The variants whose steps are timed."""

    def __init__(self, options: argparse.Namespace, model: tuple[Any, Any], batches: int = BATCHES) -> None:
        super().__init__(options, model, batches)
        rows = rows_of(options.texts, SIZES[options.model][2], seed=3)
        self.factor_texts = [self.tokenizer.decode(row.input_ids) for row in rows]
        self.second: TimedSecondOrder | None = None

    def chosen(self) -> dict[str, Callable[[], Any]]:
        every = {**self.variants(), SECOND: self.ours(TokenLoss, self._second)}
        names = [n for n in VARIANTS if n != FULL or self.options.model in FULL_SIZES]
        return {n: every[n] for n in names if self.options.only is None or any(o in n for o in self.options.only)}

    def _second(self) -> TimedSecondOrder:
        self.second = TimedSecondOrder(self.factor_texts, batch_size=self.size).time_with(clock(self.options))
        return self.second


class Runs(Steps):
    """The same variants, each as a run from start to end."""

    def trainer(self, model: Any, **rest: Any) -> Any:
        from transformers import PrinterCallback

        made = sft(
            model, self.rows, self.tokenizer, self.options, batch_size=self.size, lr=self.options.lr,
            max_steps=self.options.epochs * len(self.rows) // self.size, **rest,
        )  # fmt: skip
        made.remove_callback(PrinterCallback)
        return made

    def single(self) -> Any:
        return twin(self.model, self.layer)


class Guarded:
    """A step that records its first error and then does nothing."""

    def __init__(self, step: Callable[[], Any]) -> None:
        self.step, self.error = step, None

    def __call__(self) -> None:
        if self.error is None:
            try:
                self.step()
            except Exception as error:
                self.error = error


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_steps(work: Steps, found: dict[str, Any], report: Report, in_time: Callable[[], bool]) -> None:
    """Time the steps of all variants in turn."""
    built: dict[str, Guarded] = {}
    size, rounds = work.options.model, work.options.rounds
    for name, build in work.chosen().items():
        what = f"{size}, step, {name}"
        if not in_time():
            report.left_out(what)
            continue
        started = time.monotonic()
        try:
            step = build()
            for _ in range(BATCHES + 1):
                step()
            built[name] = Guarded(step)
            used = f", {torch.cuda.memory_allocated() / 1e9:.1f} GB in use" if torch.cuda.is_available() else ""
            report.say(f"{what}: ready after {time.monotonic() - started:.1f} s{used}")
        except Exception as error:
            found[name] = report.failed(what, error)
            release()
    taken = alternate(built, rounds, clock(work.options)) if built else {}
    for name, guarded in built.items():
        if guarded.error is not None:
            found[name] = report.failed(f"{size}, step, {name}", guarded.error)
            continue
        rows = 1 if name == SINGLE else work.size
        found[name] = {"seconds": taken[name], "rows": rows}
        seconds = statistics.median(taken[name])
        report.say(f"{size}, step, {name}: {1000 * seconds:.1f} ms, {1000 * seconds / rows:.2f} ms a row")
    report.write()
    for guarded in built.values():
        if isinstance(guarded.step, Stepwise) and guarded.error is None:
            try:
                guarded.step.close()
            except Exception as error:
                report.failed(f"{size}, end of the steps", error)


@torch.no_grad()
def learned(model: Any, rows: list[Any]) -> float:
    """Return the fraction of the edits whose target tokens are all the most probable ones, with teacher forcing."""
    device, right = next(model.parameters()).device, 0
    for start in range(0, len(rows), 16):
        batch = collate(rows[start : start + 16], pad_id=2)
        labels = batch.pop("labels")[:, 1:]
        best = model(**{n: v.to(device) for n, v in batch.items()}, use_cache=False).logits[:, :-1].argmax(-1).cpu()
        right += int(((best == labels) | (labels == -100)).all(1).sum())
    return right / len(rows)


class Meter:
    """Counts seconds and the peak of the allocated GPU memory, except while it is paused.

    Args:
        options: the options of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.now, self.on_gpu = clock(options), options.device.startswith("cuda")
        self.start_bytes = torch.cuda.memory_allocated() if self.on_gpu else 0
        self.seconds, self.peak_bytes = 0.0, 0
        self._go()

    def _go(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self._started = self.now()

    def stop(self) -> float:
        """Stop counting, and return the seconds so far."""
        self.seconds += self.now() - self._started
        if self.on_gpu:
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated())
        return self.seconds

    def outside(self, function: Callable[[], Any]) -> Any:
        """Call a function without counting it."""
        self.stop()
        found = function()
        self._go()
        return found

    @property
    def gigabytes(self) -> dict[str, float | None]:
        if not self.on_gpu:
            return {"peak_gb": None, "above_gb": None}
        return {"peak_gb": self.peak_bytes / 1e9, "above_gb": (self.peak_bytes - self.start_bytes) / 1e9}


def complete_run(work: Runs, name: str, build: Callable[[], Any]) -> dict[str, Any]:
    """Run a variant once, from the creation of the trainer to the change in host memory and the restored weights."""
    options, meter, rows = work.options, Meter(work.options), work.rows
    made = build()
    model = made if name == SINGLE else made.model
    trained = [p for p in model.parameters() if p.requires_grad]
    originals = [p.detach().to("cpu", copy=True) for p in trained]
    set_up = meter.outside(lambda: meter.seconds)

    def restore() -> None:
        with torch.no_grad():
            for parameter, original in zip(trained, originals, strict=True):
                # The change, which a user would save.
                parameter.cpu() - original
                parameter.copy_(original)

    if name == SINGLE:
        rows, shares = rows[: options.single], []
        for row in rows:
            for _ in one_edit(model, matrix(model, work.layer), row, lr=options.lr):
                pass
            shares.append(meter.outside(lambda row=row: learned(model, [row])))
            restore()
    else:
        made.train()
        shares = [meter.outside(lambda: learned(model, rows))]
        restore()
    seconds = meter.stop()
    share = statistics.mean(shares)
    return {"edits": len(rows), "seconds": seconds, "set_up": set_up, "learned": share, **meter.gigabytes}


def measure_runs(work: Runs, results: dict[str, Any], report: Report, in_time: Callable[[], bool]) -> None:
    """Time a complete run of each variant, and read its peak memory."""
    size, found = work.options.model, results["runs"]
    for name, build in work.chosen().items():
        what = f"{size}, run, {name}"
        if not in_time():
            report.left_out(what)
            continue
        release()
        try:
            entry = found[name] = complete_run(work, name, build)
            memory = "" if entry["peak_gb"] is None else f", peak {entry['peak_gb']:.2f} GB"
            report.say(
                f"{what}: {entry['edits']} edits in {entry['seconds']:.1f} s, "
                f"{entry['edits'] / entry['seconds']:.2f} edits/s{memory}, learned {entry['learned']:.2f}"
            )
        except Exception as error:
            found[name] = report.failed(what, error)
        if name == SECOND and work.second is not None and work.second.attached:
            tokens = sum(map(len, work.tokenizer(work.factor_texts)["input_ids"]))
            passes, roots = work.second.attached - work.second.roots, work.second.roots
            results["factors"] = {"texts": len(work.factor_texts), "tokens": tokens, "passes": passes, "roots": roots}
            report.say(f"{size}, factors of {tokens} tokens: {passes:.1f} s, inverse roots {roots:.1f} s")
        report.write()


def measure(options: argparse.Namespace, report: Report, until: float) -> None:
    started = time.monotonic()
    in_time = lambda: time.monotonic() - STARTED < until  # noqa: E731
    model = llama(options.model, options), words(SIZES[options.model][2])
    layers, width, vocab, *_ = SIZES[options.model]
    clock(options)()
    facts = {
        "parameters": f"{sum(p.numel() for p in model[0].parameters()) / 1e9:.2f} B",
        "layers": layers, "width": width, "vocabulary": vocab, "edited layer": layers * 3 // 4,
        "sequences a step": options.batch, "rounds": options.rounds,
        "seconds to create": f"{time.monotonic() - started:.1f}",
    }  # fmt: skip
    results = report.model(options.model, facts)
    measure_steps(Steps(options, model), results["steps"], report, in_time)
    release()
    measure_runs(Runs(options, model, max(1, options.edits // options.batch)), results, report, in_time)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smallest sizes, to test that the benchmark runs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--model", nargs="+", choices=list(SIZES), default=["1b", "8b"])
    parser.add_argument("--only", nargs="+", help="only variants whose names contain one of these")
    parser.add_argument("--seconds", type=float, default=450.0, help="no variant starts later; ends 30 s after this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the results")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the complete runs")
    numbers = {"rounds": 15, "batch": 16, "edits": 64, "epochs": 20, "single": 8, "texts": 256, "seed": 0}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    options.clock = "wall"
    if options.quick:
        options.model, options.rounds, options.batch, options.edits = ["tiny"], 2, 4, 8
        options.epochs, options.single, options.texts = 2, 1, 8
    if options.device.startswith("cuda"):
        # A variant that hangs must not hold a rented machine. The files of the results are complete at any time.
        faulthandler.dump_traceback_later(options.seconds + 30, exit=True)
    report, sizes = Report(options.out, options.device, vars(options)), options.model
    for i, options.model in enumerate(sizes):
        # Each model has an equal share of the time. If a model does not use its share, the next model can use the rest.
        try:
            measure(options, report, options.seconds * (i + 1) / len(sizes))
        except Exception as error:
            report.failed(options.model, error)
        release()
    faulthandler.cancel_dump_traceback_later()
    report.write()
    report.say(f"{time.monotonic() - STARTED:.0f} s in total; {report.path}")


if __name__ == "__main__":
    main()
