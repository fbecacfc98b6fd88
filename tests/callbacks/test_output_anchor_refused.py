"""OutputAnchor: wrong uses are errors of one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from callbacks.forecaster import KEPT, Forecaster, descend, made
from torch import Tensor, nn

from kedit_train.callbacks import OutputAnchor
from kedit_train.errors import EditError


class Changing(Forecaster):
    """Returns forecasts of another length after some calls."""

    calls = 0

    def forward(self, windows: Tensor, targets: Tensor | None = None) -> Any:
        self.calls += 1
        return super().forward(windows)[:, : 2 if self.calls > 7 else 3]


class Detached(Forecaster):
    def forward(self, windows: Tensor, targets: Tensor | None = None) -> Any:
        return super().forward(windows).detach() if not self.training else super().forward(windows)


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "no inputs": (
        made,
        {"inputs": []},
        "inputs must be a list of model inputs with one item per forward pass .* got an empty list",
    ),
    "None": (made, {"inputs": None}, "inputs must be a list .* got NoneType"),
    "an iterator": (made, {"inputs": iter([])}, r"got an iterator without items \(it can be read only once\)"),
    "texts": (made, {"inputs": ["a text"]}, "inputs must be a list .* got items of type str"),
    "one tensor": (made, {"inputs": KEPT[0]}, r"got one tensor of shape \(4, 6\); pass inputs=\[tensor\]"),
    "a text file": (made, {"inputs": "keep.txt"}, "or the path of a .safetensors file, got 'keep.txt'"),
    "a missing file": (made, {"inputs": "none.safetensors"}, "none.safetensors"),
    "a wrong shape": (made, {"inputs": [torch.zeros(2, 3)]}, r"cannot be called with inputs\[0\] \(RuntimeError"),
    "an object": (
        lambda: made(output="object"),
        {},
        r"output must select a tensor of floats from the output of Forecaster for inputs\[0\], got ModelOutput \(the "
        r"output has loss, forecast\)",
    ),
    "a wrong name": (lambda: made(output="object"), {"output": "mean"}, r"got NoneType \(the output has loss, fo"),
    "a wrong index": (lambda: made(output="tuple"), {"output": 2}, r"got NoneType \(the output is a tuple of 2\)"),
    "an empty tensor": (made, {"inputs": [torch.zeros(0, 6)]}, r"output for inputs\[0\] is empty \(shape \(0, 3\)\)"),
    "a function that fails": (
        made,
        {"output": lambda output: output.forecast},
        r"the function output= failed for the output of Forecaster for inputs\[0\] \(AttributeError: .*'forecast'",
    ),
    "an index of a tensor": (made, {"output": 0}, "is a tensor, so output= must be None or a function, got 0; leave "),
    "a name in a tensor": (
        made,
        {"output": "p"},
        "is a tensor, so output= must be None or a function, got 'p'; leave ",
    ),
    "integers": (made, {"output": lambda output: output.long()}, "got a tensor of torch.int64"),
    "NaN": (made, {"inputs": [torch.full((2, 6), float("nan"))]}, r"inputs\[0\] contains NaN or infinite values"),
    "no module": (
        made,
        {"module": "body"},
        "module must be the name of a submodule .* use one of hidden, dropout, head",
    ),
    "another shape": (Changing, {}, r"must keep the shape \(4, 3\) .* before training, got \(4, 2\)"),
    "no gradient": (Detached, {}, "the output has no gradient with respect to the parameters in scope"),
    "distance": (made, {"distance": "mae"}, 'distance must be "mse", "quantile" or "kl", got \'mae\''),
    "weight": (made, {"weight": -1.0}, "weight must be >= 0, got -1.0"),
    "an infinite weight": (made, {"weight": float("inf")}, "weight must be finite and >= 0, got inf"),
    "batch_size": (made, {"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
    "output": (made, {"output": 1.5}, "output must be a name, an index, a function of the output, or None, got 1.5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_uses_are_errors_of_one_line(name):
    build, options, message = REFUSED[name]
    arguments: dict[str, Any] = {"inputs": KEPT, **options}
    with pytest.raises(EditError, match=rf"^OutputAnchor: .*{message}") as error:
        descend(build(), [OutputAnchor(**arguments)], 3)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 300
