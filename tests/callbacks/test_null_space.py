"""NullSpace: after any number of steps of any optimizer the change does nothing to the preserved inputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from callbacks.inputs import SCOPE, TEXTS, WEIGHT, adamw, keys, preserved, train
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
    k0 = preserved(keys(model, words, name.removesuffix(".weight")), energy)
    callbacks = [NullSpace(TEXTS, keep_energy=energy, batch_size=3), ParameterScope(1, SCOPE[family])]
    with editing(model, callbacks, tokenizer=words, log_every_n_steps=50) as edit:
        train(model, edit, ids, OPTIMIZERS[optimizer](edit.parameters()))
    delta = (model.get_parameter(name).detach().double() - before.double()).reshape(before.shape)
    delta = delta.T if family == "gpt2" else delta
    assert delta.shape[0] != delta.shape[1]
    leak = float((delta @ k0).norm() / delta.norm())
    assert leak < 1e-5
    assert float(delta.norm()) > 0.1
    row = edit.history[-1]
    assert row["edit/drift/null_space_rank"] == k0.shape[1]
    assert row["edit/drift/null_space_share"] == pytest.approx(k0.shape[1] / delta.shape[1])
    assert row["edit/drift/null_space_leak"] < 1e-5


def test_all_energy_keeps_what_the_module_answers_on_every_token(make, words, ids):
    """13 tokens span 11 of 32 directions: nothing that the texts send through changes."""
    model = make("llama")
    name = WEIGHT["llama"]
    before = copy.deepcopy(model)
    k = keys(model, words, name.removesuffix(".weight")).float()
    callbacks = [NullSpace(TEXTS, keep_energy=1.0), ParameterScope(1, SCOPE["llama"])]
    with editing(model, callbacks, tokenizer=words) as edit:
        train(model, edit, ids, adamw(edit.parameters()))
    delta = (model.get_parameter(name) - before.get_parameter(name)).detach()
    assert float((delta @ k).norm()) < 1e-4 * float(delta.norm() * k.norm())
    for text in TEXTS:
        row = torch.tensor([words(text)["input_ids"]])
        torch.testing.assert_close(model.eval()(row).logits, before.eval()(row).logits, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(model(ids).logits, before(ids).logits, atol=0.1)


@pytest.mark.parametrize("family", WEIGHT)
def test_the_optimizer_sees_only_what_may_move(make, words, ids, family):
    """Else Adam's scales would be those of gradients that it can never follow."""
    model, name = make(family), WEIGHT[family]
    k0 = preserved(keys(model, words, name.removesuffix(".weight")), 0.9)
    for row in ids:
        model(input_ids=row[None], labels=row[None]).loss.backward()
    gradient = model.get_parameter(name).grad.double()
    gradient = gradient.T if family == "gpt2" else gradient
    wanted = gradient - gradient @ k0 @ k0.T
    model.zero_grad()
    with editing(model, [NullSpace(TEXTS, keep_energy=0.9), ParameterScope(1, SCOPE[family])], tokenizer=words) as edit:
        edit.before_step()
        for row in ids:
            model(input_ids=row[None], labels=row[None]).loss.backward()
        found = model.get_parameter(name).grad.double()
        torch.testing.assert_close(found.T if family == "gpt2" else found, wanted, atol=1e-5, rtol=1e-4)
        assert float((gradient - wanted).norm()) > 0.1 * float(gradient.norm())
        model.zero_grad()
    # Gone with the callback.
    for row in ids:
        model(input_ids=row[None], labels=row[None]).loss.backward()
    found = model.get_parameter(name).grad.double()
    torch.testing.assert_close(found.T if family == "gpt2" else found, gradient)


def test_projecting_gradients_alone_leaks_under_adam(make, words, ids):
    """Why the difference is projected, not the gradient: Adam divides each entry by its own scale."""
    name = WEIGHT["llama"]
    leaks = {}
    for kind in ("sgd", "adamw"):
        torch.manual_seed(0)
        model = make("llama")
        before = model.get_parameter(name).detach().clone()
        u = preserved(keys(model, words, name.removesuffix(".weight")), 0.9).float()
        weight = model.get_parameter(name)
        weight.register_hook(lambda g, u=u: g - (g @ u) @ u.T)
        optimizer = torch.optim.SGD([weight], lr=0.3) if kind == "sgd" else torch.optim.AdamW([weight], lr=1e-2)
        for _ in range(50):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        delta = weight.detach() - before
        leaks[kind] = float((delta @ u).norm() / delta.norm())
    assert leaks["sgd"] < 1e-5
    assert leaks["adamw"] > 0.1


def adapter(model: Any, **more: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = ["c_proj"] if model.config.model_type == "gpt2" else ["down_proj"]
    fan = {"fan_in_fan_out": True} if model.config.model_type == "gpt2" else {}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, layers_to_transform=[1], task_type="CAUSAL_LM")
    for key, value in {**fan, **more}.items():
        setattr(config, key, value)
    return get_peft_model(model, config)


@pytest.mark.parametrize("family", WEIGHT)
def test_a_lora_adapter_does_nothing_to_preserved_inputs(make, words, ids, family):
    plain = make(family)
    k0 = preserved(keys(plain, words, WEIGHT[family].removesuffix(".weight")), 0.9)
    model = adapter(plain)
    with editing(model, [NullSpace(TEXTS, keep_energy=0.9)], tokenizer=words, log_every_n_steps=50) as edit:
        named = dict(edit.run.scope)
        train(model, edit, ids, adamw(edit.parameters()))
        assert edit.history[-1]["edit/drift/null_space_leak"] < 1e-5
    for name in (n for n in named if "lora_A" in n and (family != "gpt2" or ".mlp." in n)):
        a, b = named[name].detach().double(), named[name.replace("lora_A", "lora_B")].detach().double()
        delta = 2.0 * b @ a
        assert float((delta @ k0).norm() / delta.norm()) < 1e-5
        assert float(delta.norm()) > 0.1
        base = model.get_submodule(name.removesuffix(".lora_A.default.weight"))
        rows = torch.randn(3, a.shape[1])
        wanted = base.base_layer(rows) + (rows.double() @ delta.T).float()
        torch.testing.assert_close(base(rows), wanted, atol=1e-4, rtol=1e-4)


def test_one_lora_factor_alone_is_projected_from_where_it_is(make, words, ids):
    model = adapter(make("llama"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    (name,) = [n for n, p in model.named_parameters() if "lora_A" in n]
    a, b = model.get_parameter(name), model.get_parameter(name.replace("lora_A", "lora_B"))
    before = (b @ a).detach().double()
    k0 = preserved(keys(model, words, name.removesuffix(".weight")), 0.9)
    with editing(model, [NullSpace(TEXTS, keep_energy=0.9), ParameterScope(modules="lora_A")], tokenizer=words) as edit:
        train(model, edit, ids, adamw(edit.parameters()))
    delta = (b @ a).detach().double() - before
    assert float((delta @ k0).norm() / delta.norm()) < 1e-5
    assert float(delta.norm()) > 0.1


@pytest.mark.parametrize(
    ("dtype", "full_precision", "training", "end"),
    [
        (torch.float64, True, (0.0, 1e-13), (0.0, 1e-13)),
        (torch.float32, True, (0.0, 1e-5), (0.0, 1e-5)),
        (torch.bfloat16, True, (0.0, 1e-5), (1e-4, 1e-2)),
        (torch.bfloat16, False, (1e-4, 1e-2), (1e-4, 1e-2)),
    ],
)
def test_what_leaks_is_the_rounding_of_the_stored_weights(make, words, ids, dtype, full_precision, training, end):
    name = WEIGHT["llama"]
    model = make("llama", dtype)
    before = model.get_parameter(name).detach().double().clone()
    k0 = preserved(keys(model, words, name.removesuffix(".weight")), 0.9)
    scope = ParameterScope(1, SCOPE["llama"], full_precision=full_precision)
    space = NullSpace(TEXTS, keep_energy=0.9)
    with editing(model, [space, scope], tokenizer=words, log_every_n_steps=50) as edit:
        train(model, edit, ids, adamw(edit.parameters()))
    delta = model.get_parameter(name).detach().double() - before
    assert end[0] <= float((delta @ k0).norm() / delta.norm()) < end[1]
    assert training[0] <= edit.history[-1]["edit/drift/null_space_leak"] < training[1]


def test_a_forecaster_is_held_on_its_own_inputs():
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 1, bias=False))
    series = torch.randn(12, 3) @ torch.randn(3, 8)
    before = copy.deepcopy(model)
    held = NullSpace([series[:6], {"input": series[6:]}], keep_energy=1.0)
    with editing(model, [held, ParameterScope(modules="0.weight")], log_every_n_steps=1) as edit:
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


def test_a_reward_model_is_held_on_texts(words, ids):
    """It reads token ids and has no language-model head."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_labels": 1}
    config = LlamaConfig(vocab_size=61, num_attention_heads=2, pad_token_id=0, **shape)
    model = LlamaForSequenceClassification(config)
    before = model.get_parameter(WEIGHT["llama"]).detach().double().clone()
    k0 = preserved(keys(model, words, WEIGHT["llama"].removesuffix(".weight")), 0.9)
    held = [NullSpace(TEXTS, keep_energy=0.9), ParameterScope(1, SCOPE["llama"])]
    with editing(model, held, tokenizer=words) as edit:
        optimizer = adamw(edit.parameters())
        for _ in range(50):
            edit.before_step()
            (model(input_ids=ids).logits - 3.0).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    delta = model.get_parameter(WEIGHT["llama"]).detach().double() - before
    assert float((delta @ k0).norm() / delta.norm()) < 1e-5
    assert float(delta.norm()) > 0.1


def attempt(model: Any, callback: Any, words: Any, *more: Any) -> None:
    with editing(model, [callback, *more], tokenizer=words) as edit:
        edit.before_step()


def test_what_cannot_hold_is_refused(make, words):
    model = make("gpt2")
    with pytest.raises(EditError, match=r"not the weight of nn.Linear or Conv1D \(transformer.h.1.mlp.c_proj.bias\)"):
        attempt(model, NullSpace(TEXTS), words, ParameterScope(1, "mlp.c_proj"))
    with pytest.raises(EditError, match=r"the texts use all 16 directions .* could not move; lower keep_energy"):
        attempt(make(), NullSpace([f"w{i} w{i + 1}" for i in range(50)], 1.0), words, ParameterScope(1, "q_proj"))
    dora = adapter(make(), use_dora=True)
    with pytest.raises(EditError, match="DoRA adapter, whose norm rescales"):
        attempt(dora, NullSpace(TEXTS), words, ParameterScope(modules=["lora_A", "lora_B"]))
    worn = adapter(make())
    with torch.no_grad():
        next(p for n, p in worn.named_parameters() if "lora_B" in n).fill_(0.1)
    with pytest.raises(EditError, match=r"lora_B\.default\.weight is not zero, so the adapter acts already"):
        attempt(worn, NullSpace(TEXTS), words)
    with pytest.raises(EditError, match=r"Sequential holds no model that reads token ids, .* list of its own inputs"):
        attempt(nn.Sequential(nn.Linear(3, 3)), NullSpace(TEXTS), words)
    with pytest.raises(EditError, match=r"NullSpace: there is no file 'nowhere\.txt'"):
        attempt(make(), NullSpace("nowhere.txt"), words)


@pytest.mark.parametrize(
    "wrong", [{"keep_energy": 0.0}, {"keep_energy": 1.1}, {"rank": 0}, {"samples": 0}, {"batch_size": 0}]
)
def test_arguments_out_of_bounds_are_refused(wrong):
    with pytest.raises(EditError, match=f"NullSpace: {next(iter(wrong))}=.* is out of bounds"):
        NullSpace(TEXTS, **wrong)
