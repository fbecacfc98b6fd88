"""Write docs/api.md from the list of public names and the first lines of their docstrings.

python docs/write_api_page.py
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import kedit_train

PAGE = Path(__file__).resolve().parent / "api.md"
# Section of the page -> the module to import from, a sentence on the names, and the names.
MORE_SECTIONS = {
    "More callbacks": (
        "kedit_train.callbacks",
        "`OutputAnchor` and `ForecastMetrics` are for models that read no text, such as forecasters.",
        ["GatedAdapter", "OutputAnchor", "ForecastMetrics"],
    ),
    "Representation control": (
        "kedit_train.control",
        "They change what a model generates without changing its weights ([guide](representation_control.md)).",
        [
            "ValueModule",
            "ResponseDataModule",
            "SamplingOptions",
            "ValueModel",
            "controlled",
            "ControlMetrics",
            "measure_control",
            "Reward",
            "ShortAnswer",
            "PatternReward",
            "FactReward",
        ],
    ),
}
INTRODUCTION = """# Public names

Every name on this page can be imported from `kedit_train`, except those of the last two sections. `help(name)` shows
the arguments, errors, references and an example of a name. On the site that `make docs` builds, each name links to
these. Everything else in the package is internal and may change in any release, except functions that a page of these
docs imports, such as `kedit_train.augmentation.study_rows` and `kedit_train.data.split_documents`.
"""


def first_line(text: str) -> str:
    """Return the first line of a docstring, with Sphinx roles and double backticks converted to Markdown code."""
    line = text.partition("\n")[0]
    return re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", r"`\1`", line).replace("``", "`")


def section(title: str, text: str, module: ModuleType, names: Iterable[str]) -> str:
    """Return a section with a table of the names."""
    rows = [f"| `{name}` | {first_line(inspect.getdoc(getattr(module, name)) or '')} |" for name in names]
    return f"## {title}\n\n{text}" + "\n".join(["| name | what it is |", "|---|---|", *rows]) + "\n"


def render() -> str:
    """Return the page as Markdown."""
    parts = [INTRODUCTION]
    for title, names in kedit_train.PUBLIC_SECTIONS.items():
        parts.append(section(title, "", kedit_train, names))
    for title, (module, sentence, names) in MORE_SECTIONS.items():
        text = f"Import these names from `{module}`.\n{sentence}\n\n"
        parts.append(section(title, text, import_module(module), names))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
