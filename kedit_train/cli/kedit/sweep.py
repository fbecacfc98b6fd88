"""``kedit sweep``: how much of an edit? Reliability against locality over coefficients, and one picked by a rule."""

from __future__ import annotations

import math
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kedit_train.cli.kedit.output import json_option, new_path, print_json, print_table, size
from kedit_train.errors import EditError

HELP = "apply multiples of a delta, measure each, and pick one by a stated rule"
EPILOG = """\
examples:
  kedit sweep runs/mine/edit.safetensors Qwen/Qwen3-0.6B held_out.jsonl
  kedit sweep runs/mine/edit.safetensors world world --limit 24 --plot sweep.png --out picked.safetensors
  kedit sweep runs/mine/edit.safetensors world held_out.jsonl --coefficients 0.25 0.5 0.75 1 1.5 --keep-locality 0.98
  kedit sweep runs/mine/edit.safetensors world held_out.jsonl --forget --coefficients -0.25 -0.5 -1

The rule: among the coefficients that keep at least --keep-locality of the base's locality, pick the one with the
highest reliability; of equals, the one nearest to 0. Locality is the share of answers that are the same as the base
model's. Report results on other questions than those you pick on:
kedit eval MODEL OTHER_EDITS --delta picked.safetensors

--forget is for a delta that was trained on what the model should unlearn. Reliability then counts the edits that are
no longer answered with their target.
"""
COEFFICIENTS = tuple(round(0.1 * i, 1) for i in range(1, 11))


def arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("delta", metavar="DELTA", help="what SaveDelta or kedit merge wrote")
    add("model", metavar="MODEL", help="the base: a checkpoint's folder, a hub name, or world")
    add("edits", metavar="EDITS", help="held-out questions: .json, .jsonl or .csv of EditDataset, or world")
    add("--coefficients", type=_number, nargs="+", metavar="C", default=COEFFICIENTS, help="0.1, 0.2, ... 1; 0 is free")
    add(
        "--keep-locality",
        type=_number,
        default=0.95,
        metavar="S",
        help="share of the base's locality that must remain (0.95)",
    )
    add("--forget", action="store_true", help="reliability counts what is no longer answered")
    add("--limit", type=int, metavar="N", help="a seeded sample of N edits")
    add("--batch-size", type=int, default=64, metavar="N", help="rows at a time (64); no score depends on it")
    add("--max-new-tokens", type=int, default=32, metavar="N", help="where an endless answer is cut (32)")
    add("--prompt-format", choices=("plain", "chat", "question"), default="plain")
    add("--seed", type=int, default=0, help="of the sample (0)")
    add("--device", help="cpu, cuda, ...; the accelerator where there is one")
    add("--trust-remote-code", action="store_true", help="let the checkpoint bring its own code")
    add("--plot", metavar="FILE", help="draw reliability and locality over the coefficients, .png")
    add("--out", metavar="FILE", help="write the delta times the picked coefficient, .safetensors")
    add("--force", action="store_true", help="replace files that are there")
    json_option(parser)


def run(args: Namespace) -> int:
    picture = _new(args.plot, ".png", args.force) if args.plot else None
    out = _new(args.out, ".safetensors", args.force) if args.out else None
    if out is not None and Path(args.delta).exists() and out.exists() and out.samefile(args.delta):
        raise EditError(f"{out} is the delta that is swept; give --out another name")
    if not set(args.coefficients) - {0.0}:
        raise EditError("--coefficients: 0 alone is the base; give others")
    if picture is not None:
        from kedit_train.evaluation.reporting.plots import figure

        # A missing matplotlib is told before the answers are generated.
        figure(1, 1)
    found = _swept(args)
    if out is not None:
        found.delta.save(out)
    if picture is not None:
        from kedit_train.cli.kedit.sweep_plot import sweep_plot

        sweep_plot(found, picture, forget=args.forget)
    files = [str(path) for path in (picture, out) if path is not None]
    if args.json:
        points = [asdict(point) for point in found.points]
        print_json({"delta": args.delta, "points": points, "picked": found.best.coefficient, "rule": found.rule,
                    "forget": args.forget, "written": files})  # fmt: skip
        return 0
    rows = [
        [f"{p.coefficient:g}", f"{p.reliability:.3f}", f"{p.locality:.3f}", _mark(p, found.best)] for p in found.points
    ]
    name = "forgotten" if args.forget else "reliability"
    print_table((("coefficient", True), (name, True), ("locality", True), ("", False)), rows)
    print(f"\npicked {found.best.coefficient:g}: {found.rule}")
    for path in files:
        print(f"written: {path}" + (f" ({size(found.delta.nbytes)})" if path == str(out) else ""))
    return 0


def _swept(args: Namespace) -> Any:
    from tqdm import tqdm

    from kedit_train.cli.kedit.checkpoints import load_for
    from kedit_train.data import EditDataset
    from kedit_train.delta import EditDelta, sweep
    from kedit_train.evaluation import evaluate

    edits, delta = EditDataset.load(args.edits), EditDelta.load(args.delta)
    # Weights have to be those that the run began with, to the last bit.
    dtype = next((str(c.dtype).removeprefix("torch.") for c in delta.changes.values()), "auto")
    model, tokenizer = load_for(args, args.model, dtype)
    if delta.verify(model) == "edited":
        raise EditError(f"{args.model} has the delta applied already: give its base")
    how: dict[str, Any] = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens, "limit": args.limit}
    how |= {"prompt_format": args.prompt_format, "seed": args.seed, "progress": False}
    before = evaluate(model, tokenizer, edits, **how)
    count = len(set(args.coefficients) - {0.0})
    with tqdm(total=count + 1, desc="measuring", unit="coefficient", leave=False, disable=None) as bar:

        def score(current: Any) -> dict[str, float]:
            flat = evaluate(current, tokenizer, edits, before=before, **how).flat()
            bar.update()
            missing = next((q for q in ("reliability", "locality") if f"edit/{q}" not in flat), None)
            if missing is not None:
                raise EditError(f"{args.edits} has no probes of {missing}, which the rule needs; give edits that have")
            reliability = flat["edit/reliability"]
            return {"reliability": 1 - reliability if args.forget else reliability, "locality": flat["edit/locality"]}

        return sweep(model, delta, score, coefficients=args.coefficients, keep_locality=args.keep_locality)


def _mark(point: Any, best: Any) -> str:
    return "picked" if point == best else "the base" if point.coefficient == 0 else ""


def _new(name: str, ending: str, force: bool) -> Path:
    path = new_path(name, force)
    if path.suffix != ending:
        raise EditError(f"{name}: end the name in {ending}")
    return path


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ArgumentTypeError(f"{text} is no finite number")
    return value
