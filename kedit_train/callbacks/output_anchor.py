"""OutputAnchor: a penalty that keeps the outputs of any module on given inputs close to the outputs before the edit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kedit_train.arguments import Rule, at_least, check_arguments, integer_from, one_of, optional
from kedit_train.callbacks.base import EditCallback
from kedit_train.core.locality.divergence_penalty import CAPABILITY, DivergencePenalty
from kedit_train.core.locality.model_inputs import hash_model_inputs, read_model_inputs
from kedit_train.core.locality.reference_outputs import SELECTION, ModelOutputs, ReferenceOutputs, Selection
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError
from kedit_train.functional.output_distance import Distance, output_distance

_NAME = Rule("the name of a submodule", lambda value: isinstance(value, str))


class OutputAnchor(EditCallback):
    """Penalize changed outputs on given inputs, compared with the model before the edit.

    The penalty is ``weight`` times the mean distance between the current outputs and the outputs before the edit. It is
    added to the training loss. The model may be any module. For example, the penalty keeps the forecasts of a
    forecaster on given windows close to the forecasts before the edit. For texts and language models, use
    :class:`KLLocality`, which needs less memory.

    Before training, the model computes its outputs on all inputs once. These outputs are stored in CPU memory. Each
    optimizer step draws ``batch_size`` items, the same items on every process, and calls the model in evaluation mode
    with each drawn item. The stored outputs are part of every checkpoint, so a resumed run needs no unedited model.

    Args:
        inputs: one item per forward pass: a tensor, a tuple (positional arguments) or a mapping (keyword arguments).
            ``inputs`` can also be the path of a safetensors file. The tensors in this file are named like the arguments
            of ``forward`` and have the shape [forward passes, windows, ...].
        distance: "mse" is the mean squared difference, in the squared unit of the outputs. "quantile" is the mean
            absolute difference, in the unit of the outputs. If the outputs are evenly spaced quantiles, this difference
            approximates the 1-Wasserstein distance of two forecasts. "kl" is KL(before || now) in nats. It requires
            that the outputs are logits, with the classes or tokens in the last dimension.
        weight: factor of the mean distance in the training loss. If the training loss and the distance are of the same
            kind (for example, both are mean squared errors), 1.0 gives the inputs the same weight as the training
            batch.
        output: which tensor of the model's output to compare: a name, an index, or a function of the output. None
            requires that the output is a tensor.
        batch_size: number of items per optimizer step.
        module: name of the submodule to call, for example "model". None calls the language model that the trained
            module contains. If it contains no language model, None calls the trained module itself.
        seed: seed of the draws. Every item is drawn once before any item is drawn again.

    Raises:
        EditError: an argument is out of bounds, there are no inputs, the model cannot be called with an input, or the
            selected output is not a tensor of floats.

    References:
        Dark Experience for General Continual Learning, arXiv 2004.07211.

    Example:
        >>> import torch
        >>> from kedit_train.callbacks import OutputAnchor, editing
        >>> model = torch.nn.Linear(4, 2)
        >>> kept = torch.randn(32, 4).split(8)
        >>> anchor = OutputAnchor(kept, distance="mse", weight=1.0)
        >>> with editing(model, [anchor]) as edit:
        ...     optimizer = torch.optim.SGD(edit.parameters(), lr=0.1)
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         edit.before_step()
        ...         model(torch.ones(8, 4)).square().mean().backward()
        ...         optimizer.step()
        ...     metrics = edit.run.collect()
        >>> metrics["edit/locality/output_bytes"]
        256.0
    """

    order = 30
    penalizes = True

    def __init__(
        self,
        inputs: Any,
        *,
        distance: Distance = "mse",
        weight: float = 1.0,
        output: Selection = None,
        batch_size: int = 1,
        module: str | None = None,
        seed: int = 0,
    ) -> None:
        check_arguments(
            self,
            distance=(distance, one_of(("mse", "quantile", "kl"))),
            weight=(weight, at_least(0)),
            output=(output, SELECTION),
            batch_size=(batch_size, integer_from(1)),
            module=(module, optional(_NAME)),
            seed=(seed, integer_from(0)),
        )
        self.inputs = inputs
        self.output = output
        self.module = module
        self.distance: Distance = distance
        self.weight = weight
        self.batch_size = batch_size
        self.seed = seed
        self._reference: ReferenceOutputs | None = None

    def provides(self) -> set[str]:
        return {"edit/locality/output_distance", CAPABILITY}

    def prepare(self, run: EditRun) -> None:
        self._items = read_model_inputs(self.inputs, "inputs")
        # This attribute is public, so a distributed run checks that it is the same in all processes.
        self.inputs_hash: str = hash_model_inputs(self._items)

    def attach(self, run: EditRun) -> None:
        self._reference = ReferenceOutputs(
            ModelOutputs(run, self._items, self.output, self.module, "inputs"), self.seed
        )
        self._reference.start()
        self._sum, self._count = torch.zeros(()), 0
        # A ForgettingBudget may change the weight during training.
        self._penalty = DivergencePenalty("outputs", self.weight)
        run.penalties.append(self._penalty)

    def penalty(self, run: EditRun) -> Tensor | None:
        assert self._reference is not None
        distances = torch.cat([self._distances(index) for index in self._reference.draw(self.batch_size)])
        if not distances.requires_grad:
            raise EditError(
                "the output has no gradient with respect to the parameters in scope; select another tensor with "
                "output=, or change the scope."
            )
        mean = distances.mean()
        self._sum, self._count = self._sum.to(mean.device) + mean.detach(), self._count + 1
        self._penalty.observe(distances)
        return self._penalty.weight * mean

    def _distances(self, index: int) -> Tensor:
        """Return the distances [N] between the old and the current outputs for one item. Padding is left out."""
        assert self._reference is not None
        before, now = self._reference.pair(index)
        distances = output_distance(before, now, distance=self.distance)
        mask = self._reference.outputs.mask(index)
        if mask is not None and distances.shape[: mask.ndim] == mask.shape:
            return distances[mask.to(distances.device)].flatten()
        return distances.flatten()

    def metrics(self, run: EditRun) -> dict[str, float]:
        """Return the mean distance of the outputs since the last call, and the size of the stored outputs in bytes.

        The distance is not multiplied by the weight of the penalty.
        """
        if self._reference is None or not self._count:
            return {}
        mean = float(self._sum) / self._count
        self._sum, self._count = torch.zeros(()), 0
        return {
            "edit/locality/output_distance": mean,
            "edit/locality/output_bytes": float(self._reference.nbytes),
        }

    def state(self) -> dict[str, Any]:
        return {} if self._reference is None else self._reference.state()

    def load_state(self, state: dict[str, Any]) -> None:
        if self._reference is not None:
            self._reference.load_state(state, self.batch_size)

    def detach(self, run: EditRun) -> None:
        self._reference = None

    def __repr__(self) -> str:
        return f"OutputAnchor(distance={self.distance!r}, weight={self.weight}, batch_size={self.batch_size})"
