"""The arguments of callbacks as plain values."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance.settings import ALL

from kedit_train import EditDataset, world
from kedit_train.callbacks import EditMetrics, KLLocality, NormBall, ParameterScope
from kedit_train.core.callback_arguments import callback_arguments, plain

EDITS = EditDataset(world.edits(n=4), name="mine")


@pytest.mark.parametrize("name", ALL)
def test_every_argument_of_every_callback_is_found(name: str) -> None:
    for callback in ALL[name](EDITS):
        (arguments,) = callback_arguments([callback]).values()
        assert list(arguments) == list(inspect.signature(type(callback)).parameters)
        assert json.loads(json.dumps(arguments)) == arguments


def test_values_are_those_that_were_given() -> None:
    given = [
        ParameterScope(layers=[2, "0.3-0.5"], modules="mlp"),
        KLLocality(texts=[f"text {n}" for n in range(30)], weight=0.5),
        EditMetrics(EDITS, every_n_steps=7),
        NormBall(0.1),
        NormBall(0.2),
    ]
    found = callback_arguments(given)
    assert list(found) == ["ParameterScope", "KLLocality", "EditMetrics", "NormBall", "NormBall 2"]
    assert found["ParameterScope"] == {"layers": [2, "0.3-0.5"], "modules": "mlp", "full_precision": True}
    assert (found["KLLocality"]["weight"], found["KLLocality"]["teacher"]) == (0.5, None)
    assert found["KLLocality"]["texts"]["source"] == "list of 30 items"
    assert found["EditMetrics"]["edits"] == {"name": "mine", "hash": EDITS.hash, "edits": 4}
    assert found["EditMetrics"]["evaluation"]["batch_size"] == 64
    assert (found["NormBall"]["radius"], found["NormBall 2"]["radius"]) == (0.1, 0.2)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Path("a") / "b", str(Path("a") / "b")),
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        ([np.int64(2)], [2]),
        (torch.bfloat16, "torch.bfloat16"),
        (list(EDITS), {"name": "edits", "hash": EDITS.hash, "edits": 4}),
        ([], []),
        ({"a": (1, None)}, {"a": [1, None]}),
        (dict.fromkeys(range(21)), "dict of 21 items"),
        (torch.zeros(3), "Tensor"),
        (torch.nn.Linear(1, 1), "Linear"),
        (len, "builtin_function_or_method"),
    ],
)
def test_other_values_are_described(value: Any, expected: Any) -> None:
    assert plain(value) == expected
    assert type(plain(value)) is type(expected)
