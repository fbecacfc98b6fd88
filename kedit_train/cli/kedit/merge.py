"""``kedit merge``: several deltas of one base as one; or one, scaled or negated."""

from __future__ import annotations

import math
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from itertools import combinations
from pathlib import Path
from typing import Any

from kedit_train.cli.kedit.output import json_option, new_path, print_json, size
from kedit_train.errors import EditError

HELP = "merge deltas of one base into one (sum, TIES, DARE), scale or negate one"
EPILOG = """\
examples:
  kedit merge a.safetensors b.safetensors -o both.safetensors
  kedit merge a.safetensors b.safetensors --method ties --density 0.3 -o both.safetensors
  kedit merge a.safetensors --weights 0.5 -o half.safetensors         between the base and the edit (WiSE-FT)
  kedit merge a.safetensors --weights -1 -o forget.safetensors        away from the edit

The cosine of two deltas suggests what to expect of their sum (arXiv 2504.10957); kedit eval measures it.
"""


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("deltas", metavar="DELTA", nargs="+")
    parser.add_argument("--weights", type=_finite, nargs="+", metavar="W", help="one for each delta; 1 by default")
    parser.add_argument("--method", choices=("linear", "ties", "dare"), default="linear")
    parser.add_argument("--density", type=_finite, default=0.5, help="share of entries kept by ties and dare (0.5)")
    parser.add_argument("--seed", type=int, default=0, help="of what dare drops (0)")
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="the merged delta")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    json_option(parser)


def run(args: Namespace) -> int:
    out = new_path(args.out, args.force)
    if out.suffix != ".safetensors":
        raise EditError(f"{args.out}: a delta is a safetensors file; end its name in .safetensors")
    from kedit_train.delta import EditDelta, merge

    deltas = [EditDelta.load(path) for path in args.deltas]
    vector = merge(deltas, weights=args.weights, method=args.method, density=args.density, seed=args.seed)
    weights = args.weights or [1.0] * len(deltas)
    how = {"merged": [Path(path).name for path in args.deltas], "weights": weights, "method": args.method}
    how |= {} if args.method == "linear" else {"density": args.density}
    how |= {"seed": args.seed} if args.method == "dare" else {}
    merged = vector.delta(configuration=how)
    merged.save(out)
    pairs = []
    for (one, a), (other, b) in combinations(zip(args.deltas, deltas, strict=True), 2):
        pairs.append({"deltas": [one, other], **_relation(a.vector().cosine(b))})
    if args.json:
        print_json({"out": str(out), "tensors": len(merged), "bytes": merged.nbytes, **how, "relations": pairs})
        return 0
    for pair in pairs:
        advice = "the sum is likely to contain both edits" if pair["add"] else "the sum may lose one: evaluate it"
        print(f"{' and '.join(pair['deltas'])}: cosine {pair['cosine']:.3f}, {pair['kind']}; {advice}")
    print(f"merged delta: {out} ({len(merged)} tensors, {size(merged.nbytes)})")
    return 0


def _relation(cosine: float) -> dict[str, Any]:
    """Return what a cosine suggests for the sum of two deltas.

    "When is Task Vector Provably Effective for Model Editing?" (arXiv 2504.10957) proves for a one-layer Transformer
    that adding works for irrelevant and for aligned tasks. Two random directions in n dimensions have a cosine of about
    1 / sqrt(n), so small values count as irrelevant.
    """
    kind = "irrelevant" if abs(cosine) <= 0.1 else "aligned" if cosine > 0 else "contradictory"
    return {"cosine": cosine, "kind": kind, "add": kind != "contradictory"}


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ArgumentTypeError(f"{text} is no finite number")
    return value
