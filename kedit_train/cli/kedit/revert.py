"""``kedit revert``: restore the base checkpoint from an edited checkpoint and its delta."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from kedit_train.cli.kedit.output import check_new_folder, json_option, naming_models, print_json
from kedit_train.plural import plural

HELP = "write the base checkpoint, bit for bit, from a delta and the edited checkpoint"
EPILOG = """\
examples:
  kedit revert runs/mine/edit.safetensors runs/mine/model runs/mine/base
  kedit revert runs/mine/edit.safetensors you/edited-model base --json
"""


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("delta", metavar="DELTA", help="the delta that was applied")
    parser.add_argument("model", metavar="MODEL", help="the edited model: a checkpoint folder or a hub name")
    parser.add_argument("out", metavar="OUT", help="a new folder for the base checkpoint")
    json_option(parser)


def run(args: Namespace) -> int:
    check_new_folder(args.out)
    from kedit_train.cli.kedit.checkpoints import folder_of
    from kedit_train.delta import EditDelta

    delta = EditDelta.load(args.delta)
    folder = folder_of(args.model)
    with naming_models(args.delta, delta.meta, args.model):
        out = delta.revert_checkpoint(folder, args.out)
    if args.json:
        print_json({"out": str(out), "state": "base", "tensors": len(delta), "bytes": delta.nbytes})
    else:
        print(f"base model: {out} ({plural(len(delta), 'tensor')} restored)")
    return 0
