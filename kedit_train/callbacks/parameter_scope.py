"""Where may the model change? Everything outside of the scope is frozen before the optimizer exists."""

from __future__ import annotations

from typing import Any

import torch

from kedit_train.callbacks.base import EditCallback
from kedit_train.core.ddp import watch_replicas
from kedit_train.core.fsdp import whole
from kedit_train.core.run import EditRun
from kedit_train.core.scope.adapters import keep_frozen
from kedit_train.core.scope.scope import resolve_scope


class ParameterScope(EditCallback):
    """Train the parameters of some modules in some layers, and nothing else.

    Fine-tuning one down-projection in the middle of the network, breadth-first, is the strongest plain recipe known
    for editing ("Fine-tuning Done Right in Model Editing", LocFT-BF, arXiv 2509.22072): late layers keep general
    ability best, early ones generalise best.

    Args:
        layers: an index (``5``, ``-1``), a fraction of the depth (``0.7``), an inclusive range (``"4-6"``,
            ``"0.5-0.75"``), several (``[2, "4-6"]`` or ``"2,4-6"``), or None for every parameter, embeddings included.
        modules: a dotted pattern or several; consecutive parts of a parameter's name must match it part by part
            (``"mlp.down_proj"``, ``"self_attn.*_proj"``, ``"mlp"``). A module's bias comes with it; ``.weight`` leaves
            it out. None takes everything in the layers.
        full_precision: train what is in bf16 or fp16 in fp32 and round it when training ends, constraints included:
            otherwise updates below about 1/256 of a weight are rounded to nothing. Checkpoints written during training
            hold these tensors in fp32.

    Of a model with adapters only the adapters' parameters are eligible: what is frozen already stays frozen.

    Example:
        >>> SFTTrainer(model, args, train_dataset=data, callbacks=[ParameterScope(layers=0.7, modules="mlp.down_proj")])
    """

    order = 0
    single = "give one of them every layer and module"

    def __init__(
        self,
        layers: int | float | str | list[int | float | str] | None = None,
        *,
        modules: str | list[str] | None = None,
        full_precision: bool = True,
    ) -> None:
        self.layers, self.modules, self.full_precision = layers, modules, full_precision
        self._handles: list[Any] = []

    def prepare(self, run: EditRun) -> None:
        run.full_precision = self.full_precision
        trainable = [p for p in run.model.parameters() if p.requires_grad]
        run.set_scope(resolve_scope(run.model, self.layers, self.modules))
        self._handles = keep_frozen(run.model, [p for p in trainable if not p.requires_grad])

    def attach(self, run: EditRun) -> None:
        self._handles += watch_replicas(run.model)

    def detach(self, run: EditRun) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def metrics(self, run: EditRun) -> dict[str, float]:
        """Parameters in scope, and how far they are from where they were, relative to their size."""
        moved, size = torch.zeros(()), torch.zeros(())
        with torch.no_grad():
            for name, parameter in run.scope.items():
                reference = run.reference[name].float()
                moved += whole((parameter.float() - reference).square().sum()).cpu()
                size += whole(reference.square().sum()).cpu()
        return {
            "edit/scope/parameters": float(sum(p.numel() for p in run.scope.values())),
            "edit/drift/relative": float((moved / size.clamp(min=1e-30)).sqrt()),
        }

    def __repr__(self) -> str:
        return f"ParameterScope(layers={self.layers!r}, modules={self.modules!r})"
