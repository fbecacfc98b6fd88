"""``kedit validate``: are the keys of a recipe or a fragment right? Nothing is loaded, downloaded or trained."""

from __future__ import annotations

from argparse import ArgumentError, ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from kedit_train.cli.kedit.cp import packaged
from kedit_train.cli.kedit.output import json_option, print_json
from kedit_train.errors import EditError

HELP = "check recipes and fragments without a GPU or a download: classes exist, arguments are valid"
EPILOG = """\
examples:
  kedit validate mine.yaml
  kedit validate quickstart callbacks/kl_locality        of the catalogue
  kedit validate configs/*.yaml --json

A configuration of another LightningCLI project (your train.py) is checked by that project; here, its fragments are.
"""


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", nargs="+", help="YAML files, or names of the catalogue")
    json_option(parser)


def run(args: Namespace) -> int:
    from kedit_train.cli.console import say_error

    found = [_checked(name) for name in args.files]
    wrong = [one for one in found if one["error"] is not None]
    if args.json:
        print_json(found)
        return 1 if wrong else 0
    for one in found:
        if one["error"] is None:
            print(f"{one['file']}: valid {one['kind']} ({', '.join(one['callbacks']) or 'no callbacks'})")
        else:
            say_error(f"{one['file']}: {one['error']}")
    return 1 if wrong else 0


def _checked(name: str) -> dict[str, Any]:
    row: dict[str, Any] = {"file": name, "kind": None, "callbacks": [], "error": None}
    try:
        path = Path(name) if Path(name).exists() or Path(name).is_absolute() else packaged(name)
        if not path.is_file():
            raise EditError("it is no file; give a YAML file, or a name of the catalogue (kedit ls)")
        row["kind"] = _kind(path)
        row["callbacks"] = check(path)
    except (EditError, OSError) as error:
        row["error"] = " ".join(str(error).split())
    return row


def _kind(path: Path) -> str:
    """A fragment adds callbacks and says nothing else."""
    import yaml

    if path.suffix not in (".yaml", ".yml"):
        raise EditError("it is no YAML; a script is checked by running it")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise EditError(f"it cannot be read as YAML: {error}; mend it there") from error
    if not isinstance(content, dict):
        raise EditError("it holds no keys; kedit ls lists files to start from")
    trainer = content.get("trainer")
    if content.keys() != {"trainer"} or not isinstance(trainer, dict):
        return "recipe"
    return "fragment" if trainer.keys() <= {"callbacks+", "callbacks"} else "recipe"


def check(path: Path) -> list[str]:
    """Parse ``path`` as ``fit --config`` does, and have our callbacks look at their arguments.

    Returns:
        The callbacks' names.

    Raises:
        EditError: which key is wrong and what it may be.
    """
    import logging

    # Lightning tells of accelerators that it sees, which is no part of the answer.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    from kedit_train.cli.config_errors import shorten
    from kedit_train.cli.edit import EditCLI, edit_error, quiet, share_texts
    from kedit_train.cli.recipe import built

    class Checking(EditCLI):
        """Parses; builds no model, data or trainer."""

        def parse_arguments(self, parser: Any, args: Any) -> None:
            self.config = parser.parse_args(args)

        def _set_seed(self) -> None: ...

        def before_instantiate_classes(self) -> None: ...

        def instantiate_classes(self) -> None: ...

        def _run_subcommand(self, subcommand: str) -> None: ...

    quiet()
    loud = {"exit_on_error": False}
    try:
        cli = Checking(args=["fit", "--config", str(path)], parser_kwargs={**loud, "fit": loud})
    except ArgumentError as error:
        raise EditError(shorten(error.message)) from error
    config: Any = cli.config.fit
    callbacks = config.trainer.callbacks or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    share_texts(config)
    for callback in callbacks:
        if not callback.class_path.startswith("kedit_train."):
            continue
        try:
            # Their constructors compare arguments and touch no file.
            built(callback)
        except ValueError as error:
            raise (edit_error(error) or EditError(f"{callback.class_path}: {error}")) from error
    return [callback.class_path.rpartition(".")[2] for callback in callbacks]
