"""With torch, transformers and lightning alone the callbacks import and edit a model in a plain loop."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys

BLOCKED = {"trl", "wandb", "datasets", "peft", "rich", "matplotlib", "jsonargparse", "typer"}


class Missing:
    # Finds what is installed but for the blocked packages, whose metadata are gone as well.

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
callbacks = [ParameterScope(1, "mlp"), TokenSmoothing(), KLLocality(["a b c", "d e"])]
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


def test_imports_and_edits_without_the_other_packages():
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout == "edited\n"
