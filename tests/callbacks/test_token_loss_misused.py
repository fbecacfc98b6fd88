"""TokenLoss in steps that it cannot handle: without labels, or with several optimizers."""

from __future__ import annotations

import pytest
import torch
from callbacks.test_token_loss import OPTIMIZERS, step
from torch.nn import functional as F

from kedit_train import world
from kedit_train.callbacks import ParameterScope, TokenLoss, TokenSmoothing, editing
from kedit_train.errors import EditError


def test_a_step_without_labels_is_an_error(make, ids):
    model = make()
    with editing(model, [TokenSmoothing()]) as edit:
        optimizer = OPTIMIZERS["sgd"](edit.parameters())
        step(edit, model, optimizer, input_ids=ids, labels=ids)
        edit.before_step()
        F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        with pytest.raises(EditError) as error:
            optimizer.step()
    assert str(error.value) == (
        "TokenSmoothing: the model was not called with labels= since the last optimizer step, so its loss was not "
        "replaced; call model(..., labels=labels) in the training step, and use the loss that the model returns."
    )


def test_several_optimizers_that_share_a_step_are_an_error(make, ids):
    model = make()
    with editing(model, [TokenLoss()]) as edit:
        half = len(edit.parameters()) // 2
        first, second = (OPTIMIZERS["sgd"](part) for part in (edit.parameters()[:half], edit.parameters()[half:]))
        edit.before_step()
        model(input_ids=ids, labels=ids).loss.backward()
        first.step()
        with pytest.raises(EditError, match=r"^TokenLoss: all parameters in scope must belong to one optimizer"):
            second.step()


def test_steps_without_a_label_are_one_warning():
    model, tokenizer = world.load()
    ids = torch.tensor([tokenizer("The baker kept a coin")["input_ids"]])
    with (
        pytest.warns(UserWarning, match=r"^TokenLoss: the batch of step 1 contains no token with a label") as found,
        editing(model, [ParameterScope(layers=2, modules="mlp.down_proj"), TokenLoss()], tokenizer=tokenizer) as edit,
    ):
        train_without_labels(model, ids, edit)
    assert len(found) == 1


def train_without_labels(model, ids, edit):
    optimizer = torch.optim.SGD(edit.parameters(), lr=0.1)
    for _ in range(2):
        edit.before_step()
        model(input_ids=ids, labels=torch.full_like(ids, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
