"""FullPrecision: small updates of a half-precision scope are kept, names and dtypes stay."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from conformance.hosts import HOSTS
from torch import nn

from kedit_train import world
from kedit_train.callbacks import EditCallback, NormBall, ParameterScope, TokenSmoothing, editing
from kedit_train.core.full_precision import FullPrecision
from kedit_train.data import EditDataset

NAME = "model.layers.3.mlp.down_proj.weight"


def half_world(dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    model, tokenizer = world.load()
    return model.to(dtype), tokenizer


class Recorder(EditCallback):
    """Keeps a copy of the weight during training."""

    order = 99

    def after_step(self, run: Any) -> None:
        self.weight = run.scope[NAME].detach().clone()


@pytest.mark.parametrize("full_precision", [False, True])
def test_small_updates_are_lost_in_bf16_and_kept_in_fp32(full_precision: bool) -> None:
    model, tokenizer = half_world()
    scope = ParameterScope(layers=3, modules="mlp.down_proj", full_precision=full_precision)
    with editing(model, [scope], tokenizer=tokenizer) as edit:
        weight = edit.run.scope[NAME]
        start = weight.detach().float().clone()
        optimizer = torch.optim.SGD(edit.parameters(), lr=1.0)
        for _ in range(5):
            edit.before_step()
            # Five steps move every entry by 5e-6.
            weight.grad = torch.full_like(weight, 1e-6)
            optimizer.step()
        moved = (weight.detach().float() - start)[start.abs() > 0.01]
    expected = torch.full_like(moved, -5e-6 if full_precision else 0.0)
    torch.testing.assert_close(moved, expected, rtol=2e-2, atol=2e-8)


@pytest.mark.parametrize("full_precision", [False, True])
def test_a_narrow_ball_binds_in_fp32_and_bf16_weights_cannot_move(full_precision: bool) -> None:
    model, tokenizer = half_world()
    before = model.get_parameter(NAME).detach().clone()
    scope = ParameterScope(layers=3, modules="mlp.down_proj", full_precision=full_precision)
    recorder = Recorder()
    # After the conversion back to bf16, the weights have not moved either. The warning says this.
    with pytest.warns(UserWarning, match="cannot move, because bfloat16"):
        HOSTS["Trainer"](model, tokenizer, EditDataset(world.edits(n=8)), [scope, NormBall(5e-5), recorder], 6)
    # The distance between neighboring bf16 numbers is at least 1.2e-4 here.
    large = before.float().abs() > 0.032
    moved = (recorder.weight.double() - before.double()).abs()[large]
    assert float(moved.max()) == (pytest.approx(5e-5, rel=1e-3) if full_precision else 0.0)
    assert float((model.get_parameter(NAME).detach().double() - before.double()).abs().max()) <= 5e-5


def test_a_ball_that_bf16_can_represent_holds_after_the_rounding() -> None:
    model, tokenizer = half_world()
    before = model.get_parameter(NAME).detach().clone()
    scope = ParameterScope(layers=3, modules="mlp.down_proj")
    HOSTS["Trainer"](model, tokenizer, EditDataset(world.edits(n=8)), [scope, NormBall(2e-3)], 6)
    moved = (model.get_parameter(NAME).detach().double() - before.double()).abs()
    assert 1e-3 < float(moved.max()) <= 2e-3


@pytest.mark.parametrize("host", ["Trainer", "SFTTrainer", "Lightning", "loop"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_names_dtypes_and_hooks_are_restored(host: str, dtype: torch.dtype) -> None:
    model, tokenizer = half_world(dtype)
    layout = [(name, p.dtype, p.requires_grad) for name, p in model.named_parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.layers.modules()]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scope = ParameterScope(layers="2-3", modules="mlp")
    HOSTS[host](model, tokenizer, EditDataset(world.edits(n=8)), [scope, TokenSmoothing()], 3)
    assert [(name, p.dtype, p.requires_grad) for name, p in model.named_parameters()] == layout
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.layers.modules()] == hooks
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ("layers.2.mlp" in name or "layers.3.mlp" in name)}


def test_a_model_that_lightning_converts_is_trained_in_fp32() -> None:
    model, tokenizer = world.load()
    recorder = Recorder()
    trained = [ParameterScope(layers=3, modules="mlp.down_proj"), recorder]
    HOSTS["Lightning"](model, tokenizer, EditDataset(world.edits(n=8)), trained, 2, precision="bf16-true")
    assert recorder.weight.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_tied_weights_compute_in_the_dtype_of_the_model() -> None:
    first, second = nn.Linear(4, 4, bias=False).bfloat16(), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    both = nn.Sequential(first, second)
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    expected = both(x)
    masters = FullPrecision(both, {"0.weight": first.weight})
    assert first.weight.dtype == torch.float32
    assert first.weight is second.weight
    out = both(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    out.sum().backward()
    assert first.weight.grad is not None
    assert first.weight.grad.dtype == torch.float32
    masters.remove()
    assert first.weight.dtype == torch.bfloat16
    assert torch.equal(both(x), expected)


def test_a_failing_forward_leaves_the_parameters_in_place() -> None:
    linear = nn.Linear(4, 4).bfloat16()
    FullPrecision(linear, dict(linear.named_parameters()))
    with pytest.raises(RuntimeError):
        linear(torch.randn(2, 5, dtype=torch.bfloat16))
    assert isinstance(linear.weight, nn.Parameter)
    assert [name for name, _ in linear.named_parameters()] == ["weight", "bias"]


def test_a_copy_of_a_half_precision_model_during_the_edit_is_an_ordinary_model() -> None:
    model, tokenizer = half_world()
    ids = torch.arange(8).unsqueeze(0)
    with editing(model, [ParameterScope(layers=3, modules="mlp.down_proj"), NormBall(1e-2)], tokenizer=tokenizer) as e:
        optimizer = torch.optim.SGD(e.parameters(), lr=0.1)
        e.before_step()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        expected = model(input_ids=ids).logits
        other = copy.deepcopy(model)
        with pytest.warns(
            UserWarning, match=rf"pickled during an edit, so {NAME} and 0 other parameters are saved in fp32"
        ):
            stored = pickle.loads(pickle.dumps(model))
        trained = e.run.scope[NAME].detach().clone()
        assert model.get_parameter(NAME).dtype == torch.float32
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}
    assert torch.equal(other.get_parameter(NAME), trained.bfloat16())
    assert torch.equal(other(input_ids=ids).logits, expected)
    assert torch.equal(stored.get_parameter(NAME), trained)
    assert torch.equal(stored.bfloat16()(input_ids=ids).logits, expected)


def test_functional_call_gives_the_gradients_of_the_fp32_values() -> None:
    model, tokenizer = half_world()
    ids = torch.arange(8).unsqueeze(0)
    with editing(model, [ParameterScope(layers=3, modules="mlp.down_proj")], tokenizer=tokenizer) as edit:
        model(input_ids=ids, labels=ids).loss.backward()
        values = {name: p.detach().clone().requires_grad_() for name, p in edit.run.scope.items()}
        torch.func.functional_call(model, values, (), {"input_ids": ids, "labels": ids}).loss.backward()
        assert torch.equal(values[NAME].grad, edit.run.scope[NAME].grad)
