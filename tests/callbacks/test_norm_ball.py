"""NormBall: the bound holds on the stored weights after every step, for any optimizer, dtype and number of runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kedit_train.callbacks import NormBall, ParameterScope, editing
from kedit_train.core.drift.anchor_weights import Centres
from kedit_train.core.state_file import load_state, save_state
from kedit_train.errors import EditError

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5),
    "sgd": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


def forecaster(dtype: torch.dtype = torch.float32) -> nn.Module:
    """No language model: eight values of a series in, the next one out."""
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def apart(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (p.detach().double() - before[name].double()).abs() for name, p in model.named_parameters()}


def train(model, ball, make_optimizer, steps=6, check=None, scope=None):
    dtype = next(model.parameters()).dtype
    with editing(model, [ball, *(scope or [])], log_every_n_steps=1) as edit:
        optimizer = make_optimizer(edit.parameters())
        for _ in range(steps):
            edit.before_step()
            series = torch.randn(32, 8).to(dtype)
            (model(series) - 5.0 * series.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if check is not None:
                check()
    return edit


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("norm", "per"), [("linf", "tensor"), ("l2", "tensor"), ("l2", "scope")])
def test_the_bound_holds_in_the_stored_dtype_after_every_step(optimizer, dtype, norm, per):
    model = forecaster(dtype)
    before = state(model)
    radius = 1.1e-3 if norm == "linf" else 0.0123

    def check():
        now = apart(model, before)
        if norm == "linf":
            assert max(float(d.max()) for d in now.values()) <= radius
        elif per == "tensor":
            assert max(float(d.norm()) for d in now.values()) <= radius
        else:
            assert float(torch.cat([d.flatten() for d in now.values()]).norm()) <= radius

    ball = NormBall(radius, norm=norm, per=per)
    with pytest.warns(UserWarning, match="cannot move") if dtype is torch.bfloat16 and norm == "linf" else none():
        edit = train(model, ball, OPTIMIZERS[optimizer], check=check)
    # It moved, and without the ball it would have gone further.
    used = max(float(d.max()) if norm == "linf" else float(d.norm()) for d in apart(model, before).values())
    assert used > 0.5 * radius if per == "tensor" else used > 0.0
    assert 0.5 < edit.history[-1]["edit/drift/ball"] <= 1.0
    assert ("edit/drift/at_bound" in edit.history[-1]) == (norm == "linf")


class none:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize(("norm", "per"), [("linf", "tensor"), ("l2", "tensor"), ("l2", "scope")])
def test_a_fraction_of_the_weights_means_the_same_at_every_scale(norm, per, scale):
    model = forecaster()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    before = state(model)
    optimizer = lambda p: torch.optim.AdamW(p, lr=0.5 * scale)  # noqa: E731
    edit = train(model, NormBall(fraction=0.1, norm=norm, per=per), optimizer)
    now = apart(model, before)
    if per == "scope":
        sizes = {"all": torch.cat([b.double().flatten() for b in before.values()])}
        now = {"all": torch.cat([d.flatten() for d in now.values()])}
    else:
        sizes = {name: b.double() for name, b in before.items()}
    for name, size in sizes.items():
        bound = 0.1 * float(size.square().mean().sqrt() if norm == "linf" else size.norm())
        reached = float(now[name].max() if norm == "linf" else now[name].norm())
        assert 0.99 * bound < reached <= bound * (1 + 1e-12)
    # In fp32, which rounds the difference.
    assert 0.99 < edit.history[-1]["edit/drift/ball"] <= 1.0 + 1e-6


def test_a_fraction_is_of_the_first_weights_over_several_edits_and_of_nothing_refused():
    model, ball = forecaster(), NormBall(fraction=0.05, norm="l2")
    before = state(model)
    for _ in range(3):
        train(model, ball, lambda p: torch.optim.AdamW(p, lr=1e-2))
    for name, moved in apart(model, before).items():
        assert float(moved.norm()) <= 0.05 * float(before[name].double().norm()) * (1 + 1e-12)
    with torch.no_grad():
        model[2].bias.zero_()
    with pytest.raises(EditError, match=r"2\.bias is zero before the edit, .* give radius="):
        train(model, NormBall(), OPTIMIZERS["adamw"])
    train(model, NormBall(1e-2), OPTIMIZERS["adamw"])


def test_metrics_are_the_share_of_the_radius_and_of_entries_at_it():
    model = forecaster()
    before = state(model)
    edit = train(model, NormBall(1e-3), OPTIMIZERS["adamw"], steps=4)
    now = torch.cat([d.flatten() for d in apart(model, before).values()])
    assert edit.history[-1]["edit/drift/ball"] == pytest.approx(float(now.max()) / 1e-3, rel=1e-5)
    assert edit.history[-1]["edit/drift/at_bound"] == pytest.approx(float((now > 0.999e-3).double().mean()), abs=0.01)


def test_a_ball_smaller_than_the_spacing_of_bf16_holds_the_weights_still_and_says_so():
    model = nn.Linear(64, 64, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.uniform_(0.1, 0.2)
    before = model.weight.detach().clone()
    series = torch.randn(8, 64)

    def run(ball):
        with editing(model, [ball], log_every_n_steps=1) as edit:
            optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-2)
            edit.before_step()
            model(series.to(model.weight.dtype)).square().mean().backward()
            optimizer.step()
        return edit.history[-1]

    with pytest.warns(UserWarning, match=r"100% of the entries cannot move: bfloat16 has no other value within 5e-05"):
        row = run(NormBall(5e-5))
    assert torch.equal(model.weight, before)
    assert row["edit/drift/at_bound"] == 1.0
    model.float()
    row = run(NormBall(5e-5))
    assert row["edit/drift/at_bound"] > 0.9
    assert not torch.equal(model.weight.detach(), before.float())
    assert float((model.weight.detach().double() - before.double()).abs().max()) <= 5e-5


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_base_stays_around_the_first_weights_over_several_edits_and_previous_does_not(norm):
    drift = {}
    for anchor in ("base", "previous"):
        torch.manual_seed(0)
        model = forecaster()
        before = state(model)
        ball = NormBall(1e-2, norm=norm, anchor=anchor)
        for _ in range(3):
            train(model, ball, lambda p: torch.optim.AdamW(p, lr=1e-2), steps=4)
        now = apart(model, before)
        drift[anchor] = max(float(d.max()) if norm == "linf" else float(d.norm()) for d in now.values())
    assert drift["base"] <= 1e-2
    assert 2e-2 < drift["previous"] <= 3e-2 * (1 + 1e-6)


def test_base_follows_the_scope_from_edit_to_edit_and_starts_anew_with_another_model():
    model, ball = forecaster(), NormBall(1e-2)
    before = state(model)
    for modules in ("0", "2", "*"):
        train(model, ball, OPTIMIZERS["adamw"], scope=[ParameterScope(modules=modules)])
    assert max(float(d.max()) for d in apart(model, before).values()) <= 1e-2
    other = forecaster()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    before = state(other)
    train(other, ball, OPTIMIZERS["adamw"])
    assert 5e-3 < max(float(d.max()) for d in apart(other, before).values()) <= 1e-2


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_base_refuses_a_model_that_something_else_has_moved(norm):
    model, ball = forecaster(), NormBall(1e-2, norm=norm)
    train(model, ball, OPTIMIZERS["adamw"])
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    with pytest.raises(EditError, match=r"0\.weight begins outside of the ball .* make a new NormBall"):
        train(model, ball, OPTIMIZERS["adamw"])
    train(model, NormBall(1e-2, norm=norm), OPTIMIZERS["adamw"])


def test_a_ball_over_the_scope_is_left_by_all_its_tensors_together_and_is_another_with_another_scope():
    model, ball = forecaster(), NormBall(1.0, norm="l2", per="scope")
    train(model, ball, lambda p: torch.optim.SGD(p, lr=1e-9))
    # Each within the radius, all of them together without.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.9 / parameter.numel() ** 0.5)
    with pytest.raises(EditError, match=r"begins outside of the ball .* or has another scope, whose ball is another"):
        train(model, ball, OPTIMIZERS["adamw"])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_later_run_has_nothing_to_say_before_its_first_step(norm):
    model, ball = forecaster(), NormBall(1e-2, norm=norm)
    train(model, ball, OPTIMIZERS["adamw"])
    with editing(model, [ball]) as edit:
        edit.before_step()
        assert ball.metrics(edit.run).keys() <= {"edit/drift/ball"}
        ball.load_state({"centres": {}})
        assert ball.metrics(edit.run) == {}


def test_centres_go_where_the_model_goes_between_runs():
    model = forecaster()
    centres = Centres("base")
    run: Any = SimpleNamespace(model=model, scope=dict(model.named_parameters()))
    assert centres.begin(run) == []
    centres.follow(run.scope, {name: p.detach().clone() for name, p in run.scope.items()})
    moved = forecaster().to("meta")
    run.scope = dict(moved.named_parameters())
    assert set(centres.begin(run)) == set(run.scope)
    assert {centre.device.type for centre in centres.values()} == {"meta"}


def test_a_checkpoint_takes_the_ball_of_an_earlier_run_along(tmp_path):
    model, ball = forecaster(), NormBall(1e-2)
    before = state(model)
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
    assert max(float(d.max()) for d in apart(model, before).values()) <= 1e-2
    # Of a first run nothing needs to be kept: its centre is the reference, which the run keeps.
    first = NormBall(1e-2)
    with editing(forecaster(), [first]) as edit:
        edit.before_step()
        assert first.state() == {"centres": {}}


def test_sharded_weights_are_bounded_on_every_shard(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        before, after = torch.randn(6, 4), torch.randn(6, 4)
        for norm in ("linf", "l2"):
            ball, whole = NormBall(1e-2, norm=norm), NormBall(1e-2, norm=norm)
            moved = {"w": distribute_tensor(after, mesh, [Shard(0)])}
            found = ball.constrain(moved, {"w": distribute_tensor(before, mesh, [Shard(0)])})["w"]
            assert torch.equal(found.full_tensor(), whole.constrain({"w": after}, {"w": before})["w"])
            assert found.placements == (Shard(0),)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "wrong", [{"radius": 0.0}, {"radius": float("inf")}, {"norm": "l1"}, {"per": "row"}, {"anchor": "first"}]
)
def test_arguments_out_of_bounds_are_refused(wrong):
    with pytest.raises(EditError, match=f"NormBall: {next(iter(wrong))}=.* is out of bounds"):
        NormBall(**{"radius": 1e-3, **wrong})
