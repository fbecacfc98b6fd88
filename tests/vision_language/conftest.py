"""The tiny vision-language model and the edits of these tests."""

from __future__ import annotations

from typing import Any

import pytest
from vision_models import build_model, build_processor

from kedit_train import world
from kedit_train.data import EditDataset


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor()


@pytest.fixture
def model(processor: Any) -> Any:
    return build_model(processor.tokenizer)


@pytest.fixture(scope="module")
def edits() -> EditDataset:
    return EditDataset(world.edits(n=4))
