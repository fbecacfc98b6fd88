"""editing() reports every wrong argument in one line, before it changes the model."""

from __future__ import annotations

from typing import Any

import pytest
from core.small_loop import model
from torch import nn

from kedit_train.callbacks import ParameterScope, editing
from kedit_train.callbacks.hosts.loop import LoopHost
from kedit_train.core import EditRun
from kedit_train.errors import EditError


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (None, "callbacks must be a list of callbacks, got None."),
        ("NormBall", "callbacks must be a list of callbacks, got 'NormBall'."),
        (3, "callbacks must be a list of callbacks, got 3."),
        ([], "callbacks must not be empty; pass at least one callback."),
        *(
            (
                [ParameterScope(modules="0"), value],
                "each callback must be an instance of a class in kedit_train.callbacks or of your own subclass of "
                f"EditCallback, got {value!r}.",
            )
            for value in (None, "NormBall", [], 3)
        ),
        (
            ParameterScope(1),
            "callbacks must be a list, got ParameterScope(1, modules=None); write [ParameterScope(1, modules=None)].",
        ),
    ],
)
def test_callbacks_that_are_not_callbacks_are_an_error(callbacks: Any, message: str) -> None:
    net = model()
    with pytest.raises(EditError) as error, editing(net, callbacks):
        pass
    assert str(error.value) == f"editing: {message}"
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            ({"log_every_n_steps": value}, f"log_every_n_steps must be an integer >= 1, got {value!r}.")
            for value in (0, -1, 1.5, "a", None, float("nan"))
        ),
        *(
            ({"epoch_steps": value}, f"epoch_steps must be an integer >= 1, or None, got {value!r}.")
            for value in (0, "a", 2.5)
        ),
        ({"tokenizer": 3}, "tokenizer must be a tokenizer, a name or a path, or None, got 3."),
        ({"on_log": "log"}, "on_log must be a function, or None, got 'log'."),
    ],
)
def test_other_wrong_arguments_are_an_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(EditError) as error, editing(model(), [ParameterScope(modules="0")], **arguments):
        pass
    assert str(error.value) == f"editing: {message}"


def test_a_tokenizer_of_a_training_loop_that_is_not_one_is_an_error() -> None:
    run = EditRun(nn.Linear(1, 1), LoopHost(tokenizer=3))
    with pytest.raises(EditError, match=r"^tokenizer must be a tokenizer, a name or a path, got 3\.$"):
        run.tokenizer()
    run.close()
