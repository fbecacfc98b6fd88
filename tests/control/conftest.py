"""Fixtures of these tests: a value function, and a check that no response is sampled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from control.small_models import HIDDEN

from kedit_train.control import ValueModel


@pytest.fixture
def value() -> ValueModel:
    torch.manual_seed(2)
    return ValueModel(["head", "1"], hidden_size=HIDDEN, width=8)


@pytest.fixture
def no_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the responses were sampled before the check")

    monkeypatch.setattr("kedit_train.control.response_data.sample_responses", fail)
