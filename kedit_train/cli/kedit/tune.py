"""``kedit tune``: find settings for a model on one half of the edits, and evaluate them on the other half."""

from __future__ import annotations

import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

from kedit_train.cli.kedit.output import (
    finite,
    json_option,
    loading_options,
    new_path,
    print_json,
    print_table,
    prompt_format_option,
    write_text,
)
from kedit_train.errors import EditError

HELP = "find settings for a model on one half of the edits, and evaluate them on the other half"
EPILOG = """\
examples:
  kedit tune Qwen/Qwen3-0.6B edits.jsonl --keep texts_that_must_stay.txt
  kedit tune Qwen/Qwen3-0.6B edits.jsonl --keep texts.txt --budget 20m --out tuned.yaml --wandb sweep.yaml
  kedit tune Qwen/Qwen3-0.6B edits.jsonl --keep texts.txt --layers 0.5-0.9 0.6 0.8 --step-sizes 0.03 0.05 0.1
  kedit tune world world --keep world --layers 0.3-0.9 --energies 0.8 --kl-weights 0

The command splits the edits into a tuning half and a held-out half. It tries all combinations of --layers,
--step-sizes, --energies and --kl-weights in up to three rounds. In the first round, every combination is trained on a
few edits of the tuning half. In the next round, the best third is trained on more edits. In the last round, the best
third of these is trained on the whole tuning half. The settings of the recipe kedit_default, if they are among the
combinations, are trained in every round.

Of the combinations with a reliability of at least 0.95, the command picks the one with the highest harmonic mean of
generality and locality. It replaces the settings of kedit_default only by a combination whose harmonic mean is higher
by at least 0.05, because smaller differences are often random. If no combination has a reliability of at least 0.95,
the command picks the most reliable one. The command then trains the picked combination once on the held-out half, and
writes a recipe. Report only the held-out scores.

If the command is interrupted, run it again: finished runs are not repeated. All results and the edits of both halves
are in the folder NAME.tune next to the recipe NAME.yaml.
"""
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="the model: a checkpoint folder, a hub name, a .gguf file, or world")
    add("edits", metavar="EDITS", help="edits with rephrases and locality questions: .json, .jsonl, .csv, or world")
    add(
        "--keep",
        required=True,
        metavar="FILE",
        help="a file of texts on which predictions should stay the same, or world",
    )
    add(
        "--budget",
        type=duration,
        metavar="TIME",
        help="time limit, such as 90s, 20m or 2h; each round and the held-out run get an equal share of this time "
        "(default: no limit)",
    )
    add("--out", default="tuned.yaml", metavar="FILE", help="write the recipe to this .yaml file (default: tuned.yaml)")
    add("--wandb", metavar="FILE", help="write a W&B sweep file with the same combinations to this .yaml file")
    add("--html", metavar="FILE", help="write all results as an HTML page with a plot to this .html file")
    add(
        "--layers",
        nargs="+",
        metavar="L",
        help="layers to try: indices, fractions of the depth or ranges (default: 0.66 0.5-0.8)",
    )
    add("--modules", metavar="M", help="weights to train in these layers (default: mlp.down_proj.weight)")
    add(
        "--step-sizes",
        nargs="+",
        type=finite,
        metavar="S",
        help="step sizes of PolyakStep (default: 0.03 0.05 0.1)",
    )
    add("--energies", nargs="+", type=finite, metavar="E", help="energies of NullSpace (default: 0.9)")
    add(
        "--kl-weights",
        nargs="+",
        type=finite,
        metavar="W",
        help="weights of KLLocality; 0 trains without KLLocality (default: 0 3)",
    )
    add("--limit", type=int, metavar="N", help="use a random sample of N edits")
    add(
        "--protocol",
        default="auto",
        metavar="P",
        help="how answers are judged: auto, leading, exact, contains, wild, teacher_forced or probability "
        "(default: auto)",
    )
    prompt_format_option(parser)
    add("--seed", type=int, default=0, help="random seed of the split and of the training (default: 0)")
    loading_options(parser)
    add("--force", action="store_true", help="replace existing files")
    json_option(parser)


def run(args: Namespace) -> int:
    out = new_path(args.out, force=args.force, ending=".yaml")
    sweep = new_path(args.wandb, force=args.force, ending=".yaml") if args.wandb else None
    page = new_path(args.html, force=args.force, ending=".html") if args.html else None
    recipe = sweep.with_name(f"{sweep.stem}_recipe.yaml") if sweep is not None else None
    if sweep is not None and recipe is not None and out.resolve() in (sweep.resolve(), recipe.resolve()):
        raise EditError(
            f"--wandb writes the files {sweep} and {recipe}, and --out also writes {out}; choose another file name for "
            "--wandb or --out."
        )
    from kedit_train.cli.kedit.checkpoints import load_for
    from kedit_train.core.gate.adapter_source import adapted_base
    from kedit_train.data import EditDataset
    from kedit_train.evaluation import EvaluationOptions
    from kedit_train.modes import TuneGrid, tune
    from kedit_train.world import is_world

    if adapted_base(args.model) is not None:
        raise EditError(
            f"MODEL must be a complete model, but {args.model} is an adapter; merge the adapter with its base "
            "model, and give the folder of the merged model."
        )
    # The arguments are checked before the model is loaded.
    grid = TuneGrid(**_given(args))
    options = EvaluationOptions(protocol=args.protocol, prompt_format=args.prompt_format)
    if args.limit is not None and args.limit < 1:
        raise EditError(f"--limit must be at least 1, got {args.limit}.")
    edits = EditDataset.load(args.edits)
    if args.limit is not None and args.limit < len(edits):
        edits = edits.sample(args.limit, seed=args.seed)
    _check_before_loading(args, edits, grid)
    folder = out.with_suffix(".tune")
    model, tokenizer = load_for(args, args.model, "float32")
    result = tune(
        model, tokenizer, edits, keep=args.keep, grid=grid, budget=args.budget, folder=folder, options=options,
        seed=args.seed,
    )  # fmt: skip
    halves = [
        half.save(folder / f"{name}.jsonl") for name, half in zip(("tuning", "held_out"), result.halves, strict=True)
    ]
    files = [result.save_recipe(out, model=args.model, edits=args.edits, keep=args.keep), *halves]
    if sweep is not None:
        # The bundled texts can be used only with the bundled edits, and not with a file that contains a part of the
        # bundled edits.
        part = args.edits if is_world(args.keep) else str(halves[0])
        files.append(result.save_sweep(sweep, model=args.model, edits=part, keep=args.keep))
    if page is not None:
        files.append(write_text(page, result.html() + "\n"))
    if args.json:
        print_json({**result.to_dict(), "written": [str(path) for path in files]})
        return 0
    _print(result, out, files)
    return 0


def _check_before_loading(args: Namespace, edits: Any, grid: Any) -> None:
    """Check the edits, the texts of ``--keep`` and the layers without loading the weights."""
    from kedit_train.cli.kedit.checkpoints import without_weights
    from kedit_train.core.locality.texts import Texts
    from kedit_train.core.scope.scope import resolve_scope
    from kedit_train.modes.tuning.halving import split_edits

    Texts.of(args.keep).check()
    edits.check_trained_together()
    split_edits(edits, args.seed)
    model = without_weights(args.model, trust_remote_code=args.trust_remote_code)
    if model is None:
        return
    for layers in grid.layers:
        resolve_scope(model, layers, grid.modules)


def duration(text: str) -> float:
    """Parse a duration such as ``90s``, ``20m`` or ``1.5h``, and return seconds. A number without a unit is seconds.

    Example:
        >>> duration("20m")
        1200.0
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?)([smh]?)", text.strip())
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not seconds:
        raise ArgumentTypeError(f"expected a time above 0, such as 90s, 20m or 2h, got {text}")
    return seconds


def _given(args: Namespace) -> dict[str, Any]:
    """Return the arguments of ``TuneGrid`` (the settings to try) that the command line sets."""
    names = ("layers", "modules", "step_sizes", "energies", "kl_weights")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _print(result: Any, out: Path, files: list[Path]) -> None:
    from kedit_train.modes.tuning.result import COLUMNS

    print_table([(name, bool(name)) for name in COLUMNS], result.rows())
    print("\n" + "\n".join(result.notes()))
    final = result.held_out
    scores = {"reliability": final.reliability, "generality": final.generality, "locality": final.locality}
    measured = ", ".join(f"{name} {value:.3f}" for name, value in scores.items() if value is not None)
    print(f"held out ({final.edits} edits): {measured}\n")
    for path in files:
        print(f"saved: {path}")
    print(f"run the recipe with: lightning run {out}")
