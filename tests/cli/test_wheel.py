"""The wheel that users install: it is built, and holds the package with its world, the recipes and the fragments."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Hatchling's command line; the builder that pip and `python -m build` call is the same.
COMMAND = [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run([*COMMAND, "-d", str(folder)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        return set(packed.namelist())


def test_every_module_travels(names: set[str]) -> None:
    for file in (ROOT / "kedit_train").rglob("*.py"):
        assert str(file.relative_to(ROOT)) in names


@pytest.mark.parametrize("kind", ["recipes", "callbacks"])
def test_the_catalogue_travels(names: set[str], kind: str) -> None:
    files = list((ROOT / kind).glob("*.yaml"))
    assert files
    for file in files:
        assert f"kedit_train/_catalog/{kind}/{file.name}" in names


def test_the_world_travels_and_the_tests_do_not(names: set[str]) -> None:
    assert "kedit_train/world/checkpoint/model.safetensors" in names
    assert not any(name.startswith(("tests/", "runs/")) for name in names)
