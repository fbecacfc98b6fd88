"""The examples in the docstrings of ``kedit_train.control`` run, and its public names are documented."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

from kedit_train import control

MODULES = [module.name for module in pkgutil.iter_modules(control.__path__)]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "representation_control.md"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run(name: str) -> None:
    module = importlib.import_module(f"kedit_train.control.{name}")
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).failed == 0


def test_the_page_names_what_a_user_imports() -> None:
    page = PAGE.read_text(encoding="utf-8")
    missing = [n for n in control.__all__ if n not in page and n not in ("Control", "Reward", "measure_control")]
    assert not missing
