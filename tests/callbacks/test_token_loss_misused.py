"""TokenLoss with arguments or callbacks that do not fit, and in steps without labels or with several optimizers."""

from __future__ import annotations

import pytest
import torch
from callbacks.test_token_loss import OPTIMIZERS, step
from torch.nn import functional as F

from kedit_train import world
from kedit_train.callbacks import BatchAnchor, ParameterScope, TokenLoss, TokenSmoothing, editing
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


def test_prompt_last_is_refused_beside_an_anchor_on_the_batch(make):
    callbacks = [TokenLoss("prompt_last"), BatchAnchor()]
    with editing(make(), callbacks) as edit, pytest.raises(EditError, match=r"TokenLoss: .* or remove BatchAnchor"):
        edit.before_step()


@pytest.mark.parametrize(
    ("objective", "argument"),
    [
        ("cross_entropy", {"label_weight": 0.5}),
        ("dft", {"label_weight": 0.3}),
        ("uniform", {"n_sigma": 1.0}),
        ("prompt_last", {"n_sigma": 0.5}),
    ],
)
def test_an_argument_that_the_objective_does_not_use_is_refused(objective, argument):
    with pytest.raises(EditError) as error:
        TokenLoss(objective, **argument)
    ((name, value),) = argument.items()
    assert str(error.value) == f'TokenLoss: objective="{objective}" does not use {name}={value}; remove this argument.'


@pytest.mark.parametrize("second", [TokenSmoothing(label_weight=0.2), TokenLoss()])
def test_two_token_losses_are_refused(make, second):
    with editing(make(), [TokenSmoothing(), second]) as edit, pytest.raises(EditError) as error:
        edit.before_step()
    assert str(error.value).endswith(
        ": another callback of this run already replaces the training loss; keep only one of the two callbacks."
    )


def test_a_module_without_a_language_model_is_refused():
    with pytest.raises(EditError, match=r"^TokenLoss: the model must be a causal language model, got Linear, which"):
        editing(torch.nn.Linear(2, 2), [TokenLoss()]).__enter__()


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        *(({"label_weight": value}, "in [0, 1], or None") for value in (-0.1, 1.1, float("nan"))),
        ({"epsilon": -1e-9}, ">= 0, or None"),
        ({"n_sigma": 0.0}, "> 0 (inf turns the filter off), or None"),
        ({"reduction": "mean"}, '"token" or "sample"'),
        ({"objective": "soft"}, '"cross_entropy", "overtone", "uniform", "dft" or "prompt_last"'),
    ],
)
def test_arguments_out_of_range_are_refused(argument, expected):
    with pytest.raises(EditError) as error:
        TokenLoss(**{"objective": "overtone"} | argument)
    ((name, value),) = argument.items()
    assert str(error.value) == f"TokenLoss: {name} must be {expected}, got {value!r}."
