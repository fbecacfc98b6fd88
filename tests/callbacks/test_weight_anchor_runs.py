"""WeightAnchor over consecutive runs: what it pulls towards, and what a checkpoint stores."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from callbacks.weight_anchor_inputs import DOWN, TEXTS, examples_of, move
from torch import nn

from kedit_train.callbacks import EditCallback, ParameterScope, WeightAnchor, editing
from kedit_train.core.drift.fisher import diagonal_fisher
from kedit_train.core.state_file import load_state, save_state
from kedit_train.errors import EditError


def pull_once(model: nn.Module, anchor: WeightAnchor) -> None:
    """Run a single step in which only the anchor moves the weights."""
    with editing(model, [anchor]) as edit:
        edit.before_step()
        optimizer = torch.optim.SGD(edit.parameters(), lr=1.0)
        # A loss without any gradient would be an error.
        sum(1e-30 * p.sum() for p in edit.parameters()).backward()
        optimizer.step()


@pytest.mark.parametrize("decoupled", [True, False])
def test_base_pulls_towards_the_first_weights_and_previous_towards_those_before_each_run(decoupled):
    for anchor, remaining in (("base", 0.5), ("previous", 1.0)):
        model = nn.Linear(3, 2)
        start = copy.deepcopy(model)
        callback = WeightAnchor(strength=0.5, decoupled=decoupled, anchor=anchor)
        pull_once(model, callback)
        for w, w0 in zip(model.parameters(), start.parameters(), strict=True):
            torch.testing.assert_close(w, w0)
        with torch.no_grad():
            for w in model.parameters():
                w.add_(1.0)
        pull_once(model, callback)
        for w, w0 in zip(model.parameters(), start.parameters(), strict=True):
            torch.testing.assert_close(w, w0 + remaining)
        other = nn.Linear(3, 2)
        start = copy.deepcopy(other)
        pull_once(other, callback)
        for w, w0 in zip(other.parameters(), start.parameters(), strict=True):
            torch.testing.assert_close(w, w0)


def test_base_keeps_the_fisher_information_of_the_first_run_and_adds_that_of_new_weights(make, words):
    model = make()
    anchor, up = WeightAnchor("ewc", strength=3.0, texts=TEXTS), DOWN.replace("down", "up")
    examples = examples_of(words)
    start, fisher = {n: p.detach().clone() for n, p in model.named_parameters()}, {}
    for modules in (["down_proj"], ["down_proj", "up_proj"]):
        with editing(model, [anchor, ParameterScope(1, modules=modules)], tokenizer=words) as edit:
            edit.before_step()
            current = diagonal_fisher(edit.run, examples, seed=0)
            fisher = current | fisher
            move(edit)
            penalty = anchor.penalty(edit.run)
        if len(modules) == 1:
            start[up] = model.get_parameter(up).detach().clone()
    assert not torch.allclose(current[DOWN], fisher[DOWN]), "the first run has changed it"
    expected = sum(float((fisher[n] * (model.get_parameter(n).detach() - start[n]) ** 2).sum()) for n in (DOWN, up))
    assert penalty.item() == pytest.approx(3.0 / 2 * expected, rel=1e-5)


def test_nothing_is_kept_of_a_run_that_failed_before_its_first_step(make, words):
    class Fails(EditCallback):
        order = 90

        def attach(self, run: Any) -> None:
            raise EditError("no")

    model = make()
    anchor, up = WeightAnchor("ewc", texts=TEXTS), DOWN.replace("down", "up")
    both = ParameterScope(1, modules=["down_proj", "up_proj"])
    examples = examples_of(words)
    for others in ([ParameterScope(1, modules="down_proj")], [both, Fails()]):
        with contextlib.suppress(EditError), editing(model, [anchor, *others], tokenizer=words) as edit:
            edit.before_step()
            assert anchor.metrics(edit.run)
    with torch.no_grad():
        model.get_parameter(up).mul_(3.0)
    with editing(model, [anchor, both], tokenizer=words) as edit:
        edit.before_step()
        expected = diagonal_fisher(edit.run, examples, seed=0)[up]
        torch.testing.assert_close(anchor._fisher[up], expected)


def test_a_weight_that_changes_its_shape_between_runs_is_refused():
    model, anchor = nn.Linear(3, 2, bias=False), WeightAnchor(strength=0.5)
    pull_once(model, anchor)
    model.weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(
        EditError,
        match=r"WeightAnchor: the parameter 'weight' has shape \(3, 3\), but had shape \(2, 3\) in an earlier run",
    ):
        pull_once(model, anchor)


def test_a_checkpoint_restores_the_anchor_weights_of_an_earlier_run(make, words, tmp_path):
    based_on_texts = [{"kind": kind, "strength": 3.0, "texts": TEXTS} for kind in ("ewc", "kfac")]
    for options in ({"strength": 0.5}, *based_on_texts):
        model, metrics = make(), []
        anchor = WeightAnchor(**options)
        with editing(model, [anchor, ParameterScope(1, modules="down_proj")], tokenizer=words) as edit:
            edit.before_step()
            # In the first run the anchor is the reference, which the checkpoint stores anyway.
            assert anchor.metrics(edit.run) == {"edit/drift/anchor": 0.0}
            assert anchor.state() == {
                "anchor_weights": {}, "fisher": {}, "factors": {"inputs": {}, "gradients": {}}
            }  # fmt: skip
            move(edit)
        for callback in (anchor, WeightAnchor(**options)):
            with editing(model, [callback, ParameterScope(1, modules="down_proj")], tokenizer=words) as edit:
                edit.before_step()
                if callback is anchor:
                    metrics.append(callback.metrics(edit.run))
                    save_state(tmp_path, callback.state())
                else:
                    assert callback.metrics(edit.run) == {"edit/drift/anchor": 0.0}
                    callback.load_state(load_state(tmp_path) or {})
                    metrics.append(callback.metrics(edit.run))
        assert metrics[0] == metrics[1]
        assert metrics[0]["edit/drift/anchor"] > 1e-3
