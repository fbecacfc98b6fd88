"""Set arguments of a callback by its class name: ``--trainer.callbacks.KLLocality.texts FILE``.

jsonargparse can set only the arguments of the last callback in the list (``--trainer.callbacks.texts FILE``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.fabric.utilities.rank_zero import rank_zero_only

from kedit_train.cli import yaml_text
from kedit_train.cli.config_errors import arguments
from kedit_train.errors import EditError

# Class names begin with a capital letter, and arguments do not.
BY_NAME = re.compile(r"--trainer\.callbacks\.([A-Z]\w*)\.([\w.]+)")
OF_THE_LAST = re.compile(r"--trainer\.callbacks\.([a-z_][\w.]*)")
Override = tuple[str, str, str]


def split_by_name(words: Sequence[str]) -> tuple[list[str], list[Override]]:
    """Separate the arguments of named callbacks from the other command-line words.

    Returns:
        The words for jsonargparse, and a triple (class name, argument, value) for each argument of a named callback.

    Raises:
        EditError: an argument of a named callback has no value.

    Example:
        >>> split_by_name(["fit", "--trainer.callbacks.KLLocality.texts", "keep.txt"])
        (['fit'], [('KLLocality', 'texts', 'keep.txt')])
    """
    rest, named, queue = [], [], list(words)
    while queue:
        word = queue.pop(0)
        option, equals, value = word.partition("=")
        match = BY_NAME.fullmatch(option)
        if match is None:
            rest.append(word)
            continue
        if not equals and not queue:
            raise EditError(f"{option} needs a value; write {option}=VALUE.")
        named.append((match[1], match[2], value if equals else queue.pop(0)))
    return rest, named


def set_by_name(callbacks: Any, overrides: Sequence[Override]) -> None:
    """Set arguments of the callbacks in a parsed configuration, in place.

    Raises:
        EditError: a named callback is missing or is listed more than once, has no such argument, or gets a value of a
            wrong type.
    """
    entries = _entries(callbacks)
    for name, argument, value in overrides:
        option = f"--trainer.callbacks.{name}.{argument}"
        found = [entry for entry in entries if _name(entry) == name]
        if len(found) != 1:
            listed = ", ".join(map(_name, entries)) or "none"
            raise EditError(
                f"{option} needs exactly one callback {name} in the run, got {len(found)}; the run has the callbacks: "
                f"{listed}. Change the name, or change trainer.callbacks in the recipe."
            )
        entry = found[0]
        if argument.partition(".")[0] not in arguments(entry.class_path):
            known = ", ".join(arguments(entry.class_path))
            raise EditError(f"{option}: {name} has no argument {argument!r}; valid arguments: {known}.")
        # A parser for the arguments of this class checks the type of the value, as for a value in a YAML file.
        parser = ArgumentParser(exit_on_error=False, parser_mode=yaml_text.MODE)
        parser.add_class_arguments(_class_of(entry.class_path), "object")
        given = entry.init_args.as_dict() if entry.get("init_args") else {}
        try:
            parser.set_defaults({f"object.{key}": each for key, each in given.items()})
            entry.init_args = parser.parse_args([f"--object.{argument}={value}"]).object
        except ArgumentError as error:
            # The key is the option, and "<class 'float'>" is printed as "float".
            problem = re.sub(r'Parser key "[^"]+":', "", re.sub(r"<class '(\w+)'>|typing\.", r"\1", str(error)))
            raise EditError(f"{option}: {' '.join(problem.split())}") from error


def tell_last_callback(words: Sequence[str], callbacks: Any) -> None:
    """Print which callback was changed by the option ``--trainer.callbacks.KEY``.

    If the option was not given, nothing is printed. Only one process of the run prints the line.
    """
    keys = [match[1] for word in words if (match := OF_THE_LAST.fullmatch(word.partition("=")[0]))]
    entries = _entries(callbacks)
    if not keys or not entries or getattr(rank_zero_only, "rank", 0):
        return
    name = _name(entries[-1])
    print(
        f"{name}, the last callback in the list, received {', '.join(keys)}; to choose another callback, write "
        f"--trainer.callbacks.CLASS.{keys[0]}"
    )


def _class_of(class_path: str) -> type:
    module, _, name = class_path.rpartition(".")
    return getattr(import_module(module), name)


def _entries(callbacks: Any) -> list[Namespace]:
    return callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []


def _name(entry: Any) -> str:
    return entry.class_path.rpartition(".")[2]
