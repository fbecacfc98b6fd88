"""Parse JSON from a user's file. Every problem raises the same error class, with a short reason."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from kedit_train.data.tokenization import shorten


class InvalidJSON(ValueError):
    """The text is not valid JSON, or it is not accepted (see :func:`parse_json`).

    Args:
        reason: a short reason, without the name of the file.
        line: the line of the problem, counted from 1, or None if it is not known.
        column: the column of the problem, counted from 1, or None if it is not known.
    """

    def __init__(self, reason: str, line: int | None = None, column: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.line, self.column = reason, line, column


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        InvalidJSON: the text is not JSON, is nested too deeply, contains a number with too many digits, or names a key
            twice in one mapping. Python would keep only the last value of such a key.

    Example:
        >>> parse_json('{"prompt": "Ada lives in", "target": "Bern"}')["target"]
        'Bern'
    """
    try:
        return json.loads(text, object_pairs_hook=_mapping)
    except InvalidJSON:
        raise
    except json.JSONDecodeError as error:
        raise InvalidJSON(error.msg, error.lineno, error.colno) from error
    except RecursionError as error:
        raise InvalidJSON("it is nested too deeply") from error
    except ValueError as error:
        # Python limits the number of digits, because the conversion takes quadratic time.
        raise InvalidJSON("a number has too many digits") from error


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise InvalidJSON(f"the key {shorten(repeated)!r} appears twice in one mapping")
    return values
