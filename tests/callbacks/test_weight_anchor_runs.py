"""WeightAnchor over runs that follow one another: what it pulls towards, and what a checkpoint takes along."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from callbacks.test_weight_anchor import DOWN, TEXTS, shake
from torch import nn

from kedit_train.callbacks import EditCallback, ParameterScope, WeightAnchor, editing
from kedit_train.core.drift.fisher import diagonal_fisher
from kedit_train.core.state_file import load_state, save_state
from kedit_train.data.tokenization import Encoded
from kedit_train.errors import EditError


def pulled_home(model: nn.Module, anchor: WeightAnchor) -> None:
    """A run whose one step is the pull alone."""
    with editing(model, [anchor]) as edit:
        edit.before_step()
        optimizer = torch.optim.SGD(edit.parameters(), lr=1.0)
        sum(0.0 * p.sum() for p in edit.parameters()).backward()
        optimizer.step()


@pytest.mark.parametrize("decoupled", [True, False])
def test_base_pulls_over_several_runs_towards_the_first_weights_and_previous_towards_each_runs_own(decoupled):
    for anchor, left in (("base", 0.5), ("previous", 1.0)):
        model = nn.Linear(3, 2)
        start = copy.deepcopy(model)
        pull = WeightAnchor(strength=0.5, decoupled=decoupled, anchor=anchor)
        pulled_home(model, pull)
        for w, w0 in zip(model.parameters(), start.parameters(), strict=True):
            torch.testing.assert_close(w, w0)
        with torch.no_grad():
            for w in model.parameters():
                w.add_(1.0)
        pulled_home(model, pull)
        for w, w0 in zip(model.parameters(), start.parameters(), strict=True):
            torch.testing.assert_close(w, w0 + left)
        other = nn.Linear(3, 2)
        start = copy.deepcopy(other)
        pulled_home(other, pull)
        for w, w0 in zip(other.parameters(), start.parameters(), strict=True):
            torch.testing.assert_close(w, w0)


def test_base_weighs_by_what_mattered_before_the_first_run_and_follows_the_scope(make, words):
    model = make()
    anchor, up = WeightAnchor("ewc", strength=3.0, texts=TEXTS), DOWN.replace("down", "up")
    rows = [Encoded(words(text)["input_ids"], 1) for text in TEXTS]
    start, fisher = {n: p.detach().clone() for n, p in model.named_parameters()}, {}
    for modules in (["down_proj"], ["down_proj", "up_proj"]):
        with editing(model, [anchor, ParameterScope(1, modules)], tokenizer=words) as edit:
            edit.before_step()
            taken = diagonal_fisher(edit.run, rows, seed=0)
            fisher = taken | fisher
            shake(edit)
            penalty = anchor.penalty(edit.run)
        if len(modules) == 1:
            start[up] = model.get_parameter(up).detach().clone()
    assert not torch.allclose(taken[DOWN], fisher[DOWN]), "the run before has changed what matters"
    want = sum(float((fisher[n] * (model.get_parameter(n).detach() - start[n]) ** 2).sum()) for n in (DOWN, up))
    assert penalty.item() == pytest.approx(3.0 / 2 * want, rel=1e-5)


def test_what_a_run_that_failed_before_its_first_step_took_is_not_kept(make, words):
    class Fails(EditCallback):
        order = 90

        def attach(self, run: Any) -> None:
            raise EditError("no")

    model = make()
    anchor, up = WeightAnchor("ewc", texts=TEXTS), DOWN.replace("down", "up")
    both = ParameterScope(1, ["down_proj", "up_proj"])
    rows = [Encoded(words(text)["input_ids"], 1) for text in TEXTS]
    for others in ([ParameterScope(1, "down_proj")], [both, Fails()]):
        with contextlib.suppress(EditError), editing(model, [anchor, *others], tokenizer=words) as edit:
            edit.before_step()
            assert anchor.metrics(edit.run)
    with torch.no_grad():
        model.get_parameter(up).mul_(3.0)
    with editing(model, [anchor, both], tokenizer=words) as edit:
        edit.before_step()
        want = diagonal_fisher(edit.run, rows, seed=0)[up]
        torch.testing.assert_close(anchor._fisher[up], want)


def test_a_tensor_that_changes_its_shape_between_runs_is_refused():
    model, anchor = nn.Linear(3, 2, bias=False), WeightAnchor(strength=0.5)
    pulled_home(model, anchor)
    model.weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(EditError, match="WeightAnchor: weight has another shape than when this callback first met"):
        pulled_home(model, anchor)


def test_a_checkpoint_takes_the_weights_before_an_earlier_run_along(make, words, tmp_path):
    for options in ({"strength": 0.5}, {"kind": "ewc", "strength": 3.0, "texts": TEXTS}):
        model, found = make(), []
        anchor = WeightAnchor(**options)
        with editing(model, [anchor, ParameterScope(1, "down_proj")], tokenizer=words) as edit:
            edit.before_step()
            # Of a first run nothing needs to be kept: the reference is in the checkpoint.
            assert anchor.metrics(edit.run) == {"edit/drift/anchor": 0.0}
            assert anchor.state() == {"centres": {}, "fisher": {}}
            shake(edit)
        for own in (anchor, WeightAnchor(**options)):
            with editing(model, [own, ParameterScope(1, "down_proj")], tokenizer=words) as edit:
                edit.before_step()
                if own is anchor:
                    found.append(own.metrics(edit.run))
                    save_state(tmp_path, own.state())
                else:
                    assert own.metrics(edit.run) == {"edit/drift/anchor": 0.0}
                    own.load_state(load_state(tmp_path) or {})
                    found.append(own.metrics(edit.run))
        assert found[0] == found[1]
        assert found[0]["edit/drift/anchor"] > 1e-3
