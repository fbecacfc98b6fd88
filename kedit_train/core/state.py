"""The data of one edit, which all callbacks of the edit share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from kedit_train.core.fsdp import reshard
from kedit_train.core.full_precision import FullPrecision
from kedit_train.core.locality.divergence_penalty import DivergencePenalty
from kedit_train.core.output_head import find_language_model
from kedit_train.core.zero import ZeroSteps
from kedit_train.edit import Edit
from kedit_train.quantized_layers import PackingGuard, check_not_packed


class RunState:
    """The data of one edit of one model. :class:`~kedit_train.core.run.EditRun` adds the lifecycle.

    Attributes:
        root: the module that the training loop trains, for example a LightningModule.
        model: the language model inside ``root``, or ``root`` itself if there is none.
        language_model: the language model inside ``root``, or None if there is none.
        host: the interface of the training loop, a :class:`~kedit_train.core.host.Host`.
        callbacks: the callbacks of this run, sorted by their ``order``.
        step: number of optimizer steps taken.
        scope: the parameters that the edit may change, by their names in ``model.named_parameters()``.
        reference: the values of these parameters before the edit, by name.
        requires_grad_before: the ``requires_grad`` of each parameter before the edit.
        shapes: the shape of each parameter when the run was opened, by name.
        frozen_outside: whether this run has frozen all parameters outside of the scope.
        full_precision: whether a half-precision scope is trained in fp32.
        masters: the object that keeps the scoped parameters in fp32, or None if they are not trained in fp32.
        packing: the object that prevents bitsandbytes from packing 4-bit layers on a CPU. A packed layer has no
            gradient with respect to its input.
        zero: the object that reports the steps of DeepSpeed ZeRO-1 or ZeRO-2 to this run. None without DeepSpeed.
        penalties: one ``DivergencePenalty`` for each callback that penalizes a divergence from the unedited model.
        scores: the latest published value of each metric, by metric key. Callbacks publish and read these values.
        published_at: the optimizer step at which each metric was last published, by metric key.
        stopped: whether a callback has asked to end training.
        closed: whether the run has ended and has removed its hooks from the model.
    """

    def __init__(self, root: nn.Module, host: Any) -> None:
        reshard(root)
        self.root = root
        check_not_packed(root)
        self.packing: PackingGuard = PackingGuard(root)
        self.host = host
        self.language_model: nn.Module | None = find_language_model(root)
        self.model: nn.Module = root if self.language_model is None else self.language_model
        self.callbacks: list[Any] = []
        self.step = 0
        self.scope: dict[str, nn.Parameter] = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.reference: dict[str, Tensor] = {}
        self.requires_grad_before: dict[nn.Parameter, bool] = {p: p.requires_grad for p in root.parameters()}
        self.shapes: dict[str, torch.Size] = {name: p.shape for name, p in self.model.named_parameters()}
        self.full_precision = False
        self.frozen_outside = False
        self.masters: FullPrecision | None = None
        self.zero: ZeroSteps | None = None
        self.penalties: list[DivergencePenalty] = []
        self.scores: dict[str, float] = {}
        self.published_at: dict[str, int] = {}
        self.stopped = self.closed = False
        self._edits: Sequence[Edit] = ()
        self._attached: set[int] = set()

    @property
    def edits(self) -> Sequence[Edit]:
        """The edits that a callback has set, or the edits of the training loop if no callback has set any."""
        from_host = () if self._edits else self.host.edits()
        # A user's own data module may use the attribute name "edits" for something else.
        are_edits = isinstance(from_host, Sequence) and len(from_host) > 0 and isinstance(from_host[0], Edit)
        return cast(Sequence[Edit], from_host) if are_edits else self._edits

    @edits.setter
    def edits(self, edits: Sequence[Edit]) -> None:
        self._edits = edits

    @property
    def has_started(self) -> bool:
        """Whether a callback has been attached to this run, which happens when training starts."""
        return bool(self._attached)

    def has_attached(self, callback: Any) -> bool:
        """Return whether this callback has been attached to the run."""
        return id(callback) in self._attached

    @property
    def needs_reference(self) -> bool:
        """Whether a callback reads ``reference``, the values from before the edit, during training."""
        return any(callback.constrains or callback.anchors for callback in self.callbacks)

    def backward(self, penalty: Tensor) -> None:
        """Add the gradients of a penalty to the gradients of the next optimizer step."""
        if self.zero is None:
            penalty.backward()
        else:
            self.zero.add_penalty(penalty)

    def is_required(self, name: str) -> bool:
        """Return whether a callback of this run requires the metric key or capability ``name``."""
        return any(name in needed.any_of for callback in self.callbacks for needed in callback.requires())

    def describe_scope(self) -> dict[str, Any]:
        """Return the names and the parameter count of the scoped tensors, and the parameter count of the model."""
        return {
            "tensors": list(self.scope),
            "parameters": sum(p.numel() for p in self.scope.values()),
            "of": sum(p.numel() for p in self.model.parameters()),
        }

    def publish(self, metrics: Mapping[str, float]) -> None:
        """Store metrics in ``scores`` and ``published_at``, where other callbacks can read them."""
        self.scores.update(metrics)
        self.published_at.update(dict.fromkeys(metrics, self.step))
