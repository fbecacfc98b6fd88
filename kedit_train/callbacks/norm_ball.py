"""NormBall: keep the weights within a fixed distance of their values before the edit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from kedit_train.arguments import above, check_arguments, one_of, optional
from kedit_train.callbacks.base import EditCallback
from kedit_train.core.drift.anchor_weights import Anchor, AnchorWeights
from kedit_train.core.drift.shards import local_part, map_local, reduce_over_shards
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError, warn
from kedit_train.functional.norm_balls import distance_squared, linf_bounds, norm_squared, shrink, shrink_factor


class NormBall(EditCallback):
    """Keep the weights in the scope inside a norm ball around their values before the edit.

    The weights are projected into the ball after every optimizer step. This is the constrained fine-tuning of Zhu et
    al. The bound is exact, because it is checked in fp64 on the weights in their stored dtype. ``NormBall`` works with
    any module and any optimizer.

    If the radius is smaller than the spacing between neighboring values of a dtype, a weight cannot move at all. For
    example, bf16 values near 0.1 are 4.9e-4 apart. A warning then reports the fraction of weights that cannot move. In
    this case, load the model in fp32.

    The ball is applied after ``WeightAnchor``, ``LowCurvature`` and ``NullSpace``, and before ``GradientMask``.
    ``LowCurvature`` and ``NullSpace`` project the change of a weight into a subspace. An L2 ball scales the whole
    change, so the change stays in this subspace up to rounding. An L-infinity ball clips each entry, so the change
    stays in the subspace only approximately. ``edit/drift/null_space_leak`` reports the error for ``NullSpace``.
    ``GradientMask`` only sets changes to zero, so the bound of the ball stays exact.

    Args:
        radius: maximum distance, in the units of the weights, > 0. None (default) sets the radius by ``fraction``.
        norm: "linf" (default) bounds the change of each entry, "l2" bounds the Euclidean norm of the change.
        per: for "l2": "tensor" (default) bounds the change of each tensor, "scope" bounds the change of all tensors in
            the scope together. Ignored for "linf".
        anchor: center of the ball in consecutive runs on one model. "base" (default): the weights before the first run
            of this instance, so use one instance for all runs. "previous": the weights before the current run. The
            changes of several runs then add up.
        fraction: sets the radius if ``radius`` is None. For "linf", the radius of a tensor is ``fraction`` times the
            root mean square of the tensor before the edit. For "l2", the radius is ``fraction`` times the norm of the
            tensor before the edit. For "l2" with ``per="scope"``, the radius is ``fraction`` times the norm of all
            tensors together. Default 0.6.

    Logs ``edit/drift/ball``: the distance of a tensor from the center, divided by the radius. The logged value is the
    maximum over all tensors. For "linf", also logs ``edit/drift/at_bound``: the fraction of entries at their bound.

    Raises:
        EditError: an argument is invalid; a run starts outside the ball (with ``anchor="base"``); or a tensor is all
            zeros and the radius is given by ``fraction``.

    References:
        Modifying Memories in Transformer Models, arXiv 2012.00363.

    Example:
        >>> import torch
        >>> from kedit_train.callbacks import NormBall, editing
        >>> model = torch.nn.Linear(4, 2)
        >>> before = model.weight.detach().clone()
        >>> with editing(model, [NormBall(0.01)]) as edit:
        ...     optimizer = torch.optim.Adam(edit.parameters(), lr=0.1)
        ...     edit.before_step()
        ...     model(torch.ones(1, 4)).sum().backward()
        ...     optimizer.step()
        >>> bool((model.weight - before).abs().max() <= 0.01)
        True
    """

    order = 44
    constrains = True

    def __init__(
        self,
        radius: float | None = None,
        *,
        norm: Literal["linf", "l2"] = "linf",
        per: Literal["tensor", "scope"] = "tensor",
        anchor: Anchor = "base",
        fraction: float = 0.6,
    ) -> None:
        check_arguments(
            self,
            radius=(radius, optional(above(0))),
            norm=(norm, one_of(["linf", "l2"])),
            per=(per, one_of(["tensor", "scope"])),
            anchor=(anchor, one_of(["base", "previous"])),
            fraction=(fraction, above(0)),
        )
        self.radius = radius
        self.norm = norm
        self.per = per
        self.anchor = anchor
        self.fraction = fraction
        self._anchors = AnchorWeights(anchor)
        self._radii: dict[str, float] = {}
        self._bounds: dict[str, tuple[Tensor, Tensor]] = {}

    def attach(self, run: EditRun) -> None:
        self._bounds, self._radii = {}, {}
        stored = self._anchors.start_run(run)
        self._set_radii(stored)
        self._check_start(run, stored)

    def constrain(self, weights: dict[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._anchors.register(weights, reference)
        if self._radii.keys() != weights.keys():
            self._set_radii(weights)
        if self.norm == "linf":
            # The dtype changes at the end of training, when a scope that was trained in fp32 is rounded.
            if any(name not in self._bounds or self._bounds[name][0].dtype != w.dtype for name, w in weights.items()):
                self._set_bounds(weights)
            return {name: self._clip(name, weight) for name, weight in weights.items()}
        squares = self._squared_distances(weights)
        factors = {name: shrink_factor(square**0.5, self._radii[name]) for name, square in squares.items()}
        return {
            name: w if factors[name] == 1.0 else self._shrink(name, w, factors[name]) for name, w in weights.items()
        }

    def metrics(self, run: EditRun) -> dict[str, float]:
        # Radii and bounds exist from the first step on.
        measured = self._bounds if self.norm == "linf" else self._radii
        stored = self._anchors.names()
        weights = {name: p.detach() for name, p in run.scope.items() if name in stored and name in measured}
        if not weights:
            return {}
        if self.norm == "l2":
            squares = self._squared_distances(weights)
            return {"edit/drift/ball": max(square**0.5 / self._radii[name] for name, square in squares.items())}
        used, at_bound, entries = 0.0, 0, 0
        for name, weight in weights.items():
            lower, upper = self._bounds[name]
            local, center = local_part(weight), local_part(self._anchors[name])
            distance = (local - center).abs().max() if local.numel() else local.new_zeros(())
            used = max(used, float(reduce_over_shards(distance.float(), weight, "max")) / self._radii[name])
            at_bound += int(reduce_over_shards(((local == lower) | (local == upper)).sum(), weight, "sum"))
            entries += weight.numel()
        return {"edit/drift/ball": used, "edit/drift/at_bound": at_bound / entries}

    def state(self) -> dict[str, Any]:
        return {"anchor_weights": self._anchors.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self._anchors.load_state(state["anchor_weights"])
        self._radii = {}

    def detach(self, run: EditRun) -> None:
        self._bounds, self._radii = {}, {}
        self._anchors.end_run()

    def _set_radii(self, names: Iterable[str]) -> None:
        """Set the radius of each tensor. With ``per="scope"``, all tensors have the same radius."""
        if self.radius is not None:
            self._radii = dict.fromkeys(names, self.radius)
            return
        squares, sizes = {}, {}
        for name in names:
            anchor = self._anchors[name]
            squares[name] = float(reduce_over_shards(norm_squared(local_part(anchor)), anchor, "sum"))
            sizes[name] = anchor.numel()
        if self.norm == "l2" and self.per == "scope":
            squares = dict.fromkeys(squares, sum(squares.values()))
        self._radii = {
            name: self.fraction * (square / (sizes[name] if self.norm == "linf" else 1)) ** 0.5
            for name, square in squares.items()
        }
        if zeros := [name for name, radius in self._radii.items() if radius == 0.0]:
            raise EditError(
                f"{zeros[0]} is all zeros before the edit, so fraction= gives it a radius of 0; set radius=, or remove "
                "the parameter from the scope."
            )

    def _set_bounds(self, weights: Mapping[str, Tensor]) -> None:
        fixed, entries = 0, 0
        for name, weight in weights.items():
            lower, upper = linf_bounds(local_part(self._anchors[name]).to(weight.dtype), self._radii[name])
            self._bounds[name] = lower, upper
            fixed, entries = fixed + int((lower == upper).sum()), entries + lower.numel()
        if fixed > 0.01 * entries:
            dtypes = ", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()}))
            advice = "load the model in fp32, or use" if self._moves_in_fp32(weights) else "use"
            warn(
                f"{fixed / entries:.0%} of the weights cannot move, because {dtypes} values near these weights are "
                f"farther apart than the radius of {min(self._radii.values()):g}; {advice} a larger radius."
            )

    def _moves_in_fp32(self, weights: Mapping[str, Tensor]) -> bool:
        """Return whether any entry of a half-precision tensor could move if the tensor were fp32."""
        narrow = [name for name, weight in weights.items() if weight.dtype.itemsize < 4]
        bounds = [linf_bounds(local_part(self._anchors[name]).float(), self._radii[name]) for name in narrow]
        return any(bool((lower != upper).any()) for lower, upper in bounds)

    def _clip(self, name: str, weight: Tensor) -> Tensor:
        return map_local(lambda local: torch.clamp(local, *self._bounds[name]), weight)

    def _shrink(self, name: str, weight: Tensor, factor: float) -> Tensor:
        return map_local(lambda local: shrink(local, local_part(self._anchors[name]).to(local.dtype), factor), weight)

    def _squared_distances(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Return each tensor's squared L2 distance from the center. With ``per="scope"``, each value is the total."""
        squares = {}
        for name, weight in weights.items():
            square = distance_squared(local_part(weight), local_part(self._anchors[name]).to(weight.dtype))
            squares[name] = float(reduce_over_shards(square, weight, "sum"))
        return dict.fromkeys(squares, sum(squares.values())) if self.per == "scope" else squares

    def _check_start(self, run: EditRun, stored: list[str]) -> None:
        """Raise an error if a run starts outside the ball. The first step would undo earlier changes."""
        distances, tolerances = {}, {}
        for name in stored:
            center, start = local_part(self._anchors[name]).double(), local_part(run.reference[name]).double()
            distances[name] = (start - center).abs()
            # A model that was saved in half precision between the runs has been rounded.
            tolerances[name] = torch.finfo(run.scope[name].dtype).eps * center.abs()
        if self.norm == "linf":
            outside = [n for n in stored if bool((distances[n] > self._radii[n] + tolerances[n]).any())]
        elif self.per == "tensor":
            outside = [n for n in stored if float(distances[n].norm()) > self._radii[n] + float(tolerances[n].norm())]
        else:
            total, tolerance = (
                sum(float(t.norm()) ** 2 for t in tensors.values()) ** 0.5 for tensors in (distances, tolerances)
            )
            outside = stored if stored and total > self._radii[stored[0]] + tolerance else []
        if outside:
            other_scope = " or with a different scope" if self.per == "scope" and self.norm == "l2" else ""
            raise EditError(
                f"{outside[0]} is outside the ball at the start of this run, because the model was changed without "
                f"this callback{other_scope}; create a new NormBall, or use anchor='previous'."
            )

    def __repr__(self) -> str:
        size = f"radius={self.radius}" if self.radius is not None else f"fraction={self.fraction}"
        return f"NormBall({size}, norm={self.norm!r}, per={self.per!r}, anchor={self.anchor!r})"
