"""Files of a release: one version, workflows that only call the Makefile, issue forms, and the citation."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version
from project_file import project_file

import kedit_train

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
# The documentation has its own target, which is not needed to test or to install the package.
OPTIONAL_TARGETS = {"docs"}
# The keys of the Citation File Format 1.2.0, and those that it requires.
CITATION_KEYS = {
    *("abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi", "identifiers", "keywords"),
    *("license", "license-url", "message", "preferred-citation", "references", "repository", "repository-artifact"),
    *("repository-code", "title", "type", "url", "version"),
}
REQUIRED_CITATION_KEYS = {"cff-version", "message", "title", "authors"}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_the_version_is_written_once() -> None:
    project = project_file()
    assert "version" not in project["project"]
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "kedit_train/version.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+|\.dev\d+)?", kedit_train.__version__)
    # Every other mention is checked against it.
    assert read(ROOT / "CITATION.cff")["version"] == kedit_train.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    heading = re.search(r"^## (\d\S*) \((\d{4}-\d\d-\d\d)\)$", changelog, re.MULTILINE)
    assert heading is not None
    assert heading.groups() == (kedit_train.__version__, str(read(ROOT / "CITATION.cff")["date-released"]))


def test_the_command_prints_the_version_without_an_installation(tmp_path: Path) -> None:
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from kedit_train.cli.kedit import main; main()"
    command = [sys.executable, "-c", program, "--version"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ended.stdout == f"kedit-train {kedit_train.__version__}\n"


def test_an_installation_has_the_same_version() -> None:
    try:
        installed = version("kedit-train")
    except PackageNotFoundError:
        pytest.skip("kedit-train is not installed")
    assert installed == kedit_train.__version__, "run make again: the installed metadata is of another version"


def test_there_is_a_workflow_for_each_job() -> None:
    assert [path.stem for path in WORKFLOWS] == ["build", "docs", "lint", "test"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_only_calls_the_makefile(path: Path) -> None:
    workflow = read(path)
    # YAML 1.1 reads the key `on` as true.
    assert {"name", True, "jobs", "permissions"} <= workflow.keys()
    called = set()
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 60
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            if "run" in step:
                made = re.fullmatch(r"make ([a-z-]+)( [A-Z]+=\S+)?", step["run"])
                assert made, f"{step['run']!r} is not a make target"
                called.add(made[1])
            else:
                assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])
    assert called == {path.stem}
    assert called - OPTIONAL_TARGETS <= make_targets()


def test_the_tested_python_versions_are_those_of_the_package() -> None:
    # The workflow installs the versions of constraints.txt. Some of these need a newer Python than kedit-train needs.
    tested = read(ROOT / ".github" / "workflows" / "test.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    ends = runpy.run_path(str(ROOT / ".ci" / "versions.py"))["PYTHON"]
    assert project_file()["project"]["requires-python"] == f">={ends['oldest'].removeprefix('python')}"
    assert ends["newest"] == f"python{tested[-1]}"
    assert Version(ends["oldest"].removeprefix("python")) <= Version(tested[0])


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_is_complete(path: Path) -> None:
    form = read(path)
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert fields
    assert all(field["type"] in ("input", "textarea", "dropdown", "checkboxes") for field in fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert all(field["attributes"].get("options") for field in fields if field["type"] == "dropdown")
    assert len({field["id"] for field in fields}) == len(fields)


def test_there_are_forms_for_bugs_features_and_questions() -> None:
    assert [path.stem for path in FORMS] == ["bug", "feature", "question"]
    assert (ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md").is_file()


def test_the_citation_follows_the_format() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert REQUIRED_CITATION_KEYS <= citation.keys() <= CITATION_KEYS
    assert all({"name"} <= author.keys() or {"family-names"} <= author.keys() for author in citation["authors"])
    assert citation["type"] == "software"
    project = project_file()["project"]
    assert citation["license"] == project["license"]
    assert citation["title"] == project["name"]
