"""Store the weights from which a weight change is measured, for one run or for several runs on the same model."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from kedit_train.core.run import EditRun
from kedit_train.errors import EditError

Anchor = Literal["base", "previous"]


class AnchorWeights:
    """Stores the anchor of each weight in the scope: an earlier value, from which the weight change is measured.

    The stored values are deleted when a run trains another model.

    Args:
        anchor: "base" or "previous". With "base", the anchor is the value of the weight before the first run that
            trained the weight. With "previous", the anchor is the value of the weight before the current run.
    """

    def __init__(self, anchor: Anchor) -> None:
        self.anchor = anchor
        self._weights: dict[str, Tensor] = {}
        self._model: weakref.ref[nn.Module] | None = None
        self._reference: Mapping[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name]

    def names(self) -> set[str]:
        """Return the names of the stored weights."""
        return set(self._weights)

    def start_run(self, run: EditRun) -> list[str]:
        """Begin a run and move the stored values to the device of the model's weights.

        Returns:
            The names of the weights in the run's scope for which an earlier run has stored a value, sorted.

        Raises:
            EditError: a weight has another shape than its stored value.
        """
        same_model = self._model is not None and self._model() is run.model
        if self.anchor == "previous" or not same_model:
            self._weights = {}
        self._model, self._reference = weakref.ref(run.model), {}
        stored = sorted(self._weights.keys() & run.scope.keys())
        for name in stored:
            weight = run.scope[name]
            if weight.shape != self._weights[name].shape:
                raise EditError(
                    f"the parameter {name!r} has shape {tuple(weight.shape)}, but had shape "
                    f"{tuple(self._weights[name].shape)} in an earlier run of this callback; create a new callback "
                    "for the changed model."
                )
            # The model may have been moved between the runs.
            self._weights[name] = self._weights[name].to(weight.device)
        return stored

    def register(self, weights: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> None:
        """Store the value from ``reference`` for each weight that has no stored value.

        All stored values are moved to the devices of their weights. Do not call this method before the first optimizer
        step: until then, other callbacks may change ``reference``.

        Args:
            weights: name -> weight. If a weight is sharded (FSDP2), its stored value is sharded in the same way.
            reference: name -> value of the weight before the current run.
        """
        self._reference = reference
        for name, weight in weights.items():
            stored = self._weights.setdefault(name, reference[name])
            if isinstance(weight, DTensor) and not isinstance(stored, DTensor):
                self._weights[name] = distribute_tensor(stored, weight.device_mesh, weight.placements)
            elif stored.device != weight.device:
                self._weights[name] = stored.to(weight.device)

    def end_run(self) -> None:
        """Release the reference weights of the run and, for ``anchor="previous"``, the stored values."""
        self._reference = {}
        if self.anchor == "previous":
            self._weights = {}

    def state(self) -> dict[str, Tensor]:
        """Return the values that earlier runs have stored, for a checkpoint.

        Values that were stored in the current run are left out, because the checkpoint already contains them as the
        reference weights of the run.
        """
        earlier = {name: w for name, w in self._weights.items() if w is not self._reference.get(name)}
        return {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in earlier.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the values that :meth:`state` returned."""
        self._weights.update(state)
