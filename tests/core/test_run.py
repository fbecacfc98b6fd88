"""EditRun: callbacks join it, constraints hold, and the model is an ordinary one afterwards."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from kedit_train.callbacks import EditCallback, KLLocality, ParameterScope, TokenLoss, TokenSmoothing, editing
from kedit_train.core import EditRun, Host
from kedit_train.core.reference_weights import snapshot, temporary_values
from kedit_train.data import Edit
from kedit_train.errors import EditError

IDS = torch.tensor([[5, 7, 11, 13, 17, 3], [2, 4, 8, 16, 32, 60]])


def state(model: nn.Module) -> tuple[Any, ...]:
    """Return everything that an edit might leave on a model, except the weights."""
    hooks = [(n, list(m._forward_hooks), list(m._forward_pre_hooks), m.training) for n, m in model.named_modules()]
    grads = [(n, p.requires_grad) for n, p in model.named_parameters()]
    return hooks, grads, [sorted(m.__dict__) for m in model.modules()]


def step(edit: Any, model: Any, optimizer: Any) -> None:
    edit.before_step()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("steps", [0, 2])
def test_nothing_is_left_on_the_model(tiny, family, steps):
    model = tiny(family)
    next(model.parameters()).requires_grad_(False)
    before = state(model)
    with editing(model, [TokenSmoothing(), ParameterScope(1, modules="mlp")]) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=0.1)
        for _ in range(steps):
            step(edit, model, optimizer)
        assert state(model) != before
    assert state(model) == before


def test_nothing_is_left_after_a_failure_in_the_loop(tiny):
    model = tiny("llama")
    before = state(model)
    edit = editing(model, [ParameterScope(1), TokenSmoothing()])
    handle = edit.__enter__()
    handle.before_step()
    assert state(model) != before
    assert not edit.__exit__(MemoryError, MemoryError(), None)
    assert state(model) == before


@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [ParameterScope(1), ParameterScope(0)],
        lambda: [ParameterScope("nonsense")],
        lambda: [TokenSmoothing(), ParameterScope(modules="nothing")],
        lambda: [ParameterScope(1), KLLocality([" "])],
    ],
)
def test_nothing_is_left_if_a_callback_cannot_be_prepared(tiny, callbacks):
    model = tiny("llama")
    before = state(model)
    with pytest.raises(EditError), editing(model, callbacks()):
        pass
    assert state(model) == before


def test_an_empty_list_of_callbacks_is_an_error(tiny):
    with pytest.raises(EditError) as error, editing(tiny("llama"), []):
        pass
    assert str(error.value) == "editing: callbacks must not be empty; pass at least one callback."


def saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("take", [copy.deepcopy, saved_and_loaded, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_model_during_an_edit_is_an_ordinary_model(tiny, take):
    model = tiny("llama")
    expected = model(input_ids=IDS, labels=IDS)
    with editing(model, [ParameterScope(1), TokenLoss("uniform", label_weight=0.5, epsilon=0.05)]) as edit:
        edit.before_step()
        ours = model(input_ids=IDS, labels=IDS).loss
        other = take(model)
        copied = other(input_ids=IDS, labels=IDS)
        assert torch.equal(copied.loss, expected.loss)
        assert torch.equal(copied.logits, expected.logits)
        assert not torch.equal(ours, expected.loss)
        assert getattr(other, "_kedit_run", None) is None
        with editing(other, [TokenLoss("uniform", label_weight=0.5, epsilon=0.05)]) as second:
            second.before_step()
            torch.testing.assert_close(other(input_ids=IDS, labels=IDS).loss, ours)
        torch.testing.assert_close(model(input_ids=IDS, labels=IDS).loss, ours)
        ours.backward()
    assert torch.equal(model(input_ids=IDS, labels=IDS).loss, expected.loss)


def test_another_loop_takes_over_the_model_of_a_loop_that_never_began(tiny):
    model = tiny("llama")
    before = state(model)
    first, second = Host(object()), Host(object())
    scope, smoothing = ParameterScope(1), TokenSmoothing()
    one = EditRun.join(model, scope, first)
    EditRun.join(model, smoothing, first)
    smoothing.run = one
    two = EditRun.join(model, ParameterScope(0), second)
    assert one.closed
    assert not two.closed
    # The second run does not inherit the parameters that the first one froze.
    assert {name.split(".")[2] for name in two.scope} == {"0"}
    assert not any(m._forward_hooks for m in model.modules())
    one.finish(scope)
    assert not two.closed, "the end of the first loop must not end the second run"
    two.close()
    assert state(model) == before


def test_the_same_callbacks_serve_a_second_run(tiny):
    callbacks = [ParameterScope(-1), TokenSmoothing()]
    for family in ("llama", "gpt2", "llama"):
        model = tiny(family)
        with editing(model, callbacks) as edit:
            optimizer = torch.optim.SGD(edit.parameters(), lr=0.1)
            step(edit, model, optimizer)
            assert edit.run.step == 1


def test_optimizers_of_other_models_are_ignored(tiny):
    model, other = tiny("llama"), nn.Linear(2, 2)
    foreign = torch.optim.SGD(other.parameters(), lr=0.1)
    with editing(model, [ParameterScope(1), TokenSmoothing()]) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=0.1)
        edit.before_step()
        other(torch.ones(1, 2)).sum().backward()
        foreign.step()
        assert edit.run.step == 0
        assert other.weight.grad is not None
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        assert edit.run.step == 1


class SetWeights(EditCallback):
    """Sets the weights to the reference plus one if its order is 1, and doubles the weights if its order is 2."""

    constrains = True

    def __init__(self, order: int) -> None:
        self.order = order

    def constrain(self, weights, reference):
        if self.order == 1:
            return {name: reference[name] + 1.0 for name in weights}
        return {name: weight * 2.0 for name, weight in weights.items()}


@pytest.mark.parametrize("scope", [[], [ParameterScope(1, modules="down_proj")]], ids=["everything", "scope"])
def test_constraints_are_applied_in_their_order_not_in_that_of_the_list(tiny, scope):
    model = tiny("llama")
    start = snapshot(dict(model.named_parameters()))
    with editing(model, [SetWeights(2), *scope, SetWeights(1)]) as edit:
        optimizer = torch.optim.AdamW(edit.parameters(), lr=0.1)
        for _ in range(2):
            step(edit, model, optimizer)
            for name, parameter in model.named_parameters():
                constrained = not scope or name == "model.layers.1.mlp.down_proj.weight"
                assert torch.equal(parameter, (start[name] + 1.0) * 2.0 if constrained else start[name])


def test_reference_model_gives_the_model_before_the_edit_and_restores_the_edited_one_bit_for_bit(tiny):
    model = tiny("llama")
    with torch.no_grad():
        before = model(input_ids=IDS).logits
    with editing(model, [ParameterScope(1)]) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=1.0)
        step(edit, model, optimizer)
        with torch.no_grad():
            after = model(input_ids=IDS).logits
            with edit.run.reference_model():
                assert torch.equal(model(input_ids=IDS).logits, before)
            assert torch.equal(model(input_ids=IDS).logits, after)
            assert not torch.equal(after, before)


def test_without_a_scope_there_is_no_reference_model_after_a_step(tiny):
    model = tiny("llama")
    with editing(model, [TokenSmoothing()]) as edit:
        step(edit, model, torch.optim.SGD(edit.parameters(), lr=1.0))
        with pytest.raises(
            EditError, match=r"^the weights from before the edit are needed, .*; add ParameterScope, which keeps a copy"
        ):
            edit.run.reference_model().__enter__()


def test_temporary_values_are_restored_after_a_failure():
    linear = nn.Linear(3, 3)
    named = dict(linear.named_parameters())
    own = snapshot(named)
    context = temporary_values(named, {"weight": torch.full((3, 3), 1 / 3)})
    context.__enter__()
    assert (linear.weight == 1 / 3).all()
    assert not context.__exit__(RuntimeError, RuntimeError(), None)
    assert all(torch.equal(named[name], value) for name, value in own.items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "no tokenizer found; pass tokenizer= (a tokenizer, a name or a path)."),
        ("/no/such/folder", "no tokenizer found at '/no/such/folder' ("),
    ],
)
def test_a_missing_tokenizer_is_an_error(tiny, name, message):
    run = EditRun(tiny("llama"), Host(object()))
    with pytest.raises(EditError) as error:
        run.tokenizer(name)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    run.close()


def test_the_edits_of_a_run_come_from_a_callback_or_the_host(tiny):
    """A callback has precedence; an attribute of the host that does not hold edits is ignored."""
    from_host, from_callback = [Edit("w1", "w2")], [Edit("w3", "w4")]
    with editing(tiny("llama"), [ParameterScope(1)]) as edit:
        assert list(edit.run.edits) == []
    with editing(tiny("llama"), [ParameterScope(1)], edits=from_host) as edit:
        assert list(edit.run.edits) == from_host
        edit.run.edits = from_callback
        assert list(edit.run.edits) == from_callback
    for other in (object(), ["added an edge"], "edits.jsonl", []):
        with editing(tiny("llama"), [ParameterScope(1)], edits=other) as edit:
            assert list(edit.run.edits) == []


def test_a_tokenizer_may_have_an_attribute_tokenizer_but_a_processor_contains_its_tokenizer(tiny):
    run = EditRun(tiny("llama"), Host(object()))

    class Tokenizer:
        # As in the tokenizers of mistral-common, whose inner object cannot be called.
        tokenizer = object()

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1]}

    given, processor = Tokenizer(), Tokenizer()
    processor.tokenizer = given
    assert run.tokenizer(given) is given
    assert run.tokenizer(processor) is given
    run.close()
