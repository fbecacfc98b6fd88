"""GatedAdapter: checkpoints of the hosts keep the gate, and trainers that generate completions train through it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.hosts import HOSTS
from conformance.on_policy import TRAINERS, edits, student, trainer
from conformance.settings import TEXTS, load
from conformance.test_conformance import traces
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from kedit_train import load_model, world
from kedit_train.callbacks import GatedAdapter
from kedit_train.core.gate.gate import Gate, find_gate
from kedit_train.data import EditDataset
from kedit_train.errors import EditError


class Stop(TrainerCallback):
    """Stop after two steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 2


@pytest.mark.parametrize("host", ["Trainer", pytest.param("SFTTrainer", marks=pytest.mark.slow)])
def test_checkpoints_contain_the_gate_and_a_resumed_run_has_the_same_gate(host: str, tmp_path: Path) -> None:
    """Without ParameterScope, and with other texts in the resumed run."""
    data, folder = EditDataset(world.edits(n=8)), str(tmp_path / "parts")
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}

    def train(texts: list[str], *more: Any, **extra: Any) -> tuple[Any, Any, Any]:
        torch.manual_seed(0)
        model, tokenizer = load("GatedAdapter")
        gated = GatedAdapter(texts, edits=data, batch_size=2)
        return model, HOSTS[host](model, tokenizer, data, [gated, *more], 4, **options, **extra), gated.gate

    whole, used, gate = train(TEXTS, output_dir=str(tmp_path / "whole"))
    train(TEXTS, Stop(), output_dir=folder)
    resumed, _, again = train(["A red fox slept."], output_dir=folder, resume=True)
    assert torch.equal(again.keys, gate.keys)
    assert torch.equal(again.radii, gate.radii)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    used.save_model(str(tmp_path / "saved"))
    tokens = world.load()[1]([edit.prompt for edit in data], return_tensors="pt", padding=True)
    for place in (tmp_path / "saved", tmp_path / "whole" / "checkpoint-4"):
        assert torch.equal(Gate.load(place).radii, gate.radii)
        with torch.no_grad():
            assert torch.equal(load_model(str(place))[0](**tokens).logits, whole.eval()(**tokens).logits)


@pytest.mark.parametrize("kind", ["SDFT", *(pytest.param(one, marks=pytest.mark.slow) for one in TRAINERS[1:])])
def test_trainers_that_generate_completions_train_through_the_gate(kind: str) -> None:
    config = LoraConfig(target_modules=["down_proj"], layers_to_transform=[3], task_type="CAUSAL_LM")
    model, tokenizer = student()
    trainer(kind, get_peft_model(model, config), tokenizer, [], 2).train()
    expected = traces(model)
    torch.manual_seed(0)
    base, tokenizer = student()
    model = get_peft_model(copy.deepcopy(base), config)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    gated = GatedAdapter(TEXTS, edits=edits(), batch_size=2)
    if kind == "RLOO":
        # This trainer adds a second adapter with the name "ref".
        with pytest.raises(EditError, match=r"^GatedAdapter: a gate needs exactly one adapter, got 2 \(default, ref\)"):
            trainer(kind, model, tokenizer, [gated], 2)
        return
    trainer(kind, model, tokenizer, [gated], 2).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, weights[name])}
    assert moved == {name for name in weights if "lora_" in name}
    assert find_gate(model) is gated.gate
    with torch.no_grad():
        other = tokenizer("A red fox slept.", return_tensors="pt")
        assert torch.equal(model.eval()(**other).logits, base.eval()(**other).logits)
    gated.gate.remove()  # type: ignore[union-attr]
    assert traces(model.get_base_model()) == expected
