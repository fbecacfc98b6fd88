"""PolyakStep: its step has the stated direction and length under every optimizer, for every kind of parameter."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from callbacks.inputs import SCOPE, TEXTS, WEIGHT, attach
from callbacks.polyak_runs import OPTIMIZERS, callbacks, run_steps
from torch import Tensor

from kedit_train import world
from kedit_train.callbacks import (
    GradientMask,
    LowCurvature,
    NormBall,
    NullSpace,
    ParameterScope,
    PolyakStep,
    SecondOrderLocality,
    editing,
)
from kedit_train.errors import EditError


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def distance(after: dict[str, Tensor], before: dict[str, Tensor]) -> float:
    return float(sum((after[n].double() - before[n].double()).square().sum() for n in before) ** 0.5)


def test_steps_have_the_stated_direction_and_length(make, words, ids):
    torch.manual_seed(0)
    model = make("llama")
    name = WEIGHT["llama"]
    expected = model.get_parameter(name).detach().double().clone()
    before, step_size = expected.clone(), 0.05
    losses, gradients, _ = run_steps(model, words, ids, PolyakStep(step_size), steps=3)
    assert [list(given) for given in gradients] == [[name]] * 3
    mean = square = torch.zeros_like(expected)
    mean_loss = 0.0
    for t, (loss, given) in enumerate(zip(losses, gradients, strict=True), start=1):
        g = given[name]
        mean_loss = 0.9 * mean_loss + 0.1 * loss
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g**2
        m, v = mean / (1 - 0.9**t), square / (1 - 0.999**t)
        direction = m / (v.sqrt() + 1e-6 * v.sqrt().mean())
        # The average gradient predicts that the step removes this fraction of the average loss.
        length = step_size * mean_loss / (1 - 0.9**t) / float((m * direction).sum())
        assert length * direction.norm() < 0.1 * before.norm()
        expected = expected - length * direction
        if t == 1:
            # The first direction is the sign of the gradient, except for gradients of the size of rounding errors.
            assert float((direction.abs() - 1).abs().median()) < 1e-4
            assert float((length * direction * g).sum()) == pytest.approx(step_size * loss, rel=1e-6)
    change, predicted = model.get_parameter(name).detach().double() - before, expected - before
    assert float((change - predicted).norm() / predicted.norm()) < 1e-4


def test_no_step_is_longer_than_a_tenth_of_the_weights(make, words, ids):
    torch.manual_seed(0)
    model = make("llama")
    before = weights_of(model)
    scope = {n: w for n, w in before.items() if ".1.mlp." in n}
    run_steps(model, words, ids, PolyakStep(1.0), modules="mlp", steps=1)
    norm = float(sum(w.double().square().sum() for w in scope.values()) ** 0.5)
    assert len(scope) == 3
    assert distance(weights_of(model), before) / norm == pytest.approx(0.1, rel=1e-5)


def test_the_result_does_not_depend_on_the_optimizer(make, words, ids):
    results = []
    for optimizer in OPTIMIZERS:
        torch.manual_seed(0)
        model = make("llama")
        run_steps(model, words, ids, PolyakStep(), optimizer=optimizer)
        results.append(model.get_parameter(WEIGHT["llama"]).detach().clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("kind", "modules", "layers"),
    [
        ("lora_", "mlp.down_proj", 1),
        (".bias", "*.bias", 1),
        ("layernorm", "*layernorm*", 1),
        ("embed_tokens", "embed_tokens", None),
        ("lm_head", "lm_head", None),
    ],
)
def test_the_loss_falls_with_every_kind_of_parameter(make, words, ids, kind, modules, layers):
    torch.manual_seed(0)
    model = make("gpt2" if kind == ".bias" else "llama", tie_word_embeddings=False)
    if kind == "lora_":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            # The biases of the tiny model are 0, and a scope of zeros is an error.
            torch.nn.init.normal_(parameter)
    before = weights_of(model)
    losses, _, _ = run_steps(model, words, ids, PolyakStep(), modules=modules, layers=layers, steps=20)
    moved = {name for name, weight in weights_of(model).items() if not torch.equal(weight, before[name])}
    assert moved
    assert all(kind in name for name in moved)
    assert losses[-1] < 0.9 * losses[0]


def test_constraints_are_exact_beside_it(make, words, ids):
    torch.manual_seed(0)
    model = make("llama")
    weight = model.get_parameter(WEIGHT["llama"])
    before = weight.detach().clone()
    run_steps(model, words, ids, PolyakStep(), NormBall(1e-2), GradientMask("magnitude", density=0.25), steps=5)
    change = weight.detach() - before
    assert int((change != 0).sum()) == weight.numel() // 4
    assert float(change.abs().max()) <= 1e-2


@pytest.mark.parametrize(
    ("constraint", "whole"),
    [
        # The first three also project the gradients, so the length is that of a step within the constraint.
        (lambda: NullSpace(TEXTS, energy=0.8), True),
        (lambda: LowCurvature(TEXTS), True),
        (lambda: GradientMask("magnitude", density=0.25), True),
        (lambda: NormBall(1e-3), False),
    ],
)
def test_a_projection_keeps_the_predicted_reduction_and_a_ball_does_not(make, words, ids, constraint, whole):
    torch.manual_seed(0)
    model = make("llama")
    weight = model.get_parameter(WEIGHT["llama"])
    before = weight.detach().double().clone()
    losses, gradients, _ = run_steps(model, words, ids, PolyakStep(0.02), constraint(), steps=1)
    change = weight.detach().double() - before
    reduction = -float((change * gradients[0][WEIGHT["llama"]]).sum()) / losses[0]
    assert reduction == pytest.approx(0.02, rel=1e-4) if whole else 0.0 < reduction < 0.01


@pytest.mark.parametrize("step_size", [0.05, 1.0])
def test_a_resumed_run_continues_bit_for_bit(make, words, ids, step_size):
    torch.manual_seed(0)
    model = make("llama")
    run_steps(model, words, ids, PolyakStep(step_size), steps=5)
    whole = model.get_parameter(WEIGHT["llama"]).detach().clone()
    torch.manual_seed(0)
    first = make("llama")
    _, _, state = run_steps(first, words, ids, PolyakStep(step_size), steps=2)
    torch.manual_seed(0)
    resumed = make("llama")
    resumed.load_state_dict(first.state_dict())
    # The weights have moved, so the longest step must still be measured at the weights before the edit.
    run_steps(resumed, words, ids, PolyakStep(step_size), steps=3, state=state)
    assert torch.equal(resumed.get_parameter(WEIGHT["llama"]), whole)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e25])
def test_a_gradient_that_is_not_finite_is_an_error(make, words, ids, factor):
    model = make("llama")
    with editing(model, callbacks(PolyakStep()), tokenizer=words) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=1.0)
        edit.before_step()
        (model(input_ids=ids, labels=ids).loss * factor).backward()
        with pytest.raises(EditError, match="PolyakStep: the gradients of step 1 contain NaN or infinite values, or "):
            optimizer.step()


def test_a_token_loss_is_needed(make, words):
    scope = ParameterScope(1, modules=SCOPE["llama"])
    with pytest.raises(EditError, match=r"PolyakStep: .* length of each step .* loss, .*; add TokenLoss"):
        attach(make(), words, PolyakStep(), scope)


@pytest.mark.parametrize("reverse", [False, True])
def test_only_one_callback_may_replace_the_step(make, words, reverse):
    both = [PolyakStep(), SecondOrderLocality(TEXTS)]
    with pytest.raises(EditError, match="another callback also replaces the optimizer step; keep only one of"):
        attach(make(), words, *callbacks(*(both[::-1] if reverse else both)))
    with pytest.raises(EditError, match="the second one would replace the step of the first, so keep only one"):
        attach(make(), words, *callbacks(PolyakStep(), PolyakStep()))


@pytest.mark.parametrize("step_size", [0.0, -0.1, 1.5, float("nan"), "0.1", True])
def test_a_wrong_step_size_is_refused(step_size):
    with pytest.raises(EditError, match=r"PolyakStep: step_size must be (a number )?in \(0, 1\]"):
        PolyakStep(step_size)


def test_a_scope_of_zeros_is_refused(make, words):
    model = make("llama")
    torch.nn.init.zeros_(model.get_parameter(WEIGHT["llama"]))
    with pytest.raises(EditError, match=r"PolyakStep: all parameters in scope are 0\. A step is"):
        attach(model, words, *callbacks(PolyakStep()))


def test_a_loss_that_does_not_fall_is_reported_once():
    """The same prompt with two answers cannot be learned: the mean loss stays above ln 2."""
    model, words = world.load()
    prompt = words("The moon is").input_ids
    ids = torch.tensor([[*prompt, answer] for answer in (50, 60)])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with editing(model, callbacks(PolyakStep(0.1)), tokenizer=words) as edit:
            optimizer = torch.optim.SGD(edit.parameters(), lr=1.0)
            for _ in range(160):
                edit.before_step()
                loss = model(input_ids=ids, labels=labels).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    assert float(loss.detach()) > 0.69 / 2
    stalled = [str(one.message) for one in caught if "has not fallen by 1 % in the last 20 steps" in str(one.message)]
    assert stalled
    assert stalled[0].startswith("PolyakStep: the average training loss")
