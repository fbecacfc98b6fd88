"""Fixtures that more than one room needs. No test reaches a network."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_SILENT", "true")

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def existing(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"benchmark data not found: {path.relative_to(ROOT.parent)} beside the project")
    return path


@pytest.fixture(autouse=True, scope="session")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Folders that a test does not remove go with pytest's own, which keeps those of three runs."""
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("temporary"))
    yield
    tempfile.tempdir = before


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def shared() -> Path:
    return existing(SHARED)


@pytest.fixture
def factlm() -> Path:
    """A small Llama that knows CounterFact facts, with ``records.json`` beside it."""
    return existing(SHARED / "models" / "factlm")


@pytest.fixture
def stories() -> Path:
    """A small Llama trained by others on stories; its tokenizer has no pad token."""
    return existing(SHARED / "models" / "stories260K")
