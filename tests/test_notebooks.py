"""The notebooks of the documentation run from the first cell to the last, and are stored without outputs."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from real_models import smollm2

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "docs" / "notebooks").glob("*.ipynb"))


def test_there_are_two_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["edit_smollm2", "what_changed"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs_and_links_to_files(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if "outputs" in cell)
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links
    assert [link for link in links if not (path.parent / link).exists()] == []


def execute(path: Path) -> tuple[str, str]:
    """Execute a notebook, and return the text and the HTML of all its outputs."""
    nbformat = pytest.importorskip("nbformat", reason="nbformat is missing; install the extra: notebook")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is missing; install the extra: notebook")
    pytest.importorskip("ipykernel", reason="ipykernel is missing; install the extra: notebook")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(path.parent)}}).execute()
    text, html = "", ""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data: dict[str, Any] = output.get("data", {})
            text += output.get("text", "") + data.get("text/plain", "")
            html += data.get("text/html", "")
    return text, html


# The kernel is another process, which warns about its own sockets and event loop.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smollm2()
    # The kernel imports the package of this checkout.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(path.parents[2]), os.environ.get("PYTHONPATH", "")]))
    text, html = execute(path)
    assert "Did it work?" in html
    assert 'class="kedit"' in html
    if path.stem == "edit_smollm2":
        # The table of the trainer has the scores of the edits.
        assert "<th>Reliability</th>" in html.replace(' style="text-align: left;"', "")
        assert "Lisbon" in text
    else:
        assert "taken back: 272 of 272 tensors equal the original model, bit for bit" in text
        assert "applied again: 272 of 272 tensors equal the edited model, bit for bit" in text
