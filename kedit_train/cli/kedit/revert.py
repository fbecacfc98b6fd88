"""``kedit revert``: an edited checkpoint and its delta become the base again, bit for bit."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from kedit_train.cli.kedit.output import json_option, print_json
from kedit_train.errors import EditError

HELP = "write the base again, bit for bit, from a delta and the edited checkpoint"
EPILOG = """\
examples:
  kedit revert runs/mine/edit.safetensors runs/mine/model runs/mine/base
  kedit revert runs/mine/edit.safetensors you/edited-model base --json
"""


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("delta", metavar="DELTA", help="the delta that was applied, or that the run saved")
    parser.add_argument("model", metavar="MODEL", help="the edited model: a checkpoint's folder or a hub name")
    parser.add_argument("out", metavar="OUT", help="a folder that is not there yet")
    json_option(parser)


def run(args: Namespace) -> int:
    if Path(args.out).exists():
        raise EditError(f"{args.out} is there already; give the name of a folder that is not")
    from kedit_train.cli.kedit.checkpoints import folder_of
    from kedit_train.delta import EditDelta

    delta = EditDelta.load(args.delta)
    out = delta.revert_checkpoint(folder_of(args.model), args.out)
    if args.json:
        print_json({"out": str(out), "state": "base", "tensors": len(delta), "bytes": delta.nbytes})
    else:
        print(f"base model: {out} ({len(delta)} tensors set back)")
    return 0
