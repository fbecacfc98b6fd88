"""The wheel contains the package, its bundled model and the recipes. The sdist contains the whole project."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from kedit_train import __version__

ROOT = Path(__file__).resolve().parents[2]
# The builder that pip and `python -m build` use.
COMMAND = [sys.executable, "-m", "hatchling", "build"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel. Hatchling is in the dev extra of pyproject.toml."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("built")
    ended = subprocess.run([*COMMAND, "-d", str(folder)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture(scope="module")
def names(built: Path) -> set[str]:
    """The names of all files in the wheel."""
    (wheel,) = built.glob("*.whl")
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
    assert "kedit_train/py.typed" in names


def test_the_wheel_has_the_version_of_the_package(built: Path, names: set[str]) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name.split("-")[1] == __version__
    with zipfile.ZipFile(wheel) as packed:
        metadata = packed.read(f"kedit_train-{__version__}.dist-info/METADATA").decode()
    assert f"\nVersion: {__version__}\n" in metadata


def test_the_sdist_contains_every_file_of_the_repository_that_is_not_ignored(built: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is not a git checkout")
    (sdist,) = built.glob("*.tar.gz")
    root = f"kedit_train-{__version__}/"
    with tarfile.open(sdist) as packed:
        names = {name.removeprefix(root) for name in packed.getnames()}
    assert {"LICENSE", "CITATION.cff", "SECURITY.md", "docs/api.md", "tests/test_public_api.py"} <= names
    assert {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()} <= names
    assert not any(name.startswith(("runs/", "dist/", ".venv/", ".models/")) for name in names)
