"""Write docs/api.md from the list of public names and the first lines of their docstrings.

python docs/write_api_page.py
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import kedit_train

PAGE = Path(__file__).resolve().parent / "api.md"
INTRODUCTION = """# Public names

Every name on this page can be imported from `kedit_train`. `help(name)` shows its arguments, errors, references and an
example. Everything else in the package is internal and may change in any release, except functions that a page of these
docs imports, such as `kedit_train.augmentation.study_rows` and `kedit_train.data.split_documents`.

Three more callbacks are public, but can be imported only from `kedit_train.callbacks`.
[`GatedAdapter`](callbacks/gated_adapter.md) lets a LoRA adapter act only near the prompts of the edits. The other two
are for models that read no text, such as forecasters:
[`OutputAnchor`](callbacks/output_anchor.md) keeps the outputs on given inputs close to those before the edit, and
[`ForecastMetrics`](callbacks/forecast_metrics.md) measures the error and the change of forecasts.

`kedit_train.control` changes what a model generates without changing its weights
([representation control](representation_control.md)). Its names are `ValueModule`, `ResponseDataModule`,
`SamplingOptions`, `ValueModel`, `controlled`, `ControlMetrics`, `measure_control`, and the rewards `Reward`,
`ShortAnswer`, `PatternReward` and `FactReward`.
"""


def first_line(text: str) -> str:
    """Return the first line of a docstring, with Sphinx roles and double backticks converted to Markdown code."""
    line = text.partition("\n")[0]
    return re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", r"`\1`", line).replace("``", "`")


def render() -> str:
    """Return the page as Markdown."""
    parts = [INTRODUCTION]
    for title, names in kedit_train.PUBLIC_SECTIONS.items():
        rows = [f"| `{name}` | {first_line(inspect.getdoc(getattr(kedit_train, name)) or '')} |" for name in names]
        parts.append("\n".join([f"## {title}\n", "| name | what it is |", "|---|---|", *rows]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
