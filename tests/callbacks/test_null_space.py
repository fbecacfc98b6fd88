"""NullSpace: after any steps of any optimizer, layer outputs for the preserved inputs have not changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from callbacks.inputs import SCOPE, TEXTS, WEIGHT, adamw, attach, inputs_of, principal, share_of, train
from torch import nn

from kedit_train.callbacks import NullSpace, ParameterScope, editing
from kedit_train.errors import EditError

OPTIMIZERS = {
    "adamw": adamw,
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("family", WEIGHT)
@pytest.mark.parametrize("energy", [0.5, 0.9])
def test_the_change_does_nothing_to_preserved_inputs(make, words, ids, family, optimizer, energy):
    model = make(family)
    name = WEIGHT[family]
    before = model.get_parameter(name).detach().clone()
    directions = principal(inputs_of(model, words, name), energy)
    callbacks = [NullSpace(TEXTS, energy=energy, batch_size=3), ParameterScope(1, modules=SCOPE[family])]
    with editing(model, callbacks, tokenizer=words, log_every_n_steps=50) as edit:
        train(model, edit, ids, OPTIMIZERS[optimizer](edit.parameters()))
    change = model.get_parameter(name).detach().double() - before.double()
    change = change.T if family == "gpt2" else change
    assert change.shape[0] != change.shape[1]
    assert share_of(change, directions) < 1e-5
    assert float(change.norm()) > 0.1
    metrics = edit.history[-1]
    assert metrics["edit/drift/null_space_rank"] == directions.shape[1]
    assert metrics["edit/drift/null_space_share"] == pytest.approx(directions.shape[1] / change.shape[1])
    assert metrics["edit/drift/null_space_leak"] < 1e-5


def test_with_all_energy_the_predictions_on_every_token_stay(make, words, ids):
    """13 tokens span 11 of 32 directions, so there is room to move."""
    model = make("llama")
    name = WEIGHT["llama"]
    before = copy.deepcopy(model)
    inputs = inputs_of(model, words, name).float()
    callbacks = [NullSpace(TEXTS, energy=1.0), ParameterScope(1, modules=SCOPE["llama"])]
    with editing(model, callbacks, tokenizer=words) as edit:
        train(model, edit, ids, adamw(edit.parameters()))
    change = (model.get_parameter(name) - before.get_parameter(name)).detach()
    assert float((change @ inputs).norm()) < 1e-4 * float(change.norm() * inputs.norm())
    for text in TEXTS:
        sequence = torch.tensor([words(text)["input_ids"]])
        torch.testing.assert_close(model.eval()(sequence).logits, before.eval()(sequence).logits, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(model(ids).logits, before(ids).logits, atol=0.1)


@pytest.mark.parametrize("family", WEIGHT)
def test_the_optimizer_receives_projected_gradients(make, words, ids, family):
    model, name = make(family), WEIGHT[family]
    directions = principal(inputs_of(model, words, name), 0.9)

    def accumulated_gradient():
        model.zero_grad()
        for sequence in ids:
            model(input_ids=sequence[None], labels=sequence[None]).loss.backward()
        gradient = model.get_parameter(name).grad.double()
        return gradient.T.clone() if family == "gpt2" else gradient.clone()

    gradient = accumulated_gradient()
    expected = gradient - gradient @ directions @ directions.T
    model.zero_grad()
    with editing(model, [NullSpace(TEXTS), ParameterScope(1, modules=SCOPE[family])], tokenizer=words) as edit:
        edit.before_step()
        torch.testing.assert_close(accumulated_gradient(), expected, atol=1e-5, rtol=1e-4)
        assert float((gradient - expected).norm()) > 0.1 * float(gradient.norm())
        model.zero_grad()
    torch.testing.assert_close(accumulated_gradient(), gradient, msg="the hooks go with the callback")


def test_projecting_gradients_alone_leaks_under_adam(make, words, ids):
    """The reason why the whole change is projected: Adam rescales each entry of the gradient."""
    name = WEIGHT["llama"]
    leaks = {}
    for kind in ("sgd", "adamw"):
        torch.manual_seed(0)
        model = make("llama")
        before = model.get_parameter(name).detach().clone()
        u = principal(inputs_of(model, words, name), 0.9).float()
        weight = model.get_parameter(name)
        weight.register_hook(lambda g, u=u: g - (g @ u) @ u.T)
        optimizer = torch.optim.SGD([weight], lr=0.3) if kind == "sgd" else torch.optim.AdamW([weight], lr=1e-2)
        for _ in range(50):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        leaks[kind] = share_of(weight.detach() - before, u)
    assert leaks["sgd"] < 1e-5
    assert leaks["adamw"] > 0.1


def lora(model: Any, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = ["c_proj"] if model.config.model_type == "gpt2" else ["down_proj"]
    if model.config.model_type == "gpt2":
        options["fan_in_fan_out"] = True
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, layers_to_transform=[1], task_type="CAUSAL_LM", **options
    )
    return get_peft_model(model, config)


@pytest.mark.parametrize("family", WEIGHT)
def test_a_lora_adapter_does_nothing_to_preserved_inputs(make, words, ids, family):
    base = make(family)
    directions = principal(inputs_of(base, words, WEIGHT[family]), 0.9)
    model = lora(base)
    with editing(model, [NullSpace(TEXTS)], tokenizer=words, log_every_n_steps=50) as edit:
        parameters = dict(edit.run.scope)
        train(model, edit, ids, adamw(edit.parameters()))
        assert edit.history[-1]["edit/drift/null_space_leak"] < 1e-5
    for name in (n for n in parameters if "lora_A" in n and (family != "gpt2" or ".mlp." in n)):
        a, b = parameters[name].detach().double(), parameters[name.replace("lora_A", "lora_B")].detach().double()
        change = 2.0 * b @ a
        assert share_of(change, directions) < 1e-5
        assert float(change.norm()) > 0.1
        module = model.get_submodule(name.removesuffix(".lora_A.default.weight"))
        x = torch.randn(3, a.shape[1])
        expected = module.base_layer(x) + (x.double() @ change.T).float()
        torch.testing.assert_close(module(x), expected, atol=1e-4, rtol=1e-4)


def test_the_change_of_a_single_lora_factor_is_projected(make, words, ids):
    model = lora(make("llama"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    (name,) = [n for n, p in model.named_parameters() if "lora_A" in n]
    a, b = model.get_parameter(name), model.get_parameter(name.replace("lora_A", "lora_B"))
    before = (b @ a).detach().double()
    directions = principal(inputs_of(model, words, name), 0.9)
    with editing(model, [NullSpace(TEXTS), ParameterScope(modules="lora_A")], tokenizer=words) as edit:
        train(model, edit, ids, adamw(edit.parameters()))
    change = (b @ a).detach().double() - before
    assert share_of(change, directions) < 1e-5
    assert float(change.norm()) > 0.1


@pytest.mark.parametrize(
    ("dtype", "full_precision", "during_training", "at_the_end"),
    [
        (torch.float64, True, (0.0, 1e-13), (0.0, 1e-13)),
        (torch.float32, True, (0.0, 1e-5), (0.0, 1e-5)),
        (torch.bfloat16, True, (0.0, 1e-5), (1e-4, 1e-2)),
        (torch.bfloat16, False, (1e-4, 1e-2), (1e-4, 1e-2)),
    ],
)
def test_the_leak_is_the_rounding_of_the_stored_weights(
    make, words, ids, dtype, full_precision, during_training, at_the_end
):
    name = WEIGHT["llama"]
    model = make("llama", dtype)
    before = model.get_parameter(name).detach().double().clone()
    directions = principal(inputs_of(model, words, name), 0.9)
    scope = ParameterScope(1, modules=SCOPE["llama"], full_precision=full_precision)
    with editing(model, [NullSpace(TEXTS), scope], tokenizer=words, log_every_n_steps=50) as edit:
        train(model, edit, ids, adamw(edit.parameters()))
    change = model.get_parameter(name).detach().double() - before
    assert at_the_end[0] <= share_of(change, directions) < at_the_end[1]
    assert during_training[0] <= edit.history[-1]["edit/drift/null_space_leak"] < during_training[1]


def test_a_forecaster_is_preserved_on_its_own_inputs():
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 1, bias=False))
    series = torch.randn(12, 3) @ torch.randn(3, 8)
    before = copy.deepcopy(model)
    null_space = NullSpace([series[:6], {"input": series[6:]}], energy=1.0)
    with editing(model, [null_space, ParameterScope(modules="0.weight")], log_every_n_steps=1) as edit:
        optimizer = adamw(edit.parameters())
        for _ in range(50):
            edit.before_step()
            other = torch.randn(32, 8)
            (model(other) - other.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert edit.history[-1]["edit/drift/null_space_rank"] == 3
    torch.testing.assert_close(model(series), before(series), atol=1e-5, rtol=1e-5)
    assert float((model(other) - before(other)).detach().norm()) > 0.1


def test_a_reward_model_is_preserved_on_texts(words, ids):
    """A reward model reads token ids and has no language-model head."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_labels": 1}
    config = LlamaConfig(vocab_size=61, num_attention_heads=2, pad_token_id=0, **shape)
    model = LlamaForSequenceClassification(config)
    name = WEIGHT["llama"]
    before = model.get_parameter(name).detach().double().clone()
    directions = principal(inputs_of(model, words, name), 0.9)
    with editing(model, [NullSpace(TEXTS), ParameterScope(1, modules=SCOPE["llama"])], tokenizer=words) as edit:
        optimizer = adamw(edit.parameters())
        for _ in range(50):
            edit.before_step()
            (model(input_ids=ids).logits - 3.0).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    change = model.get_parameter(name).detach().double() - before
    assert share_of(change, directions) < 1e-5
    assert float(change.norm()) > 0.1


def test_a_scope_with_a_bias_is_refused(make, words):
    with pytest.raises(EditError, match=r"NullSpace: .*these are not: transformer\.h\.1\.mlp\.c_proj\.bias"):
        attach(make("gpt2"), words, NullSpace(TEXTS), ParameterScope(1, modules="mlp.c_proj"))


def test_texts_that_use_all_directions_are_refused(make, words):
    texts = [f"w{i} w{i + 1}" for i in range(50)]
    with pytest.raises(EditError, match=r"all 16 input directions of .* could not move; use a lower energy"):
        attach(make(), words, NullSpace(texts, energy=1.0), ParameterScope(1, modules="q_proj"))


def test_a_dora_adapter_is_refused(make, words):
    with pytest.raises(EditError, match="is a DoRA adapter, which rescales the output"):
        attach(lora(make(), use_dora=True), words, NullSpace(TEXTS), ParameterScope(modules=["lora_A", "lora_B"]))


def test_a_trained_adapter_is_refused(make, words):
    model = lora(make())
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(0.1)
    with pytest.raises(EditError, match=r"lora_B\.default\.weight is not zero, so the adapter already changes"):
        attach(model, words, NullSpace(TEXTS))


def test_texts_for_a_model_that_reads_none_are_refused(words):
    with pytest.raises(
        EditError, match=r"Sequential has no module that reads token ids, .* list of the model's inputs"
    ):
        attach(nn.Sequential(nn.Linear(3, 3)), words, NullSpace(TEXTS))


def test_a_missing_file_of_texts_is_refused(make, words):
    with pytest.raises(EditError, match=r"NullSpace: file 'nowhere\.txt' does not exist"):
        attach(make(), words, NullSpace("nowhere.txt"))


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"energy": 0.0}, r"in \(0, 1\]"),
        ({"energy": 1.1}, r"in \(0, 1\]"),
        ({"limit": 0}, "an integer >= 1, or None"),
        ({"batch_size": 0}, "an integer >= 1"),
    ],
)
def test_invalid_arguments_are_refused(wrong, expected):
    (name,) = wrong
    with pytest.raises(EditError, match=f"NullSpace: {name} must be {expected}, got {wrong[name]!r}"):
        NullSpace(TEXTS, **wrong)
