"""Parse a recipe and build its callbacks without running the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from kedit_train import catalog
from kedit_train.callbacks import EditCallback
from kedit_train.cli import yaml_text
from kedit_train.cli.edit import EditCLI, EditParser, class_of, share_texts, with_catalog
from kedit_train.cli.named_callbacks import set_by_name, split_by_name, tell_last_callback
from kedit_train.errors import EditError


def parser() -> EditParser:
    """Return the parser of ``python -m kedit_train fit``, with the keys of trainer, data and model."""
    cli: Any = EditCLI.__new__(EditCLI)
    cli.parser_class, cli.seed_everything_default, cli.trainer_class, cli.trainer_defaults = EditParser, 0, None, {}
    cli.auto_configure_optimizers = True
    parser = cli.init_parser(description="Run a recipe. fit runs it in Lightning, and sft runs it in TRL.")
    cli._add_arguments(parser)
    return parser


def parse(arguments: Sequence[str]) -> Namespace:
    """Return the configuration that ``fit`` would run with these arguments. Nothing is built or loaded.

    Raises:
        EditError: an option for a named callback is not valid, or the texts of the run cannot be used (see
            :func:`~kedit_train.cli.edit.share_texts`).
        SystemExit: a key is not valid. Before the exit, one line that names the key is printed.
    """
    words, named = split_by_name(with_catalog(arguments))
    config = parser().parse_args(words)
    set_by_name(config.trainer.callbacks, named)
    tell_last_callback(words, config.trainer.callbacks)
    share_texts(config)
    return config


def load(name: str | Path, *arguments: str) -> Namespace:
    """Return the configuration of a recipe with command-line arguments applied. ``name`` may be a path."""
    return parse(["--config", str(catalog.find("recipes", str(name))), *arguments])


def callbacks(config: Namespace) -> list[EditCallback]:
    """Build the callbacks that a configuration lists.

    Raises:
        EditError: a callback is not an ``EditCallback``.
    """
    result = []
    for entry in config.trainer.callbacks or []:
        if not issubclass(class_of(entry.class_path), EditCallback):
            raise EditError(f"callback {entry.class_path} runs in Lightning only; remove the callback from the recipe.")
        result.append(built(entry))
    return result


def built(entry: Namespace) -> Any:
    """Build the object that a configuration entry describes. Its dataclass arguments are built too."""
    arguments = entry.init_args.as_dict() if entry.get("init_args") else {}
    parser = ArgumentParser(exit_on_error=False, parser_mode=yaml_text.MODE)
    parser.add_class_arguments(class_of(entry.class_path), "object")
    # Before jsonargparse 4.53 the method is called instantiate_classes.
    instantiate: Any = getattr(parser, "instantiate", None) or parser.instantiate_classes
    return instantiate(parser.parse_object({"object": arguments})).object
