"""The one class behind every callback: an author writes a neutral lifecycle, the hosts call it at the right moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kedit_train.callbacks.hosts.lightning import LightningEvents
from kedit_train.callbacks.hosts.transformers import TransformersEvents
from kedit_train.core.requirements import Requirement
from kedit_train.core.run import EditRun


class EditCallback(TransformersEvents, LightningEvents):
    """A callback for ``transformers`` and TRL trainers, Lightning, Fabric and plain loops alike.

    Override what is needed of the methods below; none of them has to call ``super()``. Callbacks may be listed in any
    order: whatever depends on it is settled by ``order``. One instance serves one model at a time and may serve
    another afterwards.
    """

    order = 50
    constrains = False
    penalises = False
    # Compares with the unedited model while the model's own forward pass goes on (KLLocality on the training batch).
    anchors = False
    # Where a second one on the same model would be void or wrong: what to do instead.
    single: str | None = None

    def provides(self) -> set[str]:
        """Return the capabilities and metric keys that other callbacks may require, with the arguments as given."""
        return set()

    def requires(self) -> Sequence[Requirement]:
        """Return what other callbacks must provide. Checked before the first callback attaches."""
        return ()

    def conflicts(self) -> Sequence[Requirement]:
        """Return what no other callback may provide. Checked before the first callback attaches."""
        return ()

    def prepare(self, run: EditRun) -> None:
        """Check arguments and decide what may change. The optimizer does not exist yet, nor need other callbacks."""

    def attach(self, run: EditRun) -> None:
        """Start: every callback is prepared, the model is on its device; after a resume, weights may be edited ones."""

    def penalty(self, run: EditRun) -> Tensor | None:
        """Return an extra loss (scalar, connected to the model), once per optimizer step; None for none."""
        return None

    @property
    def skips(self) -> bool:
        """Whether ``skip_step`` has something to say."""
        return type(self).skip_step is not EditCallback.skip_step

    def skip_step(self, run: EditRun) -> bool:
        """Tell, with all gradients computed, whether this optimizer step should leave the weights alone."""
        return False

    def constrain(self, weights: dict[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the scoped weights shall be after a step, given what they were before the edit.

        Called without gradients after every optimizer step where ``constrains`` is set, in the order of ``order``: null
        space and low curvature, then ball, then mask, so that the mask is exact. Return new tensors for what changes,
        in the dtypes of the weights; never write into the ones given.
        """
        return weights

    def after_step(self, run: EditRun) -> None:
        """Look at the model after an optimizer step, outside of the gradient."""

    def evaluated(self, run: EditRun) -> dict[str, float]:
        """Return scores of the model as it is, for an evaluation of the host's own during training."""
        return {}

    def metrics(self, run: EditRun) -> dict[str, float]:
        """Return what to log, gathered since the last call."""
        return {}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold for this callback to go on after a resume: tensors and plain values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what ``state`` returned; called after ``attach`` of the resumed run."""

    def finish(self, run: EditRun) -> None:
        """End of training; the edited model is there and every callback still attached."""

    def detach(self, run: EditRun) -> None:
        """Leave no trace on the model; also called when training failed."""

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        # The one method name that both hosts call; transformers passes three positional arguments, Lightning two.
        if len(args) == 2:
            LightningEvents.on_train_end(self, *args)
        else:
            TransformersEvents.on_train_end(self, *args, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
