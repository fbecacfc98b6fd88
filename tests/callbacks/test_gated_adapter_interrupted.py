"""GatedAdapter: after an interruption, the gate stays on the partly trained adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from callbacks.gated import TEXTS, adapted, compare, train
from transformers import Trainer, TrainerCallback, TrainingArguments

from kedit_train import EditCollator, EditDataset, world
from kedit_train.callbacks import GatedAdapter, TokenLoss
from kedit_train.core.gate.gate import Gate, find_gate


class Stop(TokenLoss):
    """Fail after the second step."""

    def after_step(self, run: Any) -> None:
        if run.step == 2:
            raise KeyboardInterrupt


def test_an_interrupted_run_keeps_the_gate(tmp_path):
    torch.manual_seed(0)
    model, tokenizer = world.load()
    edits, model = EditDataset(world.edits(2)), adapted(model)
    gated = GatedAdapter(TEXTS, edits=edits)
    with pytest.raises(KeyboardInterrupt):
        train(model, tokenizer, edits, [gated, Stop()], 4)
    assert find_gate(model) is gated.gate is not None
    prompts = [*TEXTS, *(edit.prompt for edit in edits)]
    found = compare(model.eval(), world.load()[0].eval(), gated.gate, tokenizer, prompts, "left")
    assert found == (len(TEXTS), len(edits))
    model.save_pretrained(tmp_path)
    assert torch.equal(Gate.load(tmp_path).radii, gated.gate.radii)  # type: ignore[union-attr]


def test_the_same_trainer_resumes_an_interrupted_run(tmp_path):
    class Interrupt(TrainerCallback):
        interrupted = False

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3 and not self.interrupted:
                self.interrupted = True
                raise KeyboardInterrupt

    def build(folder: str, *more: Any) -> Any:
        torch.manual_seed(0)
        model, tokenizer = world.load()
        edits = EditDataset(world.edits(4))
        args = TrainingArguments(
            str(tmp_path / folder), max_steps=4, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
        )
        return Trainer(
            adapted(model),
            args=args,
            train_dataset=edits.encode(tokenizer),  # type: ignore[arg-type]
            data_collator=EditCollator(tokenizer),
            processing_class=tokenizer,
            callbacks=[GatedAdapter(TEXTS, edits=edits), *more],
        )

    whole, parts = build("whole"), build("parts", Interrupt())
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        parts.train()
    assert find_gate(parts.model) is not None
    parts.train(resume_from_checkpoint=True)
    gate, again = find_gate(whole.model), find_gate(parts.model)
    assert torch.equal(again.keys, gate.keys)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(a, b)
