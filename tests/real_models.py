"""The pretrained model that ``make smollm2`` creates, for tests that need a real language model."""

from __future__ import annotations

from pathlib import Path

import pytest

SMOLLM2 = Path(__file__).resolve().parents[1] / ".models" / "smollm2"


def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, or skip the test if the model is not there."""
    if not (SMOLLM2 / "model.safetensors").exists():
        pytest.skip("the model SmolLM2 was not found; create it with: make smollm2")
    return SMOLLM2
