"""The recipe and the sweep file as YAML."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kedit_train.modes.tuning.halving import Trial
from kedit_train.modes.tuning.recipe import Source, recipe_text, sweep_text
from kedit_train.modes.tuning.settings import TuneGrid, TuneSetting

META = {"seed": 3, "append_eos": False, "prompt_format": "plain", "date": "2026-11-26T00:00", "protocol": "leading"}
NAMES = [
    "plain.txt",
    "a b: c #d.txt",
    "Bâle 😀.txt",
    'q"\\uote.txt',
    "line\nbreak: x\n- y.txt",
    "\x85\u2028.txt",
    "yes",
]


def text(name: str, kl_weight: float = 0.0, with_kl: bool = False) -> str:
    setting = TuneSetting(layers=0.7, modules="mlp.*.weight", step_size=1e-5, energy=0.8, kl_weight=kl_weight)
    trial = Trial(setting=setting, edits=5, reliability=1.0, generality=None, locality=0.5)
    source = Source(model=name, edits=name, keep=name, path=Path(name))
    return recipe_text(trial, trial, source, "a rule", META, with_kl=with_kl)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_kept_as_they_are(name: str) -> None:
    content = yaml.safe_load(text(name))
    assert (content["model"]["name"], content["data"]["path"]) == (name, name)
    callbacks = {c["class_path"].rpartition(".")[2]: c["init_args"] for c in content["trainer"]["callbacks"]}
    assert callbacks["NullSpace"] == {"texts": name, "neighbors": 24, "energy": 0.8, "batch_size": 64}
    assert callbacks["PolyakStep"] == {"step_size": 1e-5}
    assert callbacks["ParameterScope"] == {"layers": 0.7, "modules": "mlp.*.weight"}
    assert "KLLocality" not in callbacks
    assert (content["seed_everything"], content["data"]["append_eos"]) == (3, False)


def test_the_header_has_the_command_and_the_held_out_scores() -> None:
    header = text("mine.yaml").split("seed_everything")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert "\n#   lightning run mine.yaml\n" in header
    assert "# Measured on 5 held-out edits: reliability 1.00, locality 0.50\n" in header
    assert max(map(len, text("mine.yaml").splitlines())) <= 120


@pytest.mark.parametrize(("weight", "with_kl", "expected"), [(0.0, True, 0.0), (20.0, False, 20.0), (20.0, True, 20.0)])
def test_the_recipe_of_a_sweep_lists_every_callback_that_the_sweep_sets(
    weight: float, with_kl: bool, expected: float
) -> None:
    callbacks = yaml.safe_load(text("a.yaml", weight, with_kl))["trainer"]["callbacks"]
    (kl,) = (c for c in callbacks if c["class_path"].endswith("KLLocality"))
    assert kl["init_args"]["weight"] == expected


def test_a_sweep_has_the_grid_and_a_command() -> None:
    grid = TuneGrid(layers=["0.3-0.9", 0.7], step_sizes=[1e-5, 0.5])
    sweep = yaml.safe_load(sweep_text(grid, Path("a_recipe.yaml"), Path("a b.yaml")))
    prefix = "trainer.callbacks."
    assert sweep["method"] == "grid"
    assert {name.removeprefix(prefix): value["values"] for name, value in sweep["parameters"].items()} == {
        "ParameterScope.layers": ["0.3-0.9", 0.7],
        "PolyakStep.step_size": [1e-5, 0.5],
        "NullSpace.energy": [0.9],
        "KLLocality.weight": [0.0, 3.0],
    }
    assert "a_recipe.yaml" in sweep["command"]
    assert sweep["command"][-1] == "${args}"
