"""The wheel contains the package with its bundled model, the recipes and the callback fragments."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The builder that pip and `python -m build` use.
COMMAND = [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of all files in the wheel. Hatchling is in the dev extra of pyproject.toml."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run([*COMMAND, "-d", str(folder)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        return set(packed.namelist())


def test_every_module_is_in_the_wheel(names: set[str]) -> None:
    for file in (ROOT / "kedit_train").rglob("*.py"):
        assert str(file.relative_to(ROOT)) in names


@pytest.mark.parametrize("kind", ["recipes", "callbacks"])
def test_recipes_and_fragments_are_in_the_wheel(names: set[str], kind: str) -> None:
    files = list((ROOT / kind).glob("*.yaml"))
    assert files
    for file in files:
        assert f"kedit_train/_catalog/{kind}/{file.name}" in names


def test_the_embedded_model_is_in_the_wheel_and_tests_are_not(names: set[str]) -> None:
    assert "kedit_train/world/checkpoint/model.safetensors" in names
    assert not any(name.startswith(("tests/", "runs/")) for name in names)
