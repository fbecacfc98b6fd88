"""Project the change of linear weights, for ``NullSpace`` and ``LowCurvature``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from kedit_train.core.drift.gradient_projection import project_gradients
from kedit_train.core.drift.linear_layers import LinearLayer
from kedit_train.core.drift.shards import total
from kedit_train.errors import EditError
from kedit_train.functional.precision import wide


class ChangeProjection:
    """Removes a fixed set of directions (a linear subspace) from the change of each weight.

    The gradient is projected after every backward pass. The whole change ``W - W0`` is projected after every optimizer
    step, so the change contains none of the removed directions, whichever optimizer is used.

    Args:
        layers: name -> linear layer of the weight.
        subspaces: name -> named tuple that describes the directions to remove for this weight.
        project: function that receives a change [out, in] in fp32 or fp64 and a subspace. It returns the change
            [out, in] without the directions of the subspace. The function must be linear. With FSDP2, the change and
            the result are sharded in the same way as the weight.
        project_gradient: function that is used for gradients instead of ``project``. Both functions must return the
            same result, except for rounding. Default: ``project``.
    """

    def __init__(
        self,
        layers: Mapping[str, LinearLayer],
        subspaces: Mapping[str, Any],
        project: Callable[[Tensor, Any], Tensor],
        project_gradient: Callable[[Tensor, Any], Tensor] | None = None,
    ) -> None:
        self.layers, self.subspaces = dict(layers), dict(subspaces)
        self._project, self._project_gradient = project, project_gradient or project
        self._hooks: list[Any] = []

    def start(self, scope: Mapping[str, nn.Parameter]) -> None:
        """Project the gradients of the parameters in ``scope`` from now on."""
        self._hooks = project_gradients(
            self.layers, scope, lambda name, gradient: self._project_gradient(gradient, self.subspaces[name])
        )

    def stop(self) -> None:
        """Remove the gradient hooks and release the directions."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.subspaces = [], {}

    def constrain(self, weights: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Remove the directions from the change of each weight, and return the resulting weights.

        Args:
            weights: name -> weight after an optimizer step.
            reference: name -> weight before the edit.
        """
        constrained = dict(weights)
        for name in self.subspaces:
            start = wide(reference[name])
            change = self.layers[name].as_matrix(wide(weights[name]) - start)
            projected = self.layers[name].as_matrix(self._projected(name, change))
            constrained[name] = (start + projected).to(weights[name].dtype)
        return constrained

    def leak(self, weights: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float | None:
        """Return how much of the weight change lies in the removed directions, as a ratio of two norms.

        The ratio is the norm of the part of the change that lies in the removed directions, divided by the norm of the
        whole change. Each norm is taken over all weights together. The result is None if no weight has changed.
        """
        removed, whole = 0.0, 0.0
        for name in self.subspaces:
            change = self.layers[name].as_matrix(wide(weights[name].detach()) - wide(reference[name]))
            removed += total([(change - self._projected(name, change)).double().square()])
            whole += total([change.double().square()])
        return (removed / whole) ** 0.5 if whole else None

    def state(self) -> dict[str, dict[str, Any]]:
        """Return the subspaces as plain dictionaries for a checkpoint."""
        return {name: subspace._asdict() for name, subspace in self.subspaces.items()}

    def load_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restore the subspaces from the result of :meth:`state`.

        Each tensor is moved to the device of the tensor that it replaces.

        Raises:
            EditError: the checkpoint has subspaces for other weights than this object.
        """
        if state.keys() != self.subspaces.keys():
            raise EditError("the checkpoint was written with another scope; resume with the same ParameterScope.")
        for name, current in self.subspaces.items():
            fields = current._asdict()
            for key, value in state[name].items():
                # Tensors that were read from a file can have unaligned addresses, which can change the last bits of
                # matrix products. Therefore the tensors are copied.
                fields[key] = value.to(fields[key], copy=True) if isinstance(value, Tensor) else value
            self.subspaces[name] = type(current)(**fields)

    def _projected(self, name: str, change: Tensor) -> Tensor:
        return self._project(change, self.subspaces[name])
