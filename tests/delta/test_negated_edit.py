"""An edit that was trained in is taken back by its own negation."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from kedit_train import EditDelta, evaluate, world
from kedit_train.callbacks import ParameterScope
from kedit_train.evaluation import EvaluationOptions
from kedit_train.modes import TrainLoop

NAME = "model.layers.4.mlp.down_proj.weight"


def test_negating_an_edit_unlearns_it() -> None:
    model, tokenizer = world.load()
    edits, base = [replace(e, rephrases=(), portability={}, locality={}) for e in world.edits(3)], copy.deepcopy(model)
    scope = ParameterScope(layers="4", modules="mlp.down_proj")
    TrainLoop(tokenizer, callbacks=[scope], epochs=20, learning_rate=5e-3, stop_loss=0.0)(model, edits)
    options: dict[str, Any] = {"options": EvaluationOptions(max_new_tokens=8), "progress": False}

    def reliability(targets: Any) -> float:
        return evaluate(model, tokenizer, targets, **options).flat()["edit/reliability"]

    assert reliability(edits) == 1.0
    # The change from the edited model back to the base model is the negated edit.
    (1.0 * EditDelta.between(model, base)).apply(model)
    assert reliability(edits) == 0.0
    assert reliability([replace(e, target=str(e.old_target), aliases=()) for e in edits]) == 1.0
    torch.testing.assert_close(model.get_parameter(NAME), base.get_parameter(NAME), rtol=1e-5, atol=1e-7)
