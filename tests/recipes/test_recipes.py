"""The catalogue's files keep what they say about themselves."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from kedit_train import catalog
from kedit_train.cli import recipe
from kedit_train.cli.edit import EditParser

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
# This recipe trains no language model, so it has no edits, no scope and no report. It has a test of its own.
VALUE = catalog.folder("recipes") / "representation_control.yaml"
# These recipes need a pretrained model: the bundled model does not store facts at the tokens of the subject.
SUBJECT = catalog.folder("recipes") / "subject_tokens.yaml"
VALUES = catalog.folder("recipes") / "subject_values.yaml"
NAMES = ("kedit_default", "subject_tokens")
RECIPES = [path for path in sorted(catalog.folder("recipes").glob("*.yaml")) if path not in (VALUE, SUBJECT, VALUES)]


@pytest.fixture(scope="module")
def parser() -> EditParser:
    """The entry's own parser of `fit`."""
    return recipe.parser()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe(path: Path, parser: EditParser) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 60
    header = "\n".join(line for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    assert f"lightning run recipes/{path.name}\n" in header
    config = parser.parse_path(str(path), defaults=True)
    assert config.model.init_args.name == "world"
    assert config.data.init_args.path == "world"
    # The last callback, so that one argument of it can be set on the command line.
    metrics = config.trainer.callbacks[-1]
    assert metrics.class_path.endswith(".EditMetrics")
    assert metrics.init_args.edits is None
    assert metrics.init_args.report_path == f"runs/{path.stem}/report.json"
    assert config.trainer.default_root_dir == f"runs/{path.stem}"
    scoped = any(callback.class_path.endswith(".ParameterScope") for callback in config.trainer.callbacks)
    assert scoped or config.model.init_args.lora
    assert all(len(line) <= 120 or "chat_template" in line for line in lines)
    # Or a launcher's processes would be contradicted.
    assert "devices" not in yaml.safe_load(path.read_text())["trainer"]


def test_subject_tokens_is_the_default_recipe_with_one_more_callback() -> None:
    default, own = (yaml.safe_load((catalog.folder("recipes") / f"{name}.yaml").read_text()) for name in NAMES)
    more = own["trainer"]["callbacks"].pop(1)
    assert more == {"class_path": "kedit_train.callbacks.SubjectTokens"}
    for one in (default, own):
        one["trainer"]["callbacks"][-1]["init_args"].pop("report_path")
        one["trainer"].pop("default_root_dir")
    assert own["trainer"] == default["trainer"]
    assert own["data"]["batch_size"] == default["data"]["batch_size"]
    assert Path(catalog.folder("recipes").parent / own["data"]["path"]).is_file()
    assert Path(catalog.folder("recipes").parent / own["data"]["texts"]).is_file()
    assert "lightning run recipes/subject_tokens.yaml\n" in SUBJECT.read_text()


def test_subject_values_edits_the_same_facts_and_can_be_read_by_the_entry(parser: EditParser) -> None:
    tokens, values = (yaml.safe_load(path.read_text()) for path in (SUBJECT, VALUES))
    for key in ("path", "texts"):
        assert values["data"][key] == tokens["data"][key]
    config = parser.parse_path(str(VALUES), defaults=True)
    names = [callback.class_path.rpartition(".")[2] for callback in config.trainer.callbacks]
    assert names[:3] == ["ParameterScope", "TokenLoss", "SubjectValues"]
    assert names[-1] == "EditMetrics"
    assert len(VALUES.read_text().splitlines()) <= 60
    assert "lightning run recipes/subject_values.yaml\n" in VALUES.read_text()


def test_every_recipe_says_what_to_expect() -> None:
    """In the line that `make recipes-check` reads: bounds that a run can miss, and not too wide."""
    for path in RECIPES:
        (line,) = (line for line in path.read_text().splitlines() if line.startswith("# Expected: "))
        bounds = re.findall(r"(reliability|generality|locality) (\d\.\d\d) to (\d\.\d\d)", line)
        assert [score for score, *_ in bounds] == ["reliability", "generality", "locality"], path.name
        for _, least, most in bounds:
            assert 0.0 <= float(least) < float(most) <= 1.0, path.name
            assert float(most) - float(least) <= 0.5, path.name


def test_the_gallery_names_every_recipe() -> None:
    gallery = (catalog.folder("recipes") / "README.md").read_text()
    for name in (*catalog.names("recipes"), "edit"):
        assert f"[{name}." in gallery


def test_quickstart_is_the_same_edit_in_trl() -> None:
    """Learning rate, batch, epochs and callbacks of the script are those of the YAML."""
    quickstart = yaml.safe_load((catalog.folder("recipes") / "quickstart.yaml").read_text())
    tree = ast.parse((catalog.folder("recipes") / "trl_sft.py").read_text())
    calls = {c.func.id: c for c in ast.walk(tree) if isinstance(c, ast.Call) and isinstance(c.func, ast.Name)}
    added = [c for c in ast.walk(tree) if isinstance(c, ast.Call) and getattr(c.func, "attr", "") == "add_argument"]

    def constants(call: ast.Call) -> dict:
        return {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}

    options = {c.args[0].value: constants(c) for c in added if isinstance(c.args[0], ast.Constant)}
    assert options["--learning_rate"]["default"] == quickstart["model"]["learning_rate"]
    assert options["--epochs"]["default"] == quickstart["trainer"]["max_epochs"]
    assert constants(calls["SFTConfig"])["per_device_train_batch_size"] == quickstart["data"]["batch_size"]
    for callback in quickstart["trainer"]["callbacks"]:
        name = callback["class_path"].rpartition(".")[2]
        own = {k: v for k, v in callback.get("init_args", {}).items() if k not in ("texts", "report_path")}
        assert constants(calls[name]) == own
