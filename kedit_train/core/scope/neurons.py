"""Which dimension of a weight counts neurons, and which bias belongs to which weight."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kedit_train.errors import EditError

Granularity = Literal["element", "row", "column"]
# "own": scored along a dimension (None: entry by entry); "follows": as its matrix; "held": it has no such neurons.
Place = tuple[Literal["own", "follows", "held"], int | None]


def output_dim(module: nn.Module) -> int:
    """Where a module's weight counts its outputs: first, but last in GPT-2's ``Conv1D`` and transposed convolutions."""
    return 1 if isinstance(module, Conv1D) or getattr(module, "transposed", False) else 0


def matrix_of(bias: str) -> str:
    """The weight that a bias goes with: "fc.bias" -> "fc.weight", "rnn.bias_hh_l0" -> "rnn.weight_hh_l0"."""
    owner, dot, leaf = bias.rpartition(".")
    return owner + dot + leaf.replace("bias", "weight")


def place(model: nn.Module, name: str, granularity: Granularity, scope: Container[str]) -> Place:
    """Say how a parameter divides into units.

    A row is an output neuron, with its entry of the bias; a column an input neuron, of which a bias has none. Entries
    of other vectors (norms) are neurons of both kinds.

    Returns:
        (kind, dimension); for "follows" the dimension is that of the matrix.

    Raises:
        EditError: rows or columns are asked of a stack of matrices.
    """
    owner, _, leaf = name.rpartition(".")
    parameter = model.get_parameter(name)
    if granularity == "element" or parameter.ndim == 0:
        return "own", None
    module = model.get_submodule(owner)
    if parameter.ndim == 1:
        matrix: Any = getattr(module, matrix_of(leaf), None)
        if "bias" not in leaf or not isinstance(matrix, Tensor) or matrix.ndim == 1:
            return "own", 0
        if granularity == "column":
            return "held", None
        return ("follows", output_dim(module)) if matrix_of(name) in scope else ("own", 0)
    if parameter.ndim > 2 and not isinstance(module, nn.modules.conv._ConvNd):
        raise EditError(
            f"{name} has shape {list(parameter.shape)}, of which no dimension is known to be a {granularity}; use "
            "granularity='element'"
        )
    rows = output_dim(module)
    return "own", rows if granularity == "row" else 1 - rows
