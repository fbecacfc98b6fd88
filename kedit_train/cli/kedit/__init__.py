"""The ``kedit`` command, which lists and checks recipes, and inspects, applies, merges and evaluates edits.

Each verb is one file with ``HELP``, ``EPILOG``, ``arguments(parser)`` and ``run(args)``. A verb imports torch only in
``run``, so that help texts, ``kedit ls`` and messages about wrong arguments appear without delay.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from kedit_train.cli.kedit import apply, cp, eval, ls, merge, revert, show, sweep, tune, validate
from kedit_train.errors import EditError
from kedit_train.version import __version__

VERBS: tuple[ModuleType, ...] = (ls, cp, validate, show, apply, revert, merge, sweep, eval, tune)
EPILOG = """\
examples:
  kedit ls recipes                                    list the recipes
  kedit cp quickstart mine.yaml                       copy a recipe, so that you can change it
  kedit validate mine.yaml                            check the keys of a recipe, without a GPU or a download
  kedit show runs/mine/edit.safetensors --png         show which weights a run changed
  kedit eval runs/mine/model edits.jsonl --against Qwen/Qwen3-0.6B      compare an edited model with its base model

A delta is a file with the weight change of an edit. A fragment is a YAML file with callbacks to add to a recipe.

Exit codes: 0 if the command succeeded, 1 if it failed (one line says why), 2 if the arguments are not valid.
Set the environment variable KEDIT_TRACEBACK=1 to see the traceback of an error. kedit VERB --help shows examples of a
verb.
"""


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line and names the help command at the end."""

    def error(self, message: str) -> NoReturn:
        from kedit_train.cli.console import print_error

        print_error(f"{message}; see {self.prog} --help")
        raise SystemExit(2)


def parser() -> Parser:
    """Return the parser of the ``kedit`` command with all verbs."""
    main_parser = Parser(
        prog="kedit",
        description="List and check recipes. Inspect, apply, merge and evaluate knowledge edits.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    main_parser.add_argument("--version", action="version", version=f"kedit-train {__version__}")
    verbs = main_parser.add_subparsers(metavar="VERB", required=True, parser_class=Parser)
    for verb in VERBS:
        verb_parser = verbs.add_parser(
            verb.__name__.rpartition(".")[2],
            help=verb.HELP,
            description=verb.HELP[0].upper() + verb.HELP[1:] + ".",
            epilog=verb.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.arguments(verb_parser)
        verb_parser.set_defaults(run=verb.run)
    return main_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the console script ``kedit`` and return the exit code.

    Args:
        arguments: the words after ``kedit``. None uses the words in ``sys.argv``.
    """
    from kedit_train.cli.console import print_error

    args: Any = parser().parse_args(sys.argv[1:] if arguments is None else list(arguments))
    try:
        return args.run(args)
    except BrokenPipeError:
        # The program that reads the pipe, such as `head`, has closed the pipe. Python flushes the remaining output
        # when it exits. Standard output is redirected to os.devnull, so that this does not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (EditError, OSError) as error:
        if os.environ.get("KEDIT_TRACEBACK") == "1":
            raise
        print_error(str(error))
        return 1
    except KeyboardInterrupt:
        print_error("interrupted")
        return 130
