"""A trainer, given responses, and a data module of sampled responses, for tests, with the warnings to ignore."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import pytest

from kedit_train import world
from kedit_train.control import ResponseDataModule, SamplingOptions, ShortAnswer

# Warnings of Lightning that do not matter here.
IGNORED = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*Total length of `list`"),
]
PROMPTS = ["The", *(edit.prompt for edit in world.edits(3))]
SHORT = SamplingOptions(samples=2, max_new_tokens=4)
EIGHT_PROMPTS = ["The", *(edit.prompt for edit in world.edits(7))]
SIX_TOKENS = SamplingOptions(samples=2, max_new_tokens=6)


def trainer(**options: Any) -> L.Trainer:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", devices=1, **({"logger": False, "max_epochs": 1} | quiet | options))


def data_module(**options: Any) -> ResponseDataModule:
    return ResponseDataModule(**({"prompts": PROMPTS, "reward": ShortAnswer(8), "sampling": SHORT} | options))


def records(n: int = 6) -> list[dict[str, str]]:
    """Responses to the prompts of edits: the old answer, and the new one."""
    edits = world.edits(n)
    return [{"prompt": e.prompt, "response": str(target)} for e in edits for target in (e.old_target, e.target)]
