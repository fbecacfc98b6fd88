"""The lower bounds in pyproject.toml are those of the lowest tested set, and fit each other."""

from __future__ import annotations

from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from project_file import project_file

ROOT = Path(__file__).resolve().parents[1]
PROJECT = project_file()["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Tools of this repository, which a user does not install.
DEVELOPMENT = {"kedit-train", "pytest", "pytest-xdist", "ruff", "pyright", "hatchling"}
DEVELOPMENT |= {"mkdocs", "mkdocs-material", "mkdocstrings"}


def bound(requirement: Requirement) -> str:
    """Return the lower bound of a requirement, or "0" if it has none."""
    return next((one.version for one in requirement.specifier if one.operator in (">=", "==")), "0")


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {one.name.lower(): bound(one) for one in found}


DECLARED: dict[str, str] = {}
for line in [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]:
    one = Requirement(line)
    if one.name not in DEVELOPMENT:
        DECLARED[one.name] = bound(one)


def test_the_bounds_are_those_of_the_lowest_tested_set() -> None:
    lowest = pins("constraints-lowest.txt")
    assert {name: Version(one) for name, one in lowest.items()} == {n: Version(one) for n, one in DECLARED.items()}


def test_a_package_has_one_bound_in_all_extras() -> None:
    for extra in EXTRAS.values():
        for line in extra:
            one = Requirement(line)
            assert DECLARED.get(one.name, bound(one)) == bound(one), line


def test_the_tested_set_meets_the_bounds() -> None:
    tested = pins("constraints.txt")
    for name, lowest in DECLARED.items():
        if name in tested:
            assert Version(tested[name]) >= Version(lowest), name


@pytest.mark.parametrize("name", sorted(DECLARED))
def test_a_package_at_its_lower_bound_accepts_the_other_bounds(name: str) -> None:
    """Only a package that is installed at its lower bound says here what it needs."""
    try:
        if Version(Version(version(name)).base_version) != Version(DECLARED[name]):
            pytest.skip(f"{name} {DECLARED[name]} is not installed")
    except ModuleNotFoundError:
        pytest.skip(f"{name} is not installed")
    for line in requires(name) or ():
        needed = Requirement(line)
        if needed.name in DECLARED and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
            assert Version(DECLARED[needed.name]) >= Version(bound(needed)), f"{name} needs {line}"
