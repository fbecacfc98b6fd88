"""The loss head does not build full logits, measured by the peak memory of a process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from head_memory import measured

sys.path.pop(0)

VOCAB, WIDTH, TOKENS = 65_536, 16, 2048
FULL = VOCAB * TOKENS * 4 / 1e6


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="peak memory is read from the resource module")
@pytest.mark.parametrize("loss", ["overtone", "jsd"])
def test_the_peak_stays_below_one_tensor_of_full_logits(loss):
    assert 0 < measured(loss, True, VOCAB, WIDTH, TOKENS) < 0.75 * FULL
