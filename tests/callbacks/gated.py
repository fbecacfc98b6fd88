"""A LoRA adapter, a training loop, a saved adapter, and the comparison with the unedited model, for GatedAdapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from kedit_train import EditCollator, EditDataset, world
from kedit_train.callbacks import GatedAdapter, TokenSmoothing, editing

TEXTS = ["The old baker found a coin near the river.", "A red fox slept.", "Where is the bridge? Answer: far away"]
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 32, "target_modules": ["down_proj", "up_proj"]}
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "gated.yaml"


def adapted(base: Any, **options: Any) -> Any:
    config = {**LORA, "layers_to_transform": [2, 3], "task_type": "CAUSAL_LM", **options}
    return get_peft_model(base, LoraConfig(**config))


def train(model: Any, tokenizer: Any, edits: Any, callbacks: Sequence[Any], steps: int, rate: float = 2e-3) -> Any:
    rows, collate = edits.encode(tokenizer), EditCollator(tokenizer)
    with editing(model, list(callbacks), tokenizer=tokenizer, log_every_n_steps=1) as edit:
        optimizer = torch.optim.Adam(edit.parameters(), lr=rate)
        for _ in range(steps):
            edit.before_step()
            model(**collate(rows)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return edit


def edited_world(folder: Path) -> tuple[Any, Any, Any, GatedAdapter, Path]:
    """The bundled model after 24 edits with OverTone: the model, its tokenizer, the edits, the callback, its folder."""
    torch.manual_seed(0)
    model, tokenizer = world.load()
    edits = EditDataset.load("world")
    model = adapted(model)
    gated = GatedAdapter("world", neighbors=8, edits=edits, path=str(folder), limit=200)
    train(model, tokenizer, edits, [gated, TokenSmoothing(epsilon=0.05, reduction="sample")], 60)
    return model.eval(), tokenizer, edits, gated, folder


def batch_of(tokenizer: Any, prompts: Sequence[str], side: str) -> dict[str, Tensor]:
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    width = max(map(len, ids))
    rows = [(row, [0] * (width - len(row))) for row in ids]
    left = side == "left"
    return {
        "input_ids": torch.tensor([pad + row if left else row + pad for row, pad in rows]),
        "attention_mask": torch.tensor([pad + [1] * len(row) if left else [1] * len(row) + pad for row, pad in rows]),
    }


@torch.no_grad()
def compare(model: Any, base: Any, gate: Any, tokenizer: Any, prompts: Sequence[str], side: str) -> tuple[int, int]:
    """Compare the gated model with the unedited model, position by position; return how many rows are closed and open.

    Whether a position is inside of a radius follows from the unedited model and the definition.
    """
    closed = opened = 0
    for start in range(0, len(prompts), 32):
        batch = batch_of(tokenizer, prompts[start : start + 32], side)
        own, before = model(**batch).logits, base(**batch, output_hidden_states=True)
        states = before.hidden_states[gate.layer].double()
        distances = torch.cdist(states, gate.keys.double(), compute_mode="donot_use_mm_for_euclid_dist")
        inside = (distances <= gate.radii.double()).any(dim=-1) & batch["attention_mask"].bool()
        for row in range(len(states)):
            real = batch["attention_mask"][row].bool()
            first = int(inside[row].nonzero()[0]) if inside[row].any() else len(real)
            before_match = real & (torch.arange(len(real)) < first)
            a, b = own[row].view(torch.int32), before.logits[row].view(torch.int32)
            assert torch.equal(a[before_match], b[before_match])
            closed += first == len(real)
            if first < len(real):
                opened += 1
                after = real & ~before_match
                assert bool((a[after] != b[after]).any(dim=-1).all())
    return closed, opened


def save(folder: Path, steps: int = 1) -> Any:
    """Train one step and save the gated adapter; return the model."""
    model, tokenizer = world.load()
    edits, model = EditDataset(world.edits(2)), adapted(model)
    train(model, tokenizer, edits, [GatedAdapter(TEXTS, edits=edits, path=str(folder))], steps)
    return model.eval()
