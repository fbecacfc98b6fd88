"""The base class of all callbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kedit_train.callbacks.hosts.lightning import LightningEvents
from kedit_train.callbacks.hosts.transformers import TransformersEvents
from kedit_train.core.requirements import Requirement
from kedit_train.core.run import EditRun


class EditCallback(TransformersEvents, LightningEvents):
    """Base class of a callback that works in ``transformers``, TRL, Lightning, Fabric and plain loops.

    Override the methods that you need; none of them has to call ``super()``. Users may list callbacks in any order;
    the methods are called in the order of the class attribute ``order``. One instance serves one model at a time and
    may be used for another model afterwards.

    Attributes:
        order: position among the callbacks of a run; lower comes first.
        constrains: whether :meth:`constrain` must be called after every optimizer step.
        penalizes: whether :meth:`penalty` returns a penalty.
        anchors: whether the callback compares with the reference model inside the model's own forward pass, so that
            its gradient is part of the training loss.
        duplicate_hint: what to do instead of adding two callbacks of this class to one model, for the error message.
            None allows several.

    Example:
        >>> import torch
        >>> from kedit_train.callbacks import EditCallback, editing
        >>> class WeightPenalty(EditCallback):
        ...     penalizes = True
        ...     def penalty(self, run):
        ...         return 0.1 * sum(p.square().sum() for p in run.scope.values())
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> with editing(model, [WeightPenalty()]) as edit:
        ...     optimizer = torch.optim.SGD(edit.parameters(), lr=1.0)
        ...     edit.before_step()
        ...     optimizer.step()
        >>> model.weight.tolist()
        [[0.800000011920929, 0.800000011920929]]
    """

    order = 50
    constrains = False
    penalizes = False
    anchors = False
    duplicate_hint: str | None = None

    # -- before training

    def provides(self) -> set[str]:
        """Return the capabilities and metric keys that this callback, with its arguments, offers to others."""
        return set()

    def requires(self) -> Sequence[Requirement]:
        """Return what other callbacks must provide. Checked before the first callback attaches."""
        return ()

    def conflicts(self) -> Sequence[Requirement]:
        """Return what no other callback may provide. Checked before the first callback attaches."""
        return ()

    def prepare(self, run: EditRun) -> None:
        """Check arguments and decide what may change. The optimizer does not exist yet; other callbacks may not."""

    def attach(self, run: EditRun) -> None:
        """Start working. All callbacks are prepared and the model is on its device.

        After a resume the weights may already be edited ones; ``run.reference_model()`` gives those before the edit.
        """

    # -- around every optimizer step

    def penalty(self, run: EditRun) -> Tensor | None:
        """Return a scalar to add to the loss of this optimizer step, connected to the model; None for nothing."""
        return None

    def skip_step(self, run: EditRun) -> bool:
        """Return whether this optimizer step, whose gradients are complete, should leave the weights unchanged."""
        return False

    @property
    def skips(self) -> bool:
        """Whether this class overrides :meth:`skip_step`."""
        return type(self).skip_step is not EditCallback.skip_step

    def constrain(self, weights: dict[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the scoped weights as they should be after a step.

        Called without gradients after every optimizer step if ``constrains`` is set, in the order of ``order``: null
        space and low curvature, then norm ball, then mask, so that the mask holds exactly.

        Args:
            weights: name -> weight after the step and the constraints before this one. Do not write into them.
            reference: name -> weight before the edit.

        Returns:
            name -> weight, with new tensors, in the same dtypes, for those that change.
        """
        return weights

    def after_step(self, run: EditRun) -> None:
        """Inspect the model after an optimizer step, outside of the gradient computation."""

    # -- logging

    def metrics(self, run: EditRun) -> dict[str, float]:
        """Return the metrics to log, collected since the last call."""
        return {}

    def evaluation_metrics(self, run: EditRun) -> dict[str, float]:
        """Return scores of the current model, to add to an evaluation of the trainer's own during training."""
        return {}

    # -- checkpoints

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must contain for this callback: nested dicts of tensors and plain values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned. Called after :meth:`attach` of the resumed run."""

    # -- after training

    def finish(self, run: EditRun) -> None:
        """Finish the work at the end of training. Every callback is still attached to the edited model."""

    def detach(self, run: EditRun) -> None:
        """Remove every hook from the model. Also called if training failed."""

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        # This is the only method name that both trainers call: transformers with three positional arguments,
        # Lightning with two.
        if len(args) == 2:
            LightningEvents.on_train_end(self, *args)
        else:
            TransformersEvents.on_train_end(self, *args, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
