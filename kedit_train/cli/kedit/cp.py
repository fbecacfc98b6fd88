"""``kedit cp``: a recipe or fragment of one's own to change."""

from __future__ import annotations

import shutil
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import get_args

from kedit_train import catalog
from kedit_train.cli.kedit.output import json_option, new_path, print_json
from kedit_train.errors import EditError

HELP = "copy a recipe or a fragment, to change it"
EPILOG = """\
examples:
  kedit cp quickstart                            ./quickstart.yaml
  kedit cp locft_bf mine.yaml
  kedit cp callbacks/kl_locality configs/        where a recipe has the same name, say which
"""


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="as kedit ls lists it: quickstart, callbacks/kl_locality")
    parser.add_argument("dest", metavar="DEST", nargs="?", default=".", help="a file or a folder; this folder")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    json_option(parser)


def run(args: Namespace) -> int:
    source = packaged(args.name)
    into = Path(args.dest)
    if into.is_dir() or args.dest.endswith("/"):
        into = into / source.name
    if into.suffix != source.suffix:
        raise EditError(f"{source.name} is to become {into.name}, of another kind; end the name in {source.suffix}")
    into = new_path(str(into), args.force)
    into.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, into)
    if args.json:
        print_json({"from": str(source), "to": str(into)})
    elif source.parent.name == "callbacks":
        print(f"{into}\njoin it to your run: python train.py fit --config my_run.yaml --config {into}")
    else:
        print(f"{into}\nrun it: lightning run {into}")
    return 0


def packaged(name: str) -> Path:
    """The file of the catalogue that ``name`` means: ``quickstart``, ``callbacks/kl_locality``, with ending or not.

    Raises:
        EditError: none, or a recipe and a fragment.
    """
    given, found = Path(name), []
    for kind in get_args(catalog.Kind):
        if str(given.parent) in (".", kind) and given.stem in catalog.names(kind):
            path = catalog.find(kind, f"{kind}/{given.stem}")
            found += [(f"{kind}/{given.stem}", path)] if given.suffix in ("", path.suffix) else []
    if len(found) > 1:
        raise EditError(f"{name!r} may be {' or '.join(full for full, _ in found)}: say which")
    if not found:
        known = [f"{kind}/{one}" for kind in get_args(catalog.Kind) for one in catalog.names(kind)]
        raise EditError(f"the catalogue has no {name!r}; it has {', '.join(known)}")
    return found[0][1]
