"""``kedit validate``: check the keys of recipes and fragments without loading, downloading or training anything."""

from __future__ import annotations

from argparse import ArgumentError, ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from kedit_train.cli.kedit.cp import packaged
from kedit_train.cli.kedit.output import json_option, print_json
from kedit_train.errors import EditError

HELP = "check the classes, keys and arguments of recipes and fragments, without a GPU or a download"
EPILOG = """\
examples:
  kedit validate mine.yaml
  kedit validate quickstart callbacks/kl_locality        packaged files, by name
  kedit validate configs/*.yaml --json

To check the full configuration of another LightningCLI project, run python train.py fit --print_config in that project.
"""


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", nargs="+", help="YAML files, or names that kedit ls lists")
    json_option(parser)


def run(args: Namespace) -> int:
    from kedit_train.cli.console import print_error

    results = [checked(name) for name in args.files]
    failed = any(result["error"] is not None for result in results)
    if args.json:
        print_json(results)
        return 1 if failed else 0
    for result in results:
        if result["error"] is None:
            print(f"{result['file']}: valid {result['kind']} ({', '.join(result['callbacks']) or 'no callbacks'})")
        else:
            print_error(f"{result['file']}: {result['error']}")
    return 1 if failed else 0


def checked(name: str) -> dict[str, Any]:
    """Check one file, and return its name, kind, callbacks and error. The error is one line, or None."""
    row: dict[str, Any] = {"file": name, "kind": None, "callbacks": [], "error": None}
    try:
        path = Path(name) if Path(name).exists() or Path(name).is_absolute() else packaged(name)
        if not path.is_file():
            raise EditError("this path is not a file; give a YAML file, or a name that kedit ls lists.")
        row["kind"] = _kind(path)
        row["callbacks"] = check(path, complete=row["kind"] == "recipe")
    except (EditError, OSError) as error:
        row["error"] = " ".join(str(error).split())
    return row


def _kind(path: Path) -> str:
    """Return "fragment" for a file that contains only callbacks, and "recipe" for any other configuration."""
    from kedit_train.cli.yaml_text import InvalidYAML, load_yaml

    if path.suffix not in (".yaml", ".yml"):
        raise EditError("the file name must end with .yaml or .yml; to check a script, run the script.")
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except (InvalidYAML, UnicodeDecodeError) as error:
        raise EditError(f"the file is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise EditError("the file contains no keys; start from a packaged recipe (kedit ls lists the recipes).")
    trainer = content.get("trainer")
    if content.keys() != {"trainer"} or not isinstance(trainer, dict):
        return "recipe"
    return "fragment" if trainer.keys() <= {"callbacks+", "callbacks"} else "recipe"


def check(path: Path, *, complete: bool = True) -> list[str]:
    """Parse a file as ``fit --config`` does, and build the callbacks to check their arguments.

    Args:
        path: the YAML file.
        complete: True for a recipe, which must list every callback that its callbacks require. False for a fragment,
            which need not list them.

    Returns:
        The names of the callbacks.

    Raises:
        EditError: a key or an argument is not valid, or the callbacks cannot be combined.
    """
    import logging

    # This hides Lightning's list of accelerators, which does not matter for a check.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    from kedit_train.cli.config_errors import shorten
    from kedit_train.cli.edit import EditCLI, edit_error, share_texts
    from kedit_train.cli.main import quiet

    class Checking(EditCLI):
        """A ``fit`` command that only parses the configuration, and builds no model, data or trainer."""

        def parse_arguments(self, parser: Any, args: Any) -> None:
            self.config = parser.parse_args(args)

        # The method of the base class would read the settings of the model from a checkpoint.
        def _parse_ckpt_path(self) -> None: ...

        def _set_seed(self) -> None: ...

        def before_instantiate_classes(self) -> None: ...

        def instantiate_classes(self) -> None: ...

        def _run_subcommand(self, subcommand: str) -> None: ...

    quiet()
    raising = {"exit_on_error": False}
    try:
        cli = Checking(args=["fit", "--config", str(path)], parser_kwargs={**raising, "fit": raising})
    except ArgumentError as error:
        raise EditError(shorten(error.message)) from error
    config: Any = cli.config.fit
    callbacks = config.trainer.callbacks or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    share_texts(config)
    try:
        _check_length(config.trainer)
        _check_model_and_data(config)
        _check_together([_built(callback) for callback in callbacks], complete)
    except ValueError as error:
        raise edit_error(error) or error from error
    return [callback.class_path.rpartition(".")[2] for callback in callbacks]


def _check_length(trainer: Any) -> None:
    """Check ``max_epochs`` and ``max_steps``. If one of them is 0, Lightning trains nothing and reports no error."""
    from kedit_train.arguments import Rule, check_arguments, integer_from, optional

    positive = integer_from(1)
    length = Rule("an integer >= 1, or -1 for no limit", lambda value: value == -1 or positive.holds(value))
    check_arguments("trainer", max_epochs=(trainer.max_epochs, optional(length)), max_steps=(trainer.max_steps, length))


def _check_model_and_data(config: Any) -> None:
    """Check the arguments of ``EditModule`` and ``EditDataModule``, without loading the model or the edits."""
    from kedit_train.cli.edit import class_of
    from kedit_train.modules import EditDataModule, EditModule, check_data, check_model

    for part, own, check_part in ((config.model, EditModule, check_model), (config.data, EditDataModule, check_data)):
        if class_of(part.class_path) is own:
            check_part(**part.init_args.as_dict())


def _built(entry: Any) -> Any:
    """Build a callback to check its arguments.

    Callbacks of other packages are not built, because their constructors may do anything. For them, the result is None.
    """
    from kedit_train.cli.recipe import built

    if not entry.class_path.startswith("kedit_train."):
        return None
    try:
        return built(entry)
    except EditError:
        raise
    except ValueError as error:
        raise EditError(f"{entry.class_path}: {error}") from error


def _check_together(callbacks: list[Any], complete: bool) -> None:
    """Check that the callbacks of a file can be used together.

    Args:
        callbacks: the callbacks of the file. None stands for a callback of another package.
        complete: as for :func:`check`.
    """
    from kedit_train.callbacks import EditCallback
    from kedit_train.core.requirements import check_conflicts, check_duplicates, check_requirements

    # ControlMetrics is a Lightning callback of this package that is not part of an edit.
    own = [callback for callback in callbacks if isinstance(callback, EditCallback)]
    check_duplicates(own)
    if complete and len(own) == len(callbacks):
        check_requirements(own)
    else:
        # Requirements are not checked, because a callback of another package or file may provide what is required.
        check_conflicts(own)
