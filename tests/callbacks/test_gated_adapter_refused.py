"""GatedAdapter: what would break its promise is an error of one line."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from callbacks.gated import TEXTS, adapted, train

from kedit_train import EditDataset, world
from kedit_train.callbacks import (
    GatedAdapter,
    ParameterScope,
    PrefixCache,
    SaveDelta,
    TokenLoss,
    editing,
)
from kedit_train.core.gate.gate import find_gate
from kedit_train.data import Edit
from kedit_train.errors import EditError


def test_a_run_that_fails_before_its_first_step_leaves_no_gate_and_a_second_edit_is_refused():
    class Stop(TokenLoss):
        def attach(self, run: Any) -> None:
            raise KeyError("broken on purpose")

    model, tokenizer = world.load()
    edits = EditDataset(world.edits(2))
    model = adapted(model)
    with pytest.raises(KeyError):
        train(model, tokenizer, edits, [GatedAdapter(TEXTS, edits=edits), Stop()], 1)
    assert find_gate(model) is None
    model = adapted(world.load()[0])
    train(model, tokenizer, edits, [GatedAdapter(TEXTS, edits=edits)], 1)
    for callback in (GatedAdapter(TEXTS, edits=edits), TokenLoss()):
        message = f"^{type(callback).__name__}: the model already has an adapter with a gate \\(GatedAdapter\\)"
        with pytest.raises(EditError, match=message):
            train(model, tokenizer, edits, [callback], 1)
    find_gate(model).remove()  # type: ignore[union-attr]
    with pytest.raises(
        EditError,
        match=r"^GatedAdapter: lora_B.* is not zero, so the adapter already changes the model.*leave out init_lora",
    ):
        train(model, tokenizer, edits, [GatedAdapter(TEXTS, edits=edits)], 1)


def test_a_radius_of_zero_is_refused_and_a_small_one_gets_a_warning():
    model, tokenizer = world.load()
    edits = EditDataset(world.edits(4))
    # At the input of block 0, the state of a token does not depend on the tokens before it.
    texts = [f"The{edit.prompt[edit.prompt.rindex(' ') :]} and" for edit in edits]
    callback = GatedAdapter(texts, edits=edits, layer=0)
    with pytest.raises(
        EditError, match=r"^GatedAdapter: 4 of 4 edited prompts have the same hidden state as a text on which"
    ):
        train(adapted(model), tokenizer, edits, [callback], 1)
    model, callback = adapted(world.load()[0]), GatedAdapter(TEXTS, edits=edits, margin=1e-4)
    with pytest.warns(UserWarning, match=r"^GatedAdapter: \d of 4 keys .* are close to a hidden state of a text"):
        train(model, tokenizer, edits, [callback], 1)


@pytest.mark.parametrize("count", [4, 40])
def test_examples_that_do_not_open_the_gate_get_one_warning(count):
    tokenizer, edits = world.load()[1], EditDataset(world.edits(4))
    model = adapted(world.load()[0])
    others = EditDataset(world.edits(count + 8, seed=9)[8:])
    known = {edit.prompt for edit in edits}
    others = EditDataset([edit for edit in others if edit.prompt not in known])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gated = GatedAdapter(TEXTS, edits=edits, margin=0.01)
        train(model, tokenizer, EditDataset([*others, *edits[:1]]), [gated], 2)
    rows = (len(others) + 1) * (1 if len(others) >= 31 else 2)
    closed = rows * len(others) // (len(others) + 1)
    expected = f"GatedAdapter: {closed} of {rows} training examples do not open the gate, so the adapter does not learn"
    messages = [str(one.message) for one in caught if "do not open the gate" in str(one.message)]
    assert len(messages) == 1
    assert messages[0].startswith(expected)


@pytest.mark.parametrize(
    ("build", "callbacks", "message"),
    [
        (lambda: world.load()[0], lambda e: [], "a gate needs a model with a LoRA adapter"),
        (lambda: adapted(world.load()[0], bias="all"), lambda e: [], 'bias must be "none"'),
        (lambda: adapted(world.load()[0]), lambda e: [SaveDelta("x.safetensors")], "so a delta cannot store it"),
        (
            lambda: adapted(world.load()[0]),
            lambda e: [PrefixCache(), ParameterScope(3, modules="down_proj")],
            "the gate of the adapter reads the input of block 2, but PrefixCache skips all blocks below block 3",
        ),
    ],
)
def test_what_would_void_the_promise_is_an_error_before_the_first_step(
    build, callbacks, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model, tokenizer, edits = build(), world.load()[1], EditDataset(world.edits(2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(EditError) as error:
        train(model, tokenizer, edits, [GatedAdapter(TEXTS, edits=edits), *callbacks(edits)], 1)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_trained_base_weights_and_dropout_are_refused(words, make):
    edits = [Edit("w1 w2", "w3")]
    model = adapted(make(), layers_to_transform=[1])
    model.get_base_model().model.norm.weight.requires_grad_(True)
    for build, message in (
        (model, "norm.weight is trained and is not a LoRA factor"),
        (
            adapted(
                make("gpt2", resid_pdrop=0.1), layers_to_transform=[1], target_modules=["c_proj"], fan_in_fan_out=True
            ),
            "the base model must have no dropout, got transformer.h.0.attn.resid_dropout",
        ),
        (adapted(make(attention_dropout=0.1), layers_to_transform=[1]), "no dropout, got attention_dropout"),
    ):
        with editing(build, [GatedAdapter(["w7 w8"], edits=edits)], tokenizer=words) as edit:
            with pytest.raises(EditError) as error:
                edit.before_step()
            assert message in str(error.value)


def test_dropout_in_a_function_is_refused(words, make):
    model = adapted(make(), layers_to_transform=[1])
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.register_forward_hook(lambda mlp, args, output: torch.nn.functional.dropout(output, 0.1, mlp.training))
    state = torch.get_rng_state()
    with editing(model, [GatedAdapter(["w7 w8"], edits=[Edit("w1 w2", "w3")])], tokenizer=words) as edit:
        with pytest.raises(EditError, match="differ between training and evaluation mode") as error:
            edit.before_step()
        assert "\n" not in str(error.value)
    assert torch.equal(torch.get_rng_state(), state)
    assert find_gate(model) is None


def test_arguments_are_checked(words, make):
    cases: Any = (
        ({"margin": 0.0}, "margin must be in (0, 1], got 0.0."),
        ({"layer": -1}, "layer must be an integer >= 0, or None, got -1."),
        ({"neighbors": -1}, "neighbors must be an integer >= 0, got -1."),
    )
    for arguments, message in cases:
        with pytest.raises(EditError) as error:
            GatedAdapter(TEXTS, **arguments)
        assert str(error.value) == f"GatedAdapter: {message}"
    model = adapted(make(), layers_to_transform=[1])
    with (
        pytest.raises(
            EditError,
            match=r"^GatedAdapter: layer must be at most 1, the index of the first block with an adapter, got 2",
        ),
        editing(model, [GatedAdapter(["w1"], layer=2)], tokenizer=words),
    ):
        pass
    with (
        editing(model, [GatedAdapter(["w1"])], tokenizer=words) as edit,
        pytest.raises(EditError, match=r"^GatedAdapter: the edits of this run are unknown; pass edits= "),
    ):
        edit.before_step()
