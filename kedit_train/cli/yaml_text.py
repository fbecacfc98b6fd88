"""Parse YAML from a user's file in bounded time and memory. Every problem raises the same error class."""

from __future__ import annotations

import re
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from kedit_train.arguments import cut
from kedit_train.cli.yaml_keys import check_keys

# The mode of jsonargparse's parsers in which load_yaml reads files and texts.
MODE = "kedit_yaml"
# Maximum number of characters after every alias (*name) is replaced by what it names. Without this limit, a few lines
# with aliases can stand for billions of values.
MAX_EXPANDED = 100_000
# Maximum number of nested levels. Functions that walk through a configuration are recursive.
MAX_DEPTH = 50
# Maximum number of digits of an integer. Python refuses to print integers with more than 4,300 digits, and no setting
# needs more than 100.
MAX_DIGITS = 100
_INTEGER = re.compile(r"[-+]?(?:0[xX][0-9a-fA-F_]+|0[bB][01_]+|[0-9][0-9_:]*)")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class InvalidYAML(yaml.YAMLError):
    """The text is not valid YAML, or is not accepted (see :func:`load_yaml`).

    The message is one short line, without the name of the file.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(cut(" ".join(reason.split())))


def load_yaml(text: str) -> Any:
    """Return the value of a YAML text, as the command ``fit`` reads it.

    Raises:
        InvalidYAML: the text is not YAML, is nested too deeply, or sets a key twice in one mapping. The error is also
            raised if an alias contains itself, if aliases expand to too much text, if a number has too many digits, or
            if a value does not fit its tag.

    Example:
        >>> load_yaml("trainer: {max_epochs: 3}")
        {'trainer': {'max_epochs': 3}}
        >>> load_yaml("&again [*again]")
        Traceback (most recent call last):
        ...
        kedit_train.cli.yaml_text.InvalidYAML: the alias at line 1 contains itself
    """
    try:
        _check(text)
        check_keys(yaml.parse(text, Loader=_LOADER))
        return get_loader("yaml")(text)
    except InvalidYAML:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f" at line {mark.line + 1}, column {mark.column + 1}"
        # The context is the beginning of a sentence ("expected a single document, "), or "while parsing a block".
        link = ": " if (error.context or "").startswith("while") else " "
        reason = link.join(part for part in (error.context, error.problem) if part)
        raise InvalidYAML(f"{reason}{where}") from error
    except yaml.YAMLError as error:
        raise InvalidYAML(str(error).replace('in "<unicode string>", position', "at position")) from error
    except RecursionError as error:
        raise InvalidYAML("the text is nested too deeply") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # PyYAML has no error of its own for a value that does not fit its tag, such as "!!int x".
        raise InvalidYAML(
            f"a value does not fit its type or its tag (such as !!int), or a key is not text: {error}"
        ) from error


def _check(text: str) -> None:
    """Check the nesting, the aliases and the numbers of a text before PyYAML builds its values.

    Raises:
        InvalidYAML: see :func:`load_yaml`.
    """
    # For each open level: its anchor or None, and its number of characters, with aliases replaced by what they name.
    levels: list[tuple[str | None, int]] = [(None, 0)]
    sizes: dict[str, int] = {}
    written = 0
    for event in yaml.parse(text, Loader=_LOADER):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.CollectionStartEvent):
            if len(levels) > MAX_DEPTH:
                raise InvalidYAML(f"the text has more than {MAX_DEPTH} levels at line {line}")
            levels.append((event.anchor, 1))
            continue
        if isinstance(event, yaml.AliasEvent):
            if any(event.anchor == anchor for anchor, _ in levels):
                raise InvalidYAML(f"the alias at line {line} contains itself")
            # An alias without an anchor has size 0 here. PyYAML reports the missing anchor when it builds the values.
            anchor, size = None, sizes.get(event.anchor, 0)
        elif isinstance(event, yaml.ScalarEvent):
            if len(event.value) > MAX_DIGITS and _INTEGER.fullmatch(event.value):
                raise InvalidYAML(f"the number at line {line} has more than {MAX_DIGITS} digits")
            anchor, size = event.anchor, 1 + len(event.value)
            written += size
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = levels.pop()
            written += 1
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        levels[-1] = (levels[-1][0], levels[-1][1] + size)
    # levels[0][1] is the size with all aliases replaced. Without aliases, it equals the written size.
    if levels[0][1] > max(written, MAX_EXPANDED):
        raise InvalidYAML(f"the aliases expand to more than {MAX_EXPANDED:,} characters")


set_loader(MODE, load_yaml, (yaml.YAMLError,))
