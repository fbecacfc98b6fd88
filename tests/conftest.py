"""Fixtures for all tests. No test uses the network."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_SILENT", "true")

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def existing(path: Path) -> Path:
    """Return the path, or skip the test if it does not exist."""
    if not path.exists():
        pytest.skip(f"benchmark data not found: {path.relative_to(ROOT.parent)} beside the project")
    return path


@pytest.fixture(autouse=True, scope="session")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put temporary folders that a test does not remove into pytest's own, which keeps those of three runs."""
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("temporary"))
    yield
    tempfile.tempdir = before


@pytest.fixture(autouse=True, scope="session")
def tokenizers_of_newer_versions() -> None:
    """Let transformers 4 load the models in ``shared``.

    transformers 5 has saved these models, with a name of the tokenizer class that transformers 4 does not have.
    """
    import transformers

    if not hasattr(transformers, "TokenizersBackend"):
        transformers.TokenizersBackend = transformers.PreTrainedTokenizerFast  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def mixed_precision_of_each_run() -> Iterator[None]:
    """Remove the mixed precision that transformers 4 stores in the environment and also uses in all later runs."""
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def shared() -> Path:
    return existing(SHARED)


@pytest.fixture
def factlm() -> Path:
    """Return the folder of a small Llama that knows CounterFact facts, with ``records.json`` in it."""
    return existing(SHARED / "models" / "factlm")


@pytest.fixture
def stories() -> Path:
    """Return the folder of a small Llama trained on stories; its tokenizer has no pad token."""
    return existing(SHARED / "models" / "stories260K")


@pytest.fixture
def ipython(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Replace IPython, which need not be installed, and return a list of the HTML that is displayed."""
    shown: list[str] = []

    class Handle:
        def update(self, html: str) -> None:
            shown.append(html)

    def display(html: str, display_id: bool = False) -> Handle:
        shown.append(html)
        return Handle()

    module = ModuleType("IPython.display")
    module.HTML, module.display = str, display  # type: ignore[attr-defined]
    package = ModuleType("IPython")
    package.display = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    yield shown
    # The module was imported with the replacement.
    sys.modules.pop("transformers.utils.notebook", None)
