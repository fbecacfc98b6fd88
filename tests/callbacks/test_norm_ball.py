"""NormBall: the bound holds on the stored weights after every step, for any optimizer, dtype and number of runs."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kedit_train.callbacks import NormBall, ParameterScope, editing
from kedit_train.core.state_file import load_state, save_state
from kedit_train.errors import EditError

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5),
    "sgd": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}
NORMS = [("linf", "tensor"), ("l2", "tensor"), ("l2", "scope")]


def forecaster(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a forecaster, which reads eight values of a series and returns the next value."""
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def distances(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (p.detach().double() - before[name].double()).abs() for name, p in model.named_parameters()}


def norm_of(difference: Tensor, norm: str) -> float:
    return float(difference.max() if norm == "linf" else difference.norm())


def train(model, ball, make_optimizer, steps=6, after_step=None, scope=None):
    dtype = next(model.parameters()).dtype
    with editing(model, [ball, *(scope or [])], log_every_n_steps=1) as edit:
        optimizer = make_optimizer(edit.parameters())
        for _ in range(steps):
            edit.before_step()
            series = torch.randn(32, 8).to(dtype)
            (model(series) - 5.0 * series.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if after_step is not None:
                after_step()
    return edit


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("norm", "per"), NORMS)
def test_the_bound_holds_in_the_stored_dtype_after_every_step(optimizer, dtype, norm, per):
    model = forecaster(dtype)
    before = weights_of(model)
    radius = 1.1e-3 if norm == "linf" else 0.0123

    def check_bound():
        moved = distances(model, before)
        if per == "tensor":
            assert max(norm_of(d, norm) for d in moved.values()) <= radius
        else:
            assert float(torch.cat([d.flatten() for d in moved.values()]).norm()) <= radius

    too_coarse = dtype is torch.bfloat16 and norm == "linf"
    with pytest.warns(UserWarning, match="cannot move") if too_coarse else contextlib.nullcontext():
        edit = train(model, NormBall(radius, norm=norm, per=per), OPTIMIZERS[optimizer], after_step=check_bound)
    used = max(norm_of(d, norm) for d in distances(model, before).values())
    assert used > 0.5 * radius if per == "tensor" else used > 0.0, "the model must move, else the ball does nothing"
    assert 0.5 < edit.history[-1]["edit/drift/ball"] <= 1.0
    assert ("edit/drift/at_bound" in edit.history[-1]) == (norm == "linf")


@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize(("norm", "per"), NORMS)
def test_a_fraction_means_the_same_at_every_scale_of_the_weights(norm, per, scale):
    model = forecaster()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    before = weights_of(model)
    optimizer = lambda p: torch.optim.AdamW(p, lr=0.5 * scale)  # noqa: E731
    edit = train(model, NormBall(fraction=0.1, norm=norm, per=per), optimizer)
    moved = distances(model, before)
    if per == "scope":
        sizes = {"all": torch.cat([b.double().flatten() for b in before.values()])}
        moved = {"all": torch.cat([d.flatten() for d in moved.values()])}
    else:
        sizes = {name: b.double() for name, b in before.items()}
    for name, size in sizes.items():
        bound = 0.1 * float(size.square().mean().sqrt() if norm == "linf" else size.norm())
        assert 0.99 * bound < norm_of(moved[name], norm) <= bound * (1 + 1e-12)
    # The metric is computed in fp32, which rounds the difference.
    assert 0.99 < edit.history[-1]["edit/drift/ball"] <= 1.0 + 1e-6


def test_a_fraction_refers_to_the_weights_before_the_first_of_several_runs():
    model, ball = forecaster(), NormBall(fraction=0.05, norm="l2")
    before = weights_of(model)
    for _ in range(3):
        train(model, ball, lambda p: torch.optim.AdamW(p, lr=1e-2))
    for name, moved in distances(model, before).items():
        assert float(moved.norm()) <= 0.05 * float(before[name].double().norm()) * (1 + 1e-12)


def test_a_fraction_of_a_tensor_of_zeros_is_refused_and_a_radius_is_not():
    model = forecaster()
    with torch.no_grad():
        model[2].bias.zero_()
    with pytest.raises(EditError, match=r"NormBall: 2\.bias is all zeros before the edit, .* set radius="):
        train(model, NormBall(), OPTIMIZERS["adamw"])
    train(forecaster(), NormBall(1e-2), OPTIMIZERS["adamw"])


def test_metrics_are_the_share_of_the_radius_in_use_and_of_entries_at_their_bound():
    model = forecaster()
    before = weights_of(model)
    edit = train(model, NormBall(1e-3), OPTIMIZERS["adamw"], steps=4)
    moved = torch.cat([d.flatten() for d in distances(model, before).values()])
    assert edit.history[-1]["edit/drift/ball"] == pytest.approx(float(moved.max()) / 1e-3, rel=1e-5)
    assert edit.history[-1]["edit/drift/at_bound"] == pytest.approx(float((moved > 0.999e-3).double().mean()), abs=0.01)


def test_a_radius_below_the_spacing_of_bf16_warns_and_the_weights_cannot_move():
    model = nn.Linear(64, 64, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.uniform_(0.1, 0.2)
    before = model.weight.detach().clone()
    series = torch.randn(8, 64)

    def last_metrics(ball):
        with editing(model, [ball], log_every_n_steps=1) as edit:
            optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-2)
            edit.before_step()
            model(series.to(model.weight.dtype)).square().mean().backward()
            optimizer.step()
        return edit.history[-1]

    expected = r"NormBall: 100% of the weights cannot move, because bfloat16 values near .* 5e-05"
    with pytest.warns(UserWarning, match=expected):
        metrics = last_metrics(NormBall(5e-5))
    assert torch.equal(model.weight, before)
    assert metrics["edit/drift/at_bound"] == 1.0
    with pytest.warns(UserWarning, match=r"radius of 5e-05; load the model in fp32, or use a larger radius\.$"):
        last_metrics(NormBall(5e-5))
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        with pytest.warns(UserWarning, match=r"NormBall: 100% .* than the radius of 1e-46; use a larger radius\.$"):
            last_metrics(NormBall(1e-46))
    model.float()
    metrics = last_metrics(NormBall(5e-5))
    assert metrics["edit/drift/at_bound"] > 0.9
    assert not torch.equal(model.weight.detach(), before.float())
    assert float((model.weight.detach().double() - before.double()).abs().max()) <= 5e-5


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_base_bounds_the_drift_of_several_runs_and_previous_that_of_each_run(norm):
    drift = {}
    for anchor in ("base", "previous"):
        torch.manual_seed(0)
        model = forecaster()
        before = weights_of(model)
        ball = NormBall(1e-2, norm=norm, anchor=anchor)
        for _ in range(3):
            train(model, ball, lambda p: torch.optim.AdamW(p, lr=1e-2), steps=4)
        drift[anchor] = max(norm_of(d, norm) for d in distances(model, before).values())
    assert drift["base"] <= 1e-2
    assert 2e-2 < drift["previous"] <= 3e-2 * (1 + 1e-6)


def test_base_bounds_a_scope_that_changes_between_runs():
    model, ball = forecaster(), NormBall(1e-2)
    before = weights_of(model)
    for modules in ("0", "2", "*"):
        train(model, ball, OPTIMIZERS["adamw"], scope=[ParameterScope(modules=modules)])
    assert max(float(d.max()) for d in distances(model, before).values()) <= 1e-2


def test_base_has_a_new_center_for_another_model():
    ball = NormBall(1e-2)
    train(forecaster(), ball, OPTIMIZERS["adamw"])
    other = forecaster()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    before = weights_of(other)
    train(other, ball, OPTIMIZERS["adamw"])
    assert 5e-3 < max(float(d.max()) for d in distances(other, before).values()) <= 1e-2


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_base_refuses_a_model_that_was_moved_outside_the_ball(norm):
    model, ball = forecaster(), NormBall(1e-2, norm=norm)
    train(model, ball, OPTIMIZERS["adamw"])
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    with pytest.raises(EditError, match=r"NormBall: 0\.weight is outside the ball .* create a new NormBall"):
        train(model, ball, OPTIMIZERS["adamw"])
    train(model, NormBall(1e-2, norm=norm), OPTIMIZERS["adamw"])


def test_base_over_the_scope_refuses_a_model_whose_tensors_together_are_outside():
    model, ball = forecaster(), NormBall(1.0, norm="l2", per="scope")
    train(model, ball, lambda p: torch.optim.SGD(p, lr=1e-9))
    # Each tensor alone stays within the radius.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.9 / parameter.numel() ** 0.5)
    with pytest.raises(EditError, match=r"is outside the ball .* or with a different scope"):
        train(model, ball, OPTIMIZERS["adamw"])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_metrics_are_empty_before_the_first_step_of_a_run(norm):
    model, ball = forecaster(), NormBall(1e-2, norm=norm)
    train(model, ball, OPTIMIZERS["adamw"])
    with editing(model, [ball]) as edit:
        edit.before_step()
        assert ball.metrics(edit.run).keys() <= {"edit/drift/ball"}
        ball.load_state({"anchor_weights": {}})
        assert ball.metrics(edit.run) == {}


def test_a_checkpoint_restores_the_center_of_an_earlier_run(tmp_path):
    model, ball = forecaster(), NormBall(1e-2)
    before = weights_of(model)
    train(model, ball, OPTIMIZERS["adamw"])
    resumed = NormBall(1e-2)
    with editing(model, [ball]) as edit:
        edit.before_step()
        save_state(tmp_path, ball.state())
    with editing(model, [resumed]) as edit:
        edit.before_step()
        resumed.load_state(load_state(tmp_path) or {})
        optimizer = torch.optim.AdamW(edit.parameters(), lr=0.1)
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
    assert max(float(d.max()) for d in distances(model, before).values()) <= 1e-2


def test_a_checkpoint_of_a_first_run_needs_no_anchor_weights():
    ball = NormBall(1e-2)
    with editing(forecaster(), [ball]) as edit:
        edit.before_step()
        assert ball.state() == {"anchor_weights": {}}


def test_sharded_weights_are_bounded_on_every_shard(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        before, after = torch.randn(6, 4), torch.randn(6, 4)
        for norm in ("linf", "l2"):
            sharded, whole = NormBall(1e-2, norm=norm), NormBall(1e-2, norm=norm)
            weights = {"w": distribute_tensor(after, mesh, [Shard(0)])}
            bounded = sharded.constrain(weights, {"w": distribute_tensor(before, mesh, [Shard(0)])})["w"]
            assert torch.equal(bounded.full_tensor(), whole.constrain({"w": after}, {"w": before})["w"])
            assert bounded.placements == (Shard(0),)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"radius": 0.0}, "> 0, or None"),
        ({"radius": float("inf")}, "finite and > 0, or None"),
        ({"norm": "l1"}, '"linf" or "l2"'),
        ({"per": "row"}, '"tensor" or "scope"'),
        ({"anchor": "first"}, '"base" or "previous"'),
        ({"fraction": -1.0}, "> 0"),
    ],
)
def test_invalid_arguments_are_refused(wrong: dict[str, Any], expected: str):
    (name,) = wrong
    with pytest.raises(EditError, match=f"NormBall: {name} must be {expected}, got {wrong[name]!r}"):
        NormBall(**wrong)
