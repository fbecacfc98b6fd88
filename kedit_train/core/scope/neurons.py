"""Find which dimension of a weight has one entry per neuron, and which weight a bias belongs to."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kedit_train.errors import EditError

Granularity = Literal["element", "row", "column"]
# How a parameter is masked, and along which dimension (None: entry by entry). "scored" uses the parameter's own scores.
# "as_matrix" gives a bias the mask of the weight matrix that the bias belongs to. "frozen" lets no entry change: this
# is the rule for a bias if columns are masked, because a bias has no input neurons.
Unit = tuple[Literal["scored", "as_matrix", "frozen"], int | None]


def output_dim(module: nn.Module) -> int:
    """Return the output dimension of a module's weight.

    The output dimension is 1 for the ``Conv1D`` of GPT-2 and for transposed convolutions, and 0 for all other modules.
    """
    return 1 if isinstance(module, Conv1D) or getattr(module, "transposed", False) else 0


def matrix_of(bias: str) -> str:
    """Return the name of the weight that a bias belongs to.

    Example:
        >>> matrix_of("fc.bias"), matrix_of("rnn.bias_hh_l0")
        ('fc.weight', 'rnn.weight_hh_l0')
    """
    owner, dot, leaf = bias.rpartition(".")
    return owner + dot + leaf.replace("bias", "weight")


def unit_of(model: nn.Module, name: str, granularity: Granularity, scope: Container[str]) -> Unit:
    """Return how a mask selects entries, rows or columns of a parameter.

    A row contains the weights and the bias entry of one output neuron. A column contains the weights of one input
    neuron and no bias entry. In the weight of a norm, and in any other vector that is not the bias of a matrix, each
    entry is selected separately.

    Args:
        model: the model that contains the parameter.
        name: name of the parameter.
        granularity: "element", "row" or "column".
        scope: names of the parameters in the scope.

    Returns:
        A pair (rule, dimension), which ``Unit`` explains. With the rule "as_matrix", the parameter is a bias, and the
        dimension is the output dimension of its weight matrix.

    Raises:
        EditError: rows or columns are requested for a stack of matrices, such as fused experts.
    """
    owner, _, leaf = name.rpartition(".")
    parameter = model.get_parameter(name)
    if granularity == "element" or parameter.ndim == 0:
        return "scored", None
    module = model.get_submodule(owner)
    if parameter.ndim == 1:
        matrix: Any = getattr(module, matrix_of(leaf), None)
        if "bias" not in leaf or not isinstance(matrix, Tensor) or matrix.ndim == 1:
            return "scored", 0
        if granularity == "column":
            return "frozen", None
        return ("as_matrix", output_dim(module)) if matrix_of(name) in scope else ("scored", 0)
    if parameter.ndim > 2 and not isinstance(module, nn.modules.conv._ConvNd):
        raise EditError(
            f'the parameter {name!r} must be a matrix or a convolution for granularity="{granularity}", got the shape '
            f'{list(parameter.shape)}; use granularity="element", or remove this parameter from the scope.'
        )
    rows = output_dim(module)
    return "scored", rows if granularity == "row" else 1 - rows
