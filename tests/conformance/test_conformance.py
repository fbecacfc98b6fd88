"""Every callback in every host: it trains, can be used twice, and leaves no trace on the model."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from conformance.hosts import HOSTS
from conformance.settings import ALL, SETTINGS, in_scope, load, public_callbacks

from kedit_train import world
from kedit_train.callbacks import GatedAdapter, ParameterScope
from kedit_train.data import EditDataset

BOTH = [(callback, host) for callback in ALL for host in HOSTS]


@pytest.fixture
def edits() -> EditDataset:
    return EditDataset(world.edits(n=8))


def traces(model: Any) -> dict[str, Any]:
    """Return everything that a callback could leave behind on a model, except the weights."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "hooks": {(name, kind): len(getattr(m, kind)) for name, m in model.named_modules() for kind in hooks},
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "dtypes": {name: p.dtype for name, p in model.named_parameters()},
        "attributes": {name: sorted(k for k in m.__dict__ if "kedit" in k) for name, m in model.named_modules()},
        "forward": {name: m.__dict__.get("forward") is None for name, m in model.base_model.named_modules()},
        "optimizer hooks": (
            len(sys.modules["torch.optim.optimizer"]._global_optimizer_pre_hooks),
            len(sys.modules["torch.optim.optimizer"]._global_optimizer_post_hooks),
        ),
    }


def stock_traces(host: str, edits: EditDataset, trainers: int = 1, callback: str = "") -> dict[str, Any]:
    """Return what the host itself leaves behind. SFTTrainer hooks the embeddings for activation checkpointing."""
    model, tokenizer = load(callback)
    for _ in range(trainers if host == "SFTTrainer" else 0):
        HOSTS[host](model, tokenizer, edits, [], 1)
    return traces(model)


def test_every_public_callback_has_a_setting() -> None:
    assert {name.split()[0] for name in ALL} == public_callbacks()


@pytest.mark.parametrize(("callback", "host"), BOTH)
def test_a_callback_trains_and_leaves_no_trace(callback: str, host: str, edits: EditDataset) -> None:
    expected_traces = stock_traces(host, edits, callback=callback)
    model, tokenizer = load(callback)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    callbacks = ALL[callback](edits)
    scoped = any(isinstance(one, ParameterScope) for one in callbacks)
    HOSTS[host](model, tokenizer, edits, callbacks, 2)
    for one in callbacks:
        if isinstance(one, GatedAdapter):
            # The gate is the result of this callback. It stays on the model until the user removes it.
            assert traces(model) != expected_traces
            one.gate.remove()
    assert traces(model) == expected_traces
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, weights[name])}
    assert moved == (in_scope(weights) if scoped else set(weights))


@pytest.mark.parametrize("host", [pytest.param(h, marks=pytest.mark.slow) if h != "SFTTrainer" else h for h in HOSTS])
def test_instances_serve_two_models_in_any_order(host: str, edits: EditDataset) -> None:
    # StopWhenEdited ends training. ActiveSet conflicts with BatchAnchor, TokenLoss and ContextTeacher with
    # TokenSmoothing, and PolyakStep and SubjectValues with SecondOrderLocality.
    alone = {"StopWhenEdited", "ActiveSet", "TokenLoss", "ContextTeacher", "PolyakStep", "SubjectValues"}
    made = [item for make in SETTINGS.values() for item in make(edits) if type(item).__name__ not in alone]
    callbacks = list({type(item): item for item in made}.values())
    finals = []
    for order in (callbacks, callbacks[::-1]):
        model, tokenizer = world.load()
        torch.manual_seed(0)
        HOSTS[host](model, tokenizer, edits, list(order), 3)
        finals.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])
    assert not all(torch.equal(finals[0][name], p) for name, p in world.load()[0].named_parameters())


@pytest.mark.parametrize("host", HOSTS)
def test_a_run_after_a_failed_one_works(host: str, edits: EditDataset) -> None:
    class Breaks(ParameterScope):
        def after_step(self, run: Any) -> None:
            raise KeyError("broken on purpose")

    model, tokenizer = world.load()
    with pytest.raises(KeyError, match="broken on purpose"):
        HOSTS[host](model, tokenizer, edits, [Breaks(layers=1)], 2)
    # The failed run has changed these weights, so without this line the next one would be refused.
    model.load_state_dict(world.load()[0].state_dict())
    HOSTS[host](model, tokenizer, edits, [ParameterScope(layers=2)], 2)
    assert traces(model) == stock_traces(host, edits, trainers=2)
