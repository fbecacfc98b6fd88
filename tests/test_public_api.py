"""The public interface: one list of names, complete docstrings, short signatures, examples that run."""

from __future__ import annotations

import doctest
import inspect
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

import kedit_train
from kedit_train import PUBLIC_NAMES, callbacks

OBJECTS = {name: getattr(kedit_train, name) for name in PUBLIC_NAMES if name != "world"}
CLASSES = {name: found for name, found in OBJECTS.items() if inspect.isclass(found)}
# Records of data and results, exceptions and TRL's configuration: their fields are what they are.
RECORDS = {"Edit", "Probe", "EditError", "EditSFTConfig", "EditSFTTrainer", "Report", "EditDelta", "TaskVector"}
DOCS = Path(__file__).resolve().parents[1] / "docs"


def arguments(found: Any) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(found).parameters.values() if p.name not in ("self", "args", "kwargs")]


def test_the_list_has_about_50_names_and_is_sorted_once():
    assert 40 <= len(PUBLIC_NAMES) <= 55
    assert sorted(PUBLIC_NAMES) == sorted(kedit_train.__all__) == sorted(dir(kedit_train))


@pytest.mark.parametrize("name", OBJECTS)
def test_the_docstring_is_complete(name: str):
    text = inspect.getdoc(OBJECTS[name]) or ""
    assert text.splitlines()[0].endswith("."), "the first line is one sentence"
    assert "Example:" in text
    assert ">>>" in text
    if arguments(OBJECTS[name]):
        assert "Args:" in text
        described = text.split("Args:", 1)[1]
        missing = [p.name for p in arguments(OBJECTS[name]) if not re.search(rf"\b{p.name}\b", described)]
        assert not missing or name == "EditSFTConfig"


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - RECORDS))
def test_a_class_has_at_most_eight_arguments_and_only_the_first_is_positional(name: str):
    parameters = arguments(CLASSES[name])
    assert len(parameters) <= 8
    positional = [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert len(positional) <= 1


# Examples may leave temporary folders to the garbage collector.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OBJECTS)
def test_the_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
    runner = doctest.DocTestRunner(optionflags=flags)
    tests = doctest.DocTestParser().get_doctest(
        inspect.getdoc(OBJECTS[name]) or "", {name: OBJECTS[name]}, name, None, 0
    )
    output: list[str] = []
    runner.run(tests, out=output.append)
    assert runner.tries > 0
    assert not runner.failures, "".join(output)


def test_the_page_of_public_names_is_up_to_date():
    rendered = runpy.run_path(str(DOCS / "write_api_page.py"))["render"]()
    assert all(rendered.count(f"| `{name}` |") == 1 for name in PUBLIC_NAMES)
    assert (DOCS / "api.md").read_text(encoding="utf-8") == rendered, "run docs/write_api_page.py"


@pytest.mark.parametrize("options", ["EvaluationOptions", "Texts"])
def test_options_are_frozen(options: str):
    assert CLASSES[options].__dataclass_params__.frozen


def test_every_callback_is_on_the_page_of_public_names():
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    assert [name for name in callbacks.__all__ if f"| `{name}` |" not in page] == []
