"""Function transforms of torch are refused where a hook would fail inside of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kedit_train import world
from kedit_train.callbacks import NormBall, ParameterScope, PrefixCache, TokenLoss, editing
from kedit_train.errors import EditError

IDS = torch.arange(8).unsqueeze(0)


def gradients(callbacks: list[Any]) -> dict[str, Any]:
    model, tokenizer = world.load()
    scope = ParameterScope(layers=3, modules="mlp.down_proj.weight")
    with editing(model, [scope, NormBall(1e-2), *callbacks], tokenizer=tokenizer) as edit:
        edit.before_step()

        def loss(values: Any) -> torch.Tensor:
            return torch.func.functional_call(model, values, (), {"input_ids": IDS, "labels": IDS}).loss

        return torch.func.grad(loss)({name: p.detach() for name, p in edit.run.scope.items()})


@pytest.mark.parametrize("callbacks", [[TokenLoss("overtone")], [PrefixCache()]])
def test_a_transform_is_an_error_that_names_the_alternative(callbacks: list[Any]) -> None:
    with pytest.raises(
        EditError, match=r"inside a transform of torch\.func.*loss\.backward\(\) or torch\.autograd\.grad"
    ):
        gradients(callbacks)


def test_a_transform_works_with_constraints_only() -> None:
    assert gradients([])["model.layers.3.mlp.down_proj.weight"].any()
