"""Unusual uses of a plain loop: constraints hold, or there is an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kedit_train.callbacks import EditCallback, GradientMask, NormBall, ParameterScope, editing
from kedit_train.errors import EditError

X = torch.ones(1, 4)


class Pull(EditCallback):
    """A penalty whose gradient is 1 everywhere."""

    penalizes = True

    def penalty(self, run):
        return sum(p.sum() for p in run.scope.values())


def sgd(edit, lr=0.1):
    return torch.optim.SGD(edit.parameters(), lr=lr)


def backward(model):
    (model(X) - 1).square().sum().backward()


@pytest.mark.parametrize("started", [True, False])
def test_a_second_edit_inside_an_edit_of_the_same_model_is_an_error_and_the_first_goes_on(started):
    model = nn.Linear(4, 4)
    before = model.weight.detach().clone()
    with editing(model, [NormBall(1e-3)]) as first:
        optimizer = sgd(first)
        if started:
            first.before_step()
        problem = (
            r"^GradientMask: this model can be in only one edit at a time, but an edit with NormBall has not ended"
        )
        with pytest.raises(EditError, match=problem), editing(model, [GradientMask("random", density=0.5)]):
            pass
        first.before_step()
        backward(model)
        optimizer.step()
    assert 0 < float((model.weight.detach() - before).abs().max()) <= 1.0001e-3
    # After the end of the first edit, another one may begin.
    with editing(model, [NormBall(1e-3)]) as second:
        second.before_step()


def test_a_second_edit_with_the_same_callback_ends_the_first():
    ball = NormBall(1e-3)
    with editing(nn.Linear(4, 4), [ball]) as first, editing(nn.Linear(4, 4), [ball]) as second:
        second.before_step()
        with pytest.raises(EditError, match="taken over one of the callbacks"):
            first.before_step()


@pytest.mark.parametrize("between", ["before the forward pass", "before the backward pass"])
def test_zero_grad_after_before_step_is_an_error(between):
    model = nn.Linear(4, 4)
    with editing(model, [Pull()]) as edit:
        optimizer = sgd(edit)
        edit.before_step()
        loss = None
        if between == "before the backward pass":
            loss = model(X).square().sum()
        optimizer.zero_grad()
        (model(X).square().sum() if loss is None else loss).backward()
        with pytest.raises(EditError, match="zero_grad"):
            optimizer.step()


@pytest.mark.filterwarnings("ignore:3 training steps began, but no optimizer")
@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_penalty_is_computed_again_after_a_skipped_step(set_to_none):
    model = nn.Linear(4, 4)
    with editing(model, [Pull()]) as edit:
        optimizer = sgd(edit)
        for _ in range(3):
            edit.before_step()
            assert all(bool((p.grad == 1).all()) for p in edit.parameters())
            # A bad batch is skipped.
            optimizer.zero_grad(set_to_none=set_to_none)


def test_before_step_twice_adds_the_penalty_once():
    model = nn.Linear(4, 4)
    with editing(model, [Pull()]) as edit:
        edit.before_step()
        edit.before_step()
        assert all(bool((p.grad == 1).all()) for p in edit.parameters())


def test_constraints_are_restored_after_writing_to_the_weights():
    torch.manual_seed(0)
    model = nn.Linear(4, 4, bias=False)
    before = model.weight.detach().clone()

    def train():
        with editing(model, [GradientMask("random", density=0.25), NormBall(1e-3)]) as edit:
            optimizer = sgd(edit)
            edit.before_step()
            backward(model)
            optimizer.step()
            with torch.no_grad():
                model.weight -= 0.1

    with pytest.warns(UserWarning, match="other code has changed .* outside of the optimizer steps"):
        train()
    moved = model.weight.detach().view(torch.int32) != before.view(torch.int32)
    assert int(moved.sum()) == 4
    assert float((model.weight.detach() - before).abs().max()) <= 1e-3


def test_weights_within_their_constraints_are_not_changed_at_the_end():
    model = nn.Linear(4, 4, bias=False)
    with editing(model, [NormBall(1e-3)]) as edit:
        optimizer = sgd(edit)
        edit.before_step()
        backward(model)
        optimizer.step()
        kept = model.weight.detach().clone()
        model.load_state_dict({"weight": kept})
    assert torch.equal(model.weight, kept)


def test_a_class_or_a_name_instead_of_an_object_is_an_error():
    with pytest.raises(EditError, match=r"ParameterScope is a class, but callbacks must be instances"):  # noqa: SIM117
        with editing(nn.Linear(2, 2), [ParameterScope]):
            pass
    with pytest.raises(EditError, match="model must be a loaded model, got 'gpt2'"):  # noqa: SIM117
        with editing("gpt2", [NormBall(1e-3)]):
            pass


class ReadsInnerWeight(nn.Module):
    """Calls F.linear with the weight of an inner module that it never calls, as attention does."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.linear(x.to(self.inner.weight.dtype), self.inner.weight, self.inner.bias)


@pytest.mark.parametrize("make", [ReadsInnerWeight, lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)])
def test_a_half_precision_weight_that_another_module_reads_trains_in_fp32(make):
    torch.manual_seed(0)
    model = nn.Sequential(make()).bfloat16()
    x = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    with editing(model, [ParameterScope(modules="*")]) as edit:
        assert {p.dtype for p in edit.parameters()} == {torch.float32}
        optimizer = sgd(edit)
        edit.before_step()
        model(x).float().square().sum().backward()
        assert all(p.grad is not None for p in edit.parameters())
        optimizer.step()
        with pytest.warns(UserWarning, match="are saved in fp32"):
            saved = _saved(model)
        copy = torch.load(saved, weights_only=False)
        # The saved model is an ordinary model in fp32.
        assert copy(x.float()).dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def _saved(model):
    import io

    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_processes_that_are_not_connected_are_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with editing(nn.Linear(2, 2), [NormBall(1e-3)]) as edit, pytest.raises(EditError, match="trains its own model"):
        edit.before_step()


def test_an_editing_block_that_is_entered_again_is_an_error():
    block = editing(nn.Linear(4, 4), [NormBall(1e-3)])
    with block as edit:
        edit.before_step()
    message = r"^editing: an editing\(\) block can be entered only once; call editing\(\) again"
    with pytest.raises(EditError, match=message), block:
        pass
