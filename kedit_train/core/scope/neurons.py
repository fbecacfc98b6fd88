"""Rows and columns of weights: which dimension counts neurons, and which bias belongs to which weight."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kedit_train.errors import EditError

Granularity = Literal["element", "row", "column"]
# "scored": by its own scores, along a dimension (None: entry by entry); "as_matrix": like the matrix that the bias
# belongs to; "frozen": it has no such neurons.
Unit = tuple[Literal["scored", "as_matrix", "frozen"], int | None]


def output_dim(module: nn.Module) -> int:
    """Return the dimension of a module's weight that counts its outputs.

    It is the first, except for the ``Conv1D`` of GPT-2 and for transposed convolutions.
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
    """Return how a parameter divides into the units that a mask keeps or leaves out as a whole.

    A row is an output neuron together with its entry of the bias. A column is an input neuron; a bias has none.
    Entries of other vectors (norms) count as rows and as columns.

    Args:
        model: the model that has the parameter.
        name: name of the parameter.
        granularity: "element", "row" or "column".
        scope: names of the parameters in the scope.

    Returns:
        (rule, dimension), see ``Unit``. For "as_matrix" the dimension is that of the matrix.

    Raises:
        EditError: rows or columns are requested of a stack of matrices.
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
            f"{name} has the shape {list(parameter.shape)}, where it is unknown which dimension is a {granularity}; "
            'use granularity="element"'
        )
    rows = output_dim(module)
    return "scored", rows if granularity == "row" else 1 - rows
