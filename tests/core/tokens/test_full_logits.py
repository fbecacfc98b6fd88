"""The logits of training steps, for trainers that read them: SFTTrainer, in versions of TRL without a fused head."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kedit_train.core import EditRun, Host
from kedit_train.core.tokens.active_examples import ActiveExamples
from kedit_train.core.tokens.loss_head import LossHead


def batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, 7, 11, 13, 0], [2, 4, 8, 16, 32], [9, 8, 3, 0, 0]])
    real = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    labels = torch.where((torch.arange(5) > 1) & (real == 1), ids, -100)
    return {"input_ids": ids, "attention_mask": real, "labels": labels}


def own_logits(model: Any) -> torch.Tensor:
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    with torch.no_grad():
        return model(**inputs).logits.float()


@pytest.fixture
def made(request: pytest.FixtureRequest) -> Any:
    def make(model: Any) -> LossHead:
        run = EditRun(model, Host(object()))
        head = LossHead(run.head(), shares=lambda: 1, full_logits=True)
        request.addfinalizer(run.close)
        request.addfinalizer(head.remove)
        return head

    return make


# The logits of Gemma 2 have a soft cap, and those of Granite are divided by a number.
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_the_logits_of_a_step_are_those_of_the_model(tiny: Any, made: Any, family: str) -> None:
    model = tiny(family)
    logits, loss = own_logits(model), model(**batch()).loss
    made(model)
    output = model(**batch())
    torch.testing.assert_close(output.logits, logits, rtol=1e-5, atol=1e-5)
    assert not output.logits.requires_grad
    torch.testing.assert_close(output.loss, loss, rtol=1e-6, atol=1e-6)
    output.loss.backward()


def test_examples_that_were_left_out_have_logits_of_zero(tiny: Any, made: Any) -> None:
    model = tiny("llama")
    logits, head = own_logits(model), made(model)
    # With this probability, every example is learned after one step.
    head.filter = active = ActiveExamples(recheck=2, probability=0.0)
    whole = model(**batch()).logits
    torch.testing.assert_close(whole, logits, rtol=1e-5, atol=1e-5)
    learned = list(active.learned)
    assert len(learned) == 3
    del active.learned[learned[0]]
    output = model(**batch())
    # The first example is computed without the last column, which contains only padding.
    torch.testing.assert_close(output.logits[0, :4], logits[0, :4], rtol=1e-5, atol=1e-5)
    assert output.logits.shape == logits.shape
    assert not output.logits[1:].any()
    assert not output.logits[0, 4].any()
