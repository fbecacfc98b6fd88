"""TokenSmoothing is TokenLoss with OverTone, and a subclass of it works beside the callbacks that need a token loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kedit_train.callbacks import ActiveSet, ParameterScope, StopWhenEdited, TokenLoss, TokenSmoothing, editing


class MySmoothing(TokenSmoothing):
    """Somebody's own objective."""

    def score(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return super().score(logits * 1.0, labels)


def test_defaults_are_those_of_the_paper_for_lora():
    assert repr(TokenSmoothing()) == 'TokenSmoothing("overtone", label_weight=0.1, epsilon=0.05, n_sigma=0.5)'
    assert repr(TokenSmoothing("uniform")) == repr(TokenLoss("uniform")).replace("TokenLoss", "TokenSmoothing")


def test_it_is_token_loss_with_overtone_bit_for_bit(make, ids):
    model = make()
    gradients = []
    for loss in (TokenSmoothing(epsilon=0.2), TokenLoss("overtone", epsilon=0.2)):
        with editing(model, [loss]) as edit:
            edit.before_step()
            gradients.append(torch.autograd.grad(model(input_ids=ids, labels=ids).loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_subclass_works_beside_active_set(make, ids):
    model = make()
    with editing(model, [ParameterScope(modules="*"), MySmoothing(epsilon=1e6), ActiveSet(recheck=3)]) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=0.1)
        for _ in range(2):
            edit.before_step()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert edit.run.collect()["edit/active/examples_left_out"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [({"idle_steps": 2}, "no token had a loss above epsilon in 2"), ({"loss": 1e7, "loss_steps": 1}, "is below 1e+07")],
)
def test_a_subclass_works_beside_stop_when_edited(make, ids, rule, reason):
    model = make()
    stop = StopWhenEdited(**{"loss": None, **rule})
    with editing(model, [ParameterScope(modules="*"), MySmoothing(epsilon=1e6), stop]) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=0.1)
        for _ in range(2):
            edit.before_step()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert stop.reason is not None
    assert reason in stop.reason
