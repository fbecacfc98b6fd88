"""Callbacks edit a model without optional packages. Whatever needs such a package says what to install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = """
import sys

BLOCKED = {"trl", "wandb", "datasets", "peft", "matplotlib", "jsonargparse", "typer", "lightning", "torchmetrics"}


class Missing:
    # Finds every installed package except the blocked ones, and no metadata of those.

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in BLOCKED else self.finder.find_spec(name, path, target)

    def find_distributions(self, *args, **kwargs):
        found = getattr(self.finder, "find_distributions", lambda *a, **k: [])(*args, **kwargs)
        return (d for d in found if d.metadata["Name"] not in BLOCKED)

    def invalidate_caches(self):
        pass


sys.meta_path[:] = [Missing(finder) for finder in sys.meta_path]
for name in BLOCKED:
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} is not blocked")
"""
EDIT = """
import kedit_train.functional, kedit_train.core
from kedit_train.callbacks import KLLocality, ParameterScope, TokenSmoothing, editing

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *"abcdefghij"])}, unk_token="?"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
model = LlamaForCausalLM(config)
ids = torch.tensor([[1, 2, 3, 4]])
before = {name: p.detach().clone() for name, p in model.named_parameters()}
callbacks = [ParameterScope(1, modules="mlp"), TokenSmoothing(), KLLocality(["a b c", "d e"])]
with editing(model, callbacks, tokenizer=tokenizer, log_every_n_steps=1) as edit:
    optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-2)
    for _ in range(2):
        edit.before_step()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
moved = sorted(name for name, p in model.named_parameters() if not torch.equal(p, before[name]))
assert moved == [f"model.layers.1.mlp.{x}_proj.weight" for x in ("down", "gate", "up")], moved
assert edit.history[1]["edit/locality/kl"] > 0, edit.history
assert not BLOCKED & set(sys.modules), BLOCKED & set(sys.modules)
print("edited")
"""

ERRORS = """
from pathlib import Path

from kedit_train import EditDataset, EditError, world


def trainer():
    from kedit_train import EditSFTTrainer


def recipe():
    from kedit_train.trainers import EditSFTConfig


def rows():
    EditDataset.load("world", limit=1).to_prompt_completion()


def table():
    from kedit_train.evaluation.reporting.wandb_tables import log_position_curves

    log_position_curves(None, [])


def picture():
    from kedit_train.evaluation.reporting.plots import new_figure

    new_figure(1, 1)


def adapter():
    from kedit_train.pretrained import lora_config

    lora_config({})


for call in (trainer, recipe, rows, table, picture, adapter):
    try:
        call()
    except EditError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """Run both programs in one process, and return its output."""
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT + EDIT + ERRORS],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def test_the_callbacks_edit_a_model_without_the_optional_packages(lines: list[str]):
    assert lines[0] == "edited"


def test_a_missing_package_is_one_line_that_says_what_to_install(lines: list[str]):
    assert lines[1:] == [
        "trl is not installed; install it with pip install 'kedit-train[trl]'",
        "trl is not installed; install it with pip install 'kedit-train[trl]'",
        "datasets is not installed; install it with pip install 'kedit-train[trl]'",
        "wandb is not installed; install it with pip install 'kedit-train[wandb]'",
        "matplotlib is not installed; install it with pip install 'kedit-train[report]'",
        "peft is not installed; install it with pip install peft",
    ]
