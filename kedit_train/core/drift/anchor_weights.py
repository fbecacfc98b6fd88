"""What a change is measured from: the weights before a run, or before the first of several runs on one model."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from kedit_train.core.run import EditRun
from kedit_train.errors import EditError

Anchor = Literal["base", "previous"]


class Centres(dict[str, Tensor]):
    """Name -> weight, each as it was when it was met first.

    Args:
        anchor: "base" keeps them over later runs on the same model; "previous" takes them anew in each run.
    """

    def __init__(self, anchor: Anchor) -> None:
        super().__init__()
        self.anchor = anchor
        self._model: weakref.ref[nn.Module] | None = None
        self._reference: Mapping[str, Tensor] = {}

    def begin(self, run: EditRun) -> list[str]:
        """Begin a run; which of its scope an earlier one has met.

        Raises:
            EditError: a tensor has changed its shape since.
        """
        same_model = self._model is not None and self._model() is run.model
        if self.anchor == "previous" or not same_model:
            self.clear()
        self._model, self._reference = weakref.ref(run.model), {}
        known = sorted(self.keys() & run.scope.keys())
        for name in known:
            if run.scope[name].shape != self[name].shape:
                raise EditError(f"{name} has another shape than when this callback first met the model")
            # The model may have been moved since.
            self[name] = self[name].to(run.scope[name].device)
        return known

    def follow(self, weights: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> None:
        """Meet what is new among ``weights``, and be where they are.

        Not before the first step: until then other callbacks may settle what the reference is.
        """
        self._reference = reference
        for name, weight in weights.items():
            centre = self.setdefault(name, reference[name])
            if isinstance(weight, DTensor) and not isinstance(centre, DTensor):
                self[name] = distribute_tensor(centre, weight.device_mesh, weight.placements)
            elif centre.device != weight.device:
                self[name] = centre.to(weight.device)

    def end(self) -> None:
        self._reference = {}
        if self.anchor == "previous":
            self.clear()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold: those of earlier runs; the reference of this one is in there."""
        earlier = {name: centre for name, centre in self.items() if centre is not self._reference.get(name)}
        return {name: c.full_tensor() if isinstance(c, DTensor) else c for name, c in earlier.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.update(state)
