"""An extension of griffe that turns the markup of this package's docstrings into Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe


def to_markdown(text: str) -> str:
    """Return a docstring with code instead of Sphinx roles, and with its examples in a section that griffe reads."""
    text = re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", r"`\1`", text)
    return re.sub(r"^(\s*)Example:(?=\n\s*>>>)", r"\1Examples:", text, flags=re.MULTILINE)


class PlainDocstrings(griffe.Extension):
    """Apply :func:`to_markdown` to every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
