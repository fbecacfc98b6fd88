"""``kedit apply``: a delta and its base become the edited checkpoint."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from kedit_train.atomic_write import writing
from kedit_train.cli.kedit.output import json_option, print_json, size
from kedit_train.errors import EditError

HELP = "write the edited checkpoint from a delta and the base that it belongs to"
EPILOG = """\
examples:
  kedit apply runs/mine/edit.safetensors Qwen/Qwen3-0.6B runs/mine/model
  kedit apply runs/mine/edit.safetensors world runs/mine/model
  kedit apply runs/mine/edit.safetensors Qwen/Qwen3-0.6B runs/mine/model --dtype float32

Shard by shard, one tensor in memory; every tensor is compared with the base's SHA-256 before anything is written.
--dtype is for runs that loaded a half-precision checkpoint in fp32: it loads the whole model as that run did.
"""


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("delta", metavar="DELTA", help="what SaveDelta or kedit merge wrote")
    parser.add_argument("model", metavar="MODEL", help="the base: a checkpoint's folder, a hub name, or world")
    parser.add_argument("out", metavar="OUT", help="a folder that is not there yet")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="load the base in this dtype, as the run did"
    )
    json_option(parser)


def run(args: Namespace) -> int:
    if Path(args.out).exists():
        raise EditError(f"{args.out} is there already; give the name of a folder that is not")
    from kedit_train.cli.kedit.checkpoints import folder_of
    from kedit_train.delta import EditDelta

    delta, folder = EditDelta.load(args.delta), folder_of(args.model)
    if args.dtype is None:
        _check_dtypes(delta, folder)
        out = delta.apply_to_checkpoint(folder, args.out)
    else:
        out = _through_transformers(delta, folder, Path(args.out), args.dtype)
    if args.json:
        print_json({"out": str(out), "state": "edited", "tensors": len(delta), "bytes": delta.nbytes})
        return 0
    print(f"edited model: {out} ({len(delta)} tensors changed, {size(delta.nbytes)} of delta)")
    print(f"ask it: kedit eval {out} EDITS --against {args.model}")
    return 0


def _check_dtypes(delta: Any, folder: Path) -> None:
    from kedit_train.delta.weight_source import shards_of

    held = {name: span.dtype for spans in shards_of(folder).values() for name, span in spans.items()}
    for name, change in delta.changes.items():
        found = next((held[one] for one in (name, *change.tied) if one in held), change.dtype)
        if found != change.dtype:
            run, stored = (str(dtype).removeprefix("torch.") for dtype in (change.dtype, found))
            raise EditError(
                f"the run edited {name} in {run} and the checkpoint holds it in {stored}: add --dtype {run} to load "
                "it as the run did"
            )


def _through_transformers(delta: Any, folder: Path, out: Path, dtype: str) -> Path:
    """Load, apply, save; ``out`` appears when it is complete."""
    from kedit_train.cli.kedit.checkpoints import load

    model, tokenizer = load(str(folder), dtype)
    delta.apply(model)
    with writing(out) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    return out
