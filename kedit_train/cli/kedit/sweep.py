"""``kedit sweep``: evaluate multiples of a delta, and pick the best multiple."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kedit_train.cli.kedit.output import (
    evaluation_options,
    finite,
    json_option,
    loading_options,
    new_path,
    print_json,
    print_table,
    size,
)
from kedit_train.errors import EditError

HELP = "evaluate multiples of a delta, and pick the most reliable multiple that keeps enough locality"
EPILOG = """\
examples:
  kedit sweep runs/mine/edit.safetensors Qwen/Qwen3-0.6B held_out.jsonl
  kedit sweep runs/mine/edit.safetensors world world --limit 24 --plot sweep.png --out picked.safetensors
  kedit sweep runs/mine/edit.safetensors world held_out.jsonl --coefficients 0.25 0.5 0.75 1 1.5 --keep-locality 0.98
  kedit sweep runs/mine/edit.safetensors world held_out.jsonl --forget --coefficients -0.25 -0.5 -1

The command adds multiples of the delta to the base model, and evaluates each of these models. The factor of a multiple
is called its coefficient. Reliability is the fraction of edits whose new answer the model gives. Locality is the
fraction of answers that are the same as the answers of the base model.

A coefficient is accepted if the locality of its model is at least --keep-locality times the locality of the base model.
The command picks the accepted coefficient with the highest reliability. If several coefficients are equally reliable,
the command picks the one nearest to 0. If no coefficient is accepted, or none is more reliable than the base model,
nothing is picked and no file is written. The scores are printed in every case.

Do not report scores on the edits with which you picked the coefficient. Evaluate the picked delta on other edits:
kedit eval MODEL OTHER_EDITS --delta picked.safetensors

Use --forget with a delta that was trained on answers that the model should unlearn. Reliability is then the fraction of
edits that the model no longer answers with their target.
"""
COEFFICIENTS = tuple(round(0.1 * i, 1) for i in range(1, 11))


def arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("delta", metavar="DELTA", help="a delta: the weight change of an edit, saved by SaveDelta or kedit merge")
    add("model", metavar="MODEL", help="the base model: a checkpoint folder, a hub name, or world")
    add("edits", metavar="EDITS", help="edits to evaluate on: .json, .jsonl, .csv, or world")
    add(
        "--coefficients",
        type=finite,
        nargs="+",
        metavar="C",
        default=COEFFICIENTS,
        help="multiples of the delta to evaluate (default: 0.1, 0.2, ... 1)",
    )
    add(
        "--keep-locality",
        type=finite,
        default=0.95,
        metavar="S",
        help="fraction of the base model's locality that must remain (default: 0.95)",
    )
    add(
        "--forget",
        action="store_true",
        help="score an edit as a success if the model no longer answers with the target of the edit",
    )
    evaluation_options(parser)
    add("--seed", type=int, default=0, help="random seed of the sample (default: 0)")
    loading_options(parser)
    add("--plot", metavar="FILE", help="write a plot of reliability and locality to this .png file")
    add("--out", metavar="FILE", help="write the picked multiple of the delta to this .safetensors file")
    add("--force", action="store_true", help="replace existing files")
    json_option(parser)


def run(args: Namespace) -> int:
    picture = new_path(args.plot, force=args.force, ending=".png") if args.plot else None
    out = new_path(args.out, force=args.force, ending=".safetensors") if args.out else None
    if out is not None and Path(args.delta).exists() and out.exists() and out.samefile(args.delta):
        raise EditError(f"--out {out} would replace the delta that this sweep reads; choose another file name.")
    if not set(args.coefficients) - {0.0}:
        raise EditError("--coefficients must contain a number other than 0, because 0 gives the base model.")
    if picture is not None:
        from kedit_train.evaluation.reporting.plots import new_figure

        # This call reports a missing matplotlib before answers are generated.
        new_figure(1, 1)
    points: list[Any] = []
    try:
        result = _sweep(args, points)
    except EditError as error:
        # An error before the last score is about the arguments. An error after the last score says that nothing was
        # picked.
        if len(points) < len(set(args.coefficients) - {0.0}) + 1:
            raise
        return _nothing_picked(args, points, error)
    if out is not None:
        result.delta.save(out)
    if picture is not None:
        from kedit_train.cli.kedit.sweep_plot import sweep_plot

        sweep_plot(result, picture, forget=args.forget)
    files = [str(path) for path in (picture, out) if path is not None]
    if args.json:
        points = [asdict(point) for point in result.points]
        print_json({"delta": args.delta, "points": points, "picked": result.best.coefficient, "rule": result.rule,
                    "forget": args.forget, "written": files})  # fmt: skip
        return 0
    _print_points(args, result.points, result.best)
    print(f"\npicked {result.best.coefficient:g}: {result.rule}")
    for path in files:
        print(f"saved: {path}" + (f" ({size(result.delta.nbytes)})" if path == str(out) else ""))
    return 0


def _nothing_picked(args: Namespace, points: list[Any], error: EditError) -> int:
    """Print the scores, say why no coefficient was picked, and return the exit code."""
    from kedit_train.cli.console import print_error

    if args.json:
        print_json({"delta": args.delta, "points": [asdict(point) for point in points], "picked": None,
                    "rule": str(error), "forget": args.forget, "written": []})  # fmt: skip
    else:
        _print_points(args, points, None)
    print_error(str(error))
    return 1


def _print_points(args: Namespace, points: Sequence[Any], best: Any) -> None:
    rows = [[f"{p.coefficient:g}", f"{p.reliability:.3f}", f"{p.locality:.3f}", _mark(p, best)] for p in points]
    name = "forgotten" if args.forget else "reliability"
    print_table((("coefficient", True), (name, True), ("locality", True), ("", False)), rows)


def _sweep(args: Namespace, points: list[Any]) -> Any:
    """Evaluate the multiples of the delta, and return the result of the sweep.

    The scores of each multiple are appended to ``points`` as soon as they are computed. If no multiple can be picked,
    the sweep raises an error, and the caller prints the scores in ``points``.
    """
    from tqdm import tqdm

    from kedit_train.cli.kedit.checkpoints import load_for
    from kedit_train.data import EditDataset
    from kedit_train.delta import EditDelta, SweepPoint, sweep
    from kedit_train.evaluation import EvaluationOptions, evaluate

    edits, delta = EditDataset.load(args.edits), EditDelta.load(args.delta)
    # A delta can be applied only to weights that equal the weights before the training run, bit for bit. So the model
    # is loaded in the dtype of the training run.
    dtype = next((str(c.dtype).removeprefix("torch.") for c in delta.changes.values()), "auto")
    model, tokenizer = load_for(args, args.model, dtype)
    if delta.verify(model) == "edited":
        raise EditError(f"the delta is already applied to the model {args.model!r}; pass the unedited model as MODEL.")
    options: dict[str, Any] = {"limit": args.limit, "seed": args.seed, "progress": False}
    options["options"] = EvaluationOptions(
        batch_size=args.batch_size, max_new_tokens=args.max_new_tokens, prompt_format=args.prompt_format
    )
    before = evaluate(model, tokenizer, edits, **options)
    # sweep() scores the base model first, and then the coefficients in ascending order.
    order = [0.0, *sorted(set(args.coefficients) - {0.0})]
    with tqdm(total=len(order), desc="evaluating", unit="coefficient", leave=False, disable=None) as bar:

        def score(current: Any) -> dict[str, float]:
            flat = evaluate(current, tokenizer, edits, unedited=before, **options).flat()
            bar.update()
            missing = next((q for q in ("reliability", "locality") if f"edit/{q}" not in flat), None)
            if missing is not None:
                raise EditError(
                    f"{args.edits} contains no {missing} questions, which are needed to pick a coefficient; use edits "
                    "with such questions."
                )
            reliability = flat["edit/reliability"]
            scores = {"reliability": 1 - reliability if args.forget else reliability, "locality": flat["edit/locality"]}
            points.append(SweepPoint(order[len(points)], **scores))
            return scores

        return sweep(model, delta, score, coefficients=args.coefficients, keep_locality=args.keep_locality)


def _mark(point: Any, best: Any) -> str:
    return "picked" if point == best else "base model" if point.coefficient == 0 else ""
