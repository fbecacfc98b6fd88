"""EditCallback: the base class of all callbacks."""

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

    Override the methods that you need. An override does not have to call ``super()``. Users may list callbacks in any
    order. The methods are called in ascending order of the class attribute ``order``. Use an instance for only one
    model at a time. You may use it for another model afterwards.

    Attributes:
        order: position among the callbacks of a run. Callbacks with a lower value come first.
        constrains: whether :meth:`constrain` must be called after every optimizer step.
        penalizes: whether :meth:`penalty` may return a term that is added to the loss.
        follows_steps: whether the callback must be called after every optimizer step. If True, the run raises an error
            when the weights change but no optimizer step was detected.
        anchors: whether the callback adds a comparison with the reference model (the model before the edit) to the loss
            inside the forward pass.
        duplicate_hint: advice for a user who puts two callbacks of this class on one model. The run then raises an
            error, whose message ends with this advice. With None, several callbacks of this class are allowed.

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
    follows_steps = False
    anchors = False
    duplicate_hint: str | None = None

    # -- before training

    def provides(self) -> set[str]:
        """Return the metrics and capabilities that this callback provides to other callbacks, by name.

        For example, "edit/reliability" is a metric, and "token_loss" is a capability.
        """
        return set()

    def requires(self) -> Sequence[Requirement]:
        """Return the requirements of this callback: the metrics and capabilities that it needs.

        For each requirement, a callback of the run must provide at least one of the names in ``any_of``. The callback
        with the requirement may provide this name itself. The run checks the requirements before the first callback
        attaches.
        """
        return ()

    def conflicts(self) -> Sequence[Requirement]:
        """Return the metrics and capabilities that no other callback of the run may provide.

        The run checks these conflicts before the first callback attaches.
        """
        return ()

    def prepare(self, run: EditRun) -> None:
        """Check the arguments and select the parameters that may change.

        At this time, there is no optimizer yet. Do not look for other callbacks here, because some may still be missing
        from the run.
        """

    def attach(self, run: EditRun) -> None:
        """Connect this callback to the model. ``prepare`` of all callbacks has already been called.

        The model is on its device. In a resumed run, the model may already contain edited weights. Inside
        ``with run.reference_model():``, the model has the weights before the edit.
        """

    # -- around every optimizer step

    def penalty(self, run: EditRun) -> Tensor | None:
        """Return a differentiable scalar to add to the loss of this optimizer step, or None for no penalty."""
        return None

    def before_optimizer_step(self, run: EditRun) -> None:
        """Inspect the gradients of this optimizer step. At this time, the gradients are complete.

        The gradients are also clipped already, except in Lightning, which clips them later.
        """

    def skip_step(self, run: EditRun) -> bool:
        """Return whether to skip this optimizer step. This method is called when the gradients are complete."""
        return False

    @property
    def skips(self) -> bool:
        """Whether this class overrides :meth:`skip_step`."""
        return type(self).skip_step is not EditCallback.skip_step

    def constrain(self, weights: dict[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the constrained values of the weights in the scope (the parameters that may change).

        If ``constrains`` is True, this method is called after every optimizer step, under ``torch.no_grad()``. The
        callbacks are called in ascending ``order``. For the callbacks of this library, the order is ``PolyakStep`` and
        its subclasses, ``WeightAnchor``, ``LowCurvature``, ``NullSpace``, ``NormBall``, ``GradientMask``.
        ``GradientMask`` comes last, so that frozen entries keep their exact values.

        Args:
            weights: a dict from parameter name to the current weight. The optimizer step and the constraints of earlier
                callbacks have already changed these weights. Do not modify the tensors in place.
            reference: a mapping from parameter name to the weight before the edit.

        Returns:
            A dict from parameter name to weight. A changed weight is a new tensor of the same dtype.
        """
        return weights

    def after_step(self, run: EditRun) -> None:
        """Inspect the model after an optimizer step and after all constraints."""

    # -- logging

    def metrics(self, run: EditRun) -> dict[str, float]:
        """Return the metrics to log, for the steps since the last call."""
        return {}

    def evaluation_metrics(self, run: EditRun) -> dict[str, float]:
        """Return scores of the current model, to add to the results of the trainer's own evaluation."""
        return {}

    # -- checkpoints

    def state(self) -> dict[str, Any]:
        """Return the state of this callback for a checkpoint: nested dicts of tensors and plain values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`state` returned. In a resumed run, this is called after :meth:`attach`."""

    # -- after training

    def finish(self, run: EditRun) -> None:
        """Finish the work at the end of training, while every callback is still attached to the edited model."""

    def detach(self, run: EditRun) -> None:
        """Remove all hooks of this callback from the model. This method is also called if training failed."""

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        # This is the only method name that the trainers of transformers and of Lightning both call. transformers passes
        # three positional arguments, and Lightning passes two.
        if len(args) == 2:
            LightningEvents.on_train_end(self, *args)
        else:
            TransformersEvents.on_train_end(self, *args, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
