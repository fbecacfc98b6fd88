"""``kedit merge``: combine several deltas of one base, or scale one delta."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from itertools import combinations
from pathlib import Path
from typing import Any

from kedit_train.cli.kedit.output import finite, json_option, new_path, print_json, size
from kedit_train.plural import plural

HELP = "merge deltas of one base model (sum, TIES, DARE), or scale or negate one delta"
EPILOG = """\
examples:
  kedit merge a.safetensors b.safetensors -o both.safetensors
  kedit merge a.safetensors b.safetensors --method ties --density 0.3 -o both.safetensors
  kedit merge a.safetensors --weights 0.5 -o half.safetensors         halfway between the base and the edit
  kedit merge a.safetensors --weights -1 -o forget.safetensors        away from the edit

For each pair of deltas, the command prints the cosine between their weight changes. The cosine suggests whether the sum
of two deltas contains both edits (arXiv 2504.10957). A delta with a negative weight is subtracted: the model moves away
from its edit, and edits that are similar to it are weakened, too. Use kedit eval to measure the merged delta.
"""

ADVICE = {
    "irrelevant": "the sum is likely to contain both edits",
    "similar": (
        "the sum is likely to contain both edits if they agree, but not if they give different answers to the same "
        "prompts, so evaluate it"
    ),
    "opposite": "the sum may lose an edit, so evaluate it",
}
# The advice if one of the two deltas is subtracted.
DIFFERENCE_ADVICE = {
    "irrelevant": "the difference is likely to contain the edit that is added",
    "similar": "the subtraction is likely to weaken the edit that is added, too, so evaluate it",
    "opposite": "the difference is likely to contain the edit that is added, but is a larger change, so evaluate it",
}


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("deltas", metavar="DELTA", nargs="+", help="deltas of the same base model")
    parser.add_argument("--weights", type=finite, nargs="+", metavar="W", help="one factor for each delta (default: 1)")
    parser.add_argument(
        "--method", choices=("linear", "ties", "dare"), default="linear", help="merge method (default: linear)"
    )
    parser.add_argument(
        "--density",
        type=finite,
        default=0.5,
        metavar="D",
        help="fraction of entries to keep, for ties and dare (default: 0.5)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed for dropping entries, for dare (default: 0)"
    )
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="the .safetensors file of the merged delta")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    json_option(parser)


def run(args: Namespace) -> int:
    out = new_path(args.out, force=args.force, ending=".safetensors")
    from kedit_train.delta import EditDelta, merge

    deltas = [EditDelta.load(path) for path in args.deltas]
    vector = merge(deltas, weights=args.weights, method=args.method, density=args.density, seed=args.seed)
    weights = args.weights or [1.0] * len(deltas)
    settings = {"merged": [Path(path).name for path in args.deltas], "weights": weights, "method": args.method}
    settings |= {} if args.method == "linear" else {"density": args.density}
    settings |= {"seed": args.seed} if args.method == "dare" else {}
    merged = vector.delta(configuration=settings)
    merged.save(out)
    relations = [
        {"deltas": [path, other_path], **_relation(delta.vector().cosine(other), weight, other_weight)}
        for (path, delta, weight), (other_path, other, other_weight) in combinations(
            zip(args.deltas, deltas, weights, strict=True), 2
        )
    ]
    if args.json:
        about = {"out": str(out), "tensors": len(merged), "bytes": merged.nbytes}
        print_json({**about, **settings, "relations": relations})
        return 0
    for pair in relations:
        print(f"{' and '.join(pair['deltas'])}: cosine {pair['cosine']:.3f}, {pair['kind']}; {pair['advice']}")
    for path in (path for path, weight in zip(args.deltas, weights, strict=True) if weight < 0):
        print(
            f"{path} is subtracted: the model moves away from this edit, and edits that are similar to it are "
            "weakened, too, so evaluate them"
        )
    print(f"merged delta: {out} ({plural(len(merged), 'tensor')}, {size(merged.nbytes)})")
    return 0


def _relation(cosine: float, weight: float, other_weight: float) -> dict[str, Any]:
    """Predict from the cosine of two deltas whether their merge contains both edits.

    Args:
        cosine: the cosine between the weight changes of the two deltas.
        weight: the factor of the first delta in the merge.
        other_weight: the factor of the second delta in the merge.

    Returns:
        A dictionary with ``cosine`` and three more keys. ``kind`` is "irrelevant" (cosine from -0.1 to 0.1), "similar"
        (above 0.1) or "opposite" (below -0.1). ``add`` is True if the merge is likely to contain both edits: the kind
        is "irrelevant" and both weights are above 0. ``advice`` is a text for the user.

    The cosine of two random directions in n dimensions is typically about 1 / sqrt(n) in size, so a small cosine counts
    as irrelevant. "When is Task Vector Provably Effective for Model Editing?" (arXiv 2504.10957) proves a result for a
    one-layer Transformer: adding task vectors works if the tasks are irrelevant to each other or aligned. A cosine
    above 0.1 does not show that two edits are aligned. Edits that give different answers to the same prompts also have
    such a cosine, because their weight changes act on the same layer inputs. ``add`` is therefore False for "similar"
    deltas.
    """
    kind = "irrelevant" if abs(cosine) <= 0.1 else "similar" if cosine > 0 else "opposite"
    both = weight > 0 and other_weight > 0
    if both:
        advice = ADVICE[kind]
    elif weight * other_weight < 0:
        advice = DIFFERENCE_ADVICE[kind]
    else:
        advice = "both are subtracted" if weight < 0 and other_weight < 0 else "a delta with weight 0 has no effect"
    return {"cosine": cosine, "kind": kind, "add": both and kind == "irrelevant", "advice": advice}
