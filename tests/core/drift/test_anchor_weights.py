"""Which weights a change is measured from over consecutive runs, and what a checkpoint stores of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kedit_train.core.drift.anchor_weights import AnchorWeights
from kedit_train.errors import EditError


def run_on(model: nn.Module) -> Any:
    scope = dict(model.named_parameters())
    return SimpleNamespace(model=model, scope=scope, reference={n: p.detach().clone() for n, p in scope.items()})


def complete_run(anchors: AnchorWeights, model: nn.Module) -> dict[str, Tensor]:
    """Store the anchors of one run, move the weights, and return the weights before the move."""
    run = run_on(model)
    anchors.start_run(run)
    anchors.register(run.scope, run.reference)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    anchors.end_run()
    return run.reference


def test_base_keeps_the_weights_before_the_first_run():
    model, anchors = nn.Linear(3, 2), AnchorWeights("base")
    first = complete_run(anchors, model)
    run = run_on(model)
    assert anchors.start_run(run) == ["bias", "weight"]
    anchors.register(run.scope, run.reference)
    assert torch.equal(anchors["weight"], first["weight"])


def test_previous_stores_the_weights_before_each_run():
    model, anchors = nn.Linear(3, 2), AnchorWeights("previous")
    complete_run(anchors, model)
    assert anchors.names() == set()
    run = run_on(model)
    assert anchors.start_run(run) == []
    anchors.register(run.scope, run.reference)
    assert torch.equal(anchors["weight"], run.reference["weight"])


def test_another_model_starts_with_an_empty_store():
    anchors = AnchorWeights("base")
    complete_run(anchors, nn.Linear(3, 2))
    assert anchors.start_run(run_on(nn.Linear(3, 2))) == []


def test_anchors_move_with_the_model_between_runs():
    model, anchors = nn.Linear(3, 2), AnchorWeights("base")
    complete_run(anchors, model)
    moved = run_on(model)
    moved.scope = dict(nn.Linear(3, 2).to("meta").named_parameters())
    assert set(anchors.start_run(moved)) == {"weight", "bias"}
    assert {anchors[name].device.type for name in anchors.names()} == {"meta"}


def test_a_weight_that_changed_its_shape_is_refused():
    model, anchors = nn.Linear(3, 2, bias=False), AnchorWeights("base")
    complete_run(anchors, model)
    model.weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(
        EditError, match=r"the parameter 'weight' has shape \(3, 3\), but had shape \(2, 3\) in an earlier run"
    ):
        anchors.start_run(run_on(model))


def test_a_checkpoint_stores_only_the_anchors_of_earlier_runs():
    model, anchors = nn.Linear(3, 2), AnchorWeights("base")
    run = run_on(model)
    anchors.start_run(run)
    anchors.register(run.scope, run.reference)
    assert anchors.state() == {}, "those of the current run are in the checkpoint's reference"
    anchors.end_run()
    run = run_on(model)
    anchors.start_run(run)
    anchors.register(run.scope, run.reference)
    state = anchors.state()
    assert state.keys() == {"weight", "bias"}
    resumed = AnchorWeights("base")
    resumed.start_run(run)
    resumed.load_state(state)
    assert torch.equal(resumed["weight"], anchors["weight"])
