"""Fuzzers of recipes, as ``kedit validate`` reads them, and of plain YAML."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from fuzz.harness import Fuzzer, check_message
from fuzz.text_mutations import with_bytes, with_values

from kedit_train import EditError, catalog
from kedit_train.cli.kedit.validate import checked
from kedit_train.cli.yaml_text import MAX_EXPANDED, InvalidYAML, load_yaml

# What YAML has and JSON has not.
TOKENS = [
    b"&x ", b"*x", b"&x [*x]", b"<<: *x", b"<<: [*x, *x]", b"!!int ", b"!!float x", b"!!timestamp x", b"!!binary x",
    b"!!set ", b"!!omap [a]", b"!x ", b"!!python/object:os.system ", b"? ", b"? [a]\n: b\n", b"| \n", b">-\n",
    b"---\n", b"...\n", b"%YAML 1.1\n", b"1:2:3:4", b"2001-99-99", b".inf", b".nan", b"0x" + b"f" * 90, b"~",
    b"{a, b}", b"{a: }", b"- " * 60, b"\n  <<: {a: 1}\n", b"1: 2\n", b"null: 3\n", b"a: &x [1]\nb: *x\n", b"@", b"`",
    b"'", b'"\\x"', b"trainer: 3\n", b"trainer: [1]\n", b"callbacks: {a: 1}", b"- class_path: ", b"init_args: 3",
    b"init_args: [1]", b"texts: {source: 3}",
    b"x: &a [1,1,1,1,1,1,1,1]\ny: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nz: [*b,*b,*b,*b,*b,*b,*b,*b]\n",
]  # fmt: skip
NAMES = [
    "kedit_train.callbacks.KLLocality", "kedit_train.callbacks.EditCallback", "kedit_train.callbacks.NormBall",
    "kedit_train.callbacks", "kedit_train", "os", "lightning.pytorch.callbacks.EarlyStopping",
    "lightning.pytorch.loggers.CSVLogger", "torch.optim.Adam", "kedit_train.modules.EditModule", "KLLocality",
    "NormBall", "kedit_train.edit.Edit", "builtins.object", "kedit_train.callbacks.KLLocality.texts", "callbacks",
    "class_path", "init_args", "dict_kwargs", {"class_path": "kedit_train.callbacks.TokenSmoothing"},
    {"class_path": "kedit_train.callbacks.NormBall", "init_args": {"radius": 1.0}}, {"class_path": 3},
    {"init_args": {}}, {"source": "world", "nearest": 3}, {"a": {"b": {"c": 1}}}, [["a"]],
]  # fmt: skip


@cache
def recipes() -> dict[str, bytes]:
    """Return the packaged recipes and fragments without their comments."""
    kinds: tuple[catalog.Kind, ...] = ("recipes", "callbacks")
    paths = [catalog.find(kind, f"{kind}/{name}") for kind in kinds for name in catalog.names(kind)]
    return {
        path.stem: yaml.safe_dump(yaml.safe_load(path.read_text(encoding="utf-8"))).encode()
        for path in paths
        if path.suffix == ".yaml"
    }


@cache
def imported() -> None:
    """Import the modules that recipes need, so that the first file is not charged for the time of the imports."""
    assert checked("quickstart")["error"] is None


def make_recipe(draw: random.Random) -> bytes:
    imported()
    content = draw.choice(list(recipes().values()))
    if draw.random() < 0.5:
        return with_bytes(content, draw, tokens=TOKENS)
    value = with_values(yaml.safe_load(content), draw, others=NAMES)
    made = (json.dumps(value) if draw.random() < 0.5 else dumped(value)).encode("utf-8", "surrogatepass")
    return made if draw.random() < 0.9 else with_bytes(made, draw, tokens=TOKENS)


def dumped(value: Any) -> str:
    try:
        return yaml.safe_dump(value)
    except (ValueError, RecursionError):
        return json.dumps(value)


def use_recipe(path: Path) -> bool:
    row = checked(str(path))
    json.dumps(row)
    if row["error"] is not None:
        raise EditError(row["error"])
    assert row["kind"] in ("recipe", "fragment")
    assert all(isinstance(name, str) for name in row["callbacks"])
    return False


def make_yaml(draw: random.Random) -> bytes:
    if draw.random() < 0.3:
        return b"\n".join(draw.choice(TOKENS) for _ in range(draw.randrange(1, 8)))
    content = draw.choice(list(recipes().values()))
    for _ in range(draw.randrange(1, 4)):
        content = with_bytes(content, draw, tokens=TOKENS)
    return content


def use_yaml(path: Path) -> bool:
    content = path.read_bytes()
    text = content.decode("utf-8", "replace")
    try:
        value = load_yaml(text)
    except InvalidYAML as error:
        check_message(str(error))
        raise EditError(str(error)) from error
    size = len(repr(value))
    assert size < 10 * max(len(text), MAX_EXPANDED), f"{len(text)} characters became {size}"
    return False


RECIPES = {
    "recipe": Fuzzer("recipe", "mutated.yaml", make_recipe, use_recipe),
    "yaml": Fuzzer("yaml", "plain.yaml", make_yaml, use_yaml),
}
