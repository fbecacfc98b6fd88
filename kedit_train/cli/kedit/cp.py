"""``kedit cp``: copy a recipe or a callback fragment."""

from __future__ import annotations

import shutil
from argparse import ArgumentParser, Namespace
from difflib import get_close_matches
from pathlib import Path
from typing import get_args

from kedit_train import catalog
from kedit_train.cli.kedit.output import json_option, new_path, print_json
from kedit_train.errors import EditError

HELP = "copy a recipe or a callback fragment, so that you can change it"
EPILOG = """\
examples:
  kedit cp quickstart                            writes ./quickstart.yaml
  kedit cp locft_bf mine.yaml
  kedit cp callbacks/kl_locality configs/        copies the fragment and not the recipe of the same name
"""


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "name", metavar="NAME", help="a name from kedit ls, such as quickstart or callbacks/kl_locality"
    )
    parser.add_argument(
        "dest", metavar="DEST", nargs="?", default=".", help="a file or folder to copy to (default: the current folder)"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    json_option(parser)


def run(args: Namespace) -> int:
    source = packaged(args.name)
    into = Path(args.dest)
    if into.is_dir() or args.dest.endswith("/"):
        into = into / source.name
    if into.suffix != source.suffix:
        raise EditError(f"DEST must end with {source.suffix}, as {source.name} does, got {into.name}.")
    into = new_path(str(into), force=args.force)
    into.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, into)
    if args.json:
        print_json({"from": str(source), "to": str(into)})
    elif source.parent.name == "callbacks":
        print(f"{into}\nadd the fragment to your run with: python train.py fit --config my_run.yaml --config {into}")
    else:
        print(f"{into}\nrun the recipe with: lightning run {into}")
    return 0


def packaged(name: str) -> Path:
    """Return the packaged file with this name, such as ``quickstart`` or ``callbacks/kl_locality.yaml``.

    Raises:
        EditError: no packaged file has this name, or both a recipe and a fragment have this name.
    """
    given, matches = Path(name), []
    for kind in get_args(catalog.Kind):
        if str(given.parent) in (".", kind) and given.stem in catalog.names(kind):
            path = catalog.find(kind, f"{kind}/{given.stem}")
            matches += [(f"{kind}/{given.stem}", path)] if given.suffix in ("", path.suffix) else []
    if len(matches) > 1:
        raise EditError(f"the name {name!r} is ambiguous; write {' or '.join(full for full, _ in matches)}.")
    if not matches:
        known = [f"{kind}/{one}" for kind in get_args(catalog.Kind) for one in catalog.names(kind)]
        similar = _similar(given.stem, known)
        advice = f"write {' or '.join(similar)}, or run" if similar else "run"
        raise EditError(
            f"{name!r} is neither a file nor a packaged recipe or fragment; {advice} kedit ls for all names."
        )
    return matches[0][1]


def _similar(name: str, known: list[str]) -> list[str]:
    """Return up to three of the ``known`` names that are spelled like ``name``, ignoring their folders."""
    stems = dict.fromkeys(one.partition("/")[2] for one in known)
    close = get_close_matches(name, stems, n=3, cutoff=0.7)
    return [one for stem in close for one in known if one.partition("/")[2] == stem][:3]
