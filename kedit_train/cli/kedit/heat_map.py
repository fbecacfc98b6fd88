"""Draw a delta: the size of the change of each tensor, and heat maps of the matrices with the largest changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kedit_train.errors import EditError
from kedit_train.evaluation.reporting.layer_drift import layer_of
from kedit_train.evaluation.reporting.plots import new_figure, save_figure

# The maximum number of panels, and the maximum number of blocks along each side of a panel.
PANELS, BLOCKS = 6, 128


def heat_map(delta: Any, path: Path) -> Path:
    """Write a PNG with heat maps of the matrices with the largest changes. Up to six matrices are shown.

    If some changed tensors have no heat map, an overview at the top shows the norm of the change of every tensor, by
    layer and module.

    Args:
        delta: an :class:`~kedit_train.delta.EditDelta`.
        path: the PNG file to write.

    Raises:
        EditError: the delta changes no floating-point tensor, or matplotlib is not installed.
    """
    differences = {name: delta.difference(name) for name, c in delta.changes.items() if c.dtype.is_floating_point}
    norms = {name: float(value.double().norm()) for name, value in differences.items()}
    matrices = sorted((n for n, v in differences.items() if v.ndim == 2 and v.numel()), key=lambda n: -norms[n])
    if not norms:
        raise EditError("the delta changes no floating-point tensor, so a heat map would be empty; remove --png.")
    shown = matrices[:PANELS]
    columns = max(1, min(3, len(shown)))
    below = -(-len(shown) // columns)
    overview = len(norms) > len(shown)
    grid, names, layers = _by_layer(norms)
    tall = max(1.6, 0.25 * len(layers)) + 1.6 if overview else 0.0
    picture = new_figure(max(6.4, 4.2 * columns), tall + 3.6 * below)
    heights = ([tall] if overview else []) + [3.6] * below
    cells = picture.add_gridspec(len(heights), columns, height_ratios=heights)
    if overview:
        axes = picture.add_subplot(cells[0, :])
        image = axes.imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0.0)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_yticks(range(len(layers)), layers)
        axes.set_title(f"norm of the change, all {len(norms)} tensors (white: unchanged)", fontsize=10)
        axes.set_ylabel("layer")
        picture.colorbar(image, ax=axes)
    blocks = {name: _blocks(differences[name]).numpy() for name in shown}
    # One scale for all panels makes them comparable.
    largest = max((float(values.max()) for values in blocks.values()), default=0.0)
    for place, name in enumerate(shown):
        axes = picture.add_subplot(cells[place // columns + overview, place % columns])
        rows, width = differences[name].shape
        image = axes.imshow(
            blocks[name],
            aspect="auto",
            cmap="magma",
            interpolation="nearest",
            extent=(0, width, rows, 0),
            vmin=0.0,
            vmax=largest or 1.0,
        )
        axes.set_title(f"{_short(name)}\nnorm {norms[name]:.3g}", fontsize=9)
        axes.set_xlabel("input")
        axes.set_ylabel("output")
        picture.colorbar(image, ax=axes)
    which = (
        f"the {len(shown)} most changed of {len(matrices)} matrices" if len(shown) < len(matrices) else "every matrix"
    )
    if shown:
        picture.supxlabel(f"panels: root mean square of the change, {which}", fontsize=10)
    return save_figure(picture, path)


def _blocks(difference: Tensor) -> Tensor:
    """Split a matrix into a grid of at most 128 x 128 blocks, and return the root mean square of each block.

    Every entry of the matrix belongs to a block, so no change is lost.
    """
    rows, columns = difference.shape
    shape = (min(rows, BLOCKS), min(columns, BLOCKS))
    squares = difference.float().square()[None, None]
    return torch.nn.functional.adaptive_avg_pool2d(squares, shape)[0, 0].sqrt()


def _by_layer(norms: dict[str, float]) -> tuple[Any, list[str], list[str]]:
    """Arrange the norms of the changes in a table with one row per layer and one column per module.

    The first number in the name of a tensor is its layer. The norm of an unchanged tensor is NaN.

    Args:
        norms: name of a tensor -> norm of its change.

    Returns:
        The table [layers, modules], the labels of its columns, and the labels of its rows.
    """
    places = {}
    for name, norm in norms.items():
        layer = layer_of(name)
        module = _short(name if layer is None else name.partition(f".{layer}.")[2])
        places[-1 if layer is None else layer, module] = norm
    layers, modules = (sorted({place[i] for place in places}) for i in (0, 1))
    grid = [[places.get((layer, module), float("nan")) for module in modules] for layer in layers]
    return grid, modules, ["no layer" if layer == -1 else str(layer) for layer in layers]


def _short(name: str) -> str:
    return name.removeprefix("model.").removesuffix(".weight")
