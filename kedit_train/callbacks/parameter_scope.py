"""ParameterScope: choose the parameters that the run may change."""

from __future__ import annotations

from typing import Any

import torch

from kedit_train.callbacks.base import EditCallback
from kedit_train.core.ddp import check_ddp_at_first_forward
from kedit_train.core.fsdp import full_tensor
from kedit_train.core.run import EditRun
from kedit_train.core.scope.adapters import keep_frozen
from kedit_train.core.scope.experts import experts_per_block
from kedit_train.core.scope.scope import check_selection, resolve_scope
from kedit_train.errors import EditError, reported_by


class ParameterScope(EditCallback):
    """Train the selected modules in the selected layers, and freeze everything else.

    Parameters outside the scope are frozen before the optimizer is created, so they keep their values bit for bit.
    Parameters that are already frozen stay frozen. In a model with adapters, the scope can therefore contain only
    adapter parameters.

    A scope of one down-projection matrix is a strong baseline for editing (LocFT-BF). Edits in late layers
    preserve general ability best. Edits in early layers generalize best.

    Args:
        layers: the layers to train: an index (``5``, ``-1``), a fraction of the depth (``0.7`` is one layer: layer 8 of
            a model with 12 layers), an inclusive range (``"4-6"``, ``"0.5-0.75"``) or several of these
            (``[2, "4-6"]``, ``"2,4-6"``). None selects the matching modules of the whole model, including modules
            outside the layers, such as the embeddings.
        modules: the modules to train: one pattern or several, for example ``"mlp.down_proj"``, ``"self_attn.*_proj"``
            or ``"mlp"``. Dots separate the parts of patterns and parameter names. A parameter matches if its name
            contains the parts of the pattern, one directly after the other. For example, ``"mlp.down_proj"`` matches
            ``model.layers.4.mlp.down_proj.weight`` and the bias of the same module. ``"mlp.down_proj.weight"`` does not
            match the bias. ``"*"`` matches every parameter, so ``ParameterScope(modules="*")`` is full fine-tuning.
            None selects all modules of the layers. In a mixture-of-experts model, ``"mlp.down_proj"`` matches the
            down-projections of all experts. The router is frozen, unless a pattern contains its name (``"mlp.gate"``)
            or is ``"*"``.
        full_precision: whether to train bf16 and fp16 parameters in fp32 and round them when training ends. In half
            precision, updates below about 1/256 of a weight would be lost. Checkpoints that are written during training
            contain these parameters in fp32.

    Raises:
        EditError: neither ``layers`` nor ``modules`` is set, one of them contains an empty text or a value of a wrong
            type, no parameter matches, a layer is out of range, or all matching parameters are frozen.

    References:
        - Fine-tuning Done Right in Model Editing (LocFT-BF), arXiv 2509.22072.

    Example:
        >>> from kedit_train import editing, world
        >>> from kedit_train.callbacks import ParameterScope
        >>> model, tokenizer = world.load()
        >>> with editing(model, [ParameterScope(0.7, modules="mlp.down_proj")]) as edit:
        ...     [name for name, p in model.named_parameters() if p.requires_grad]
        ['model.layers.4.mlp.down_proj.weight']
    """

    order = 0
    duplicate_hint: str | None = "use one ParameterScope with all layers and modules"

    def __init__(
        self,
        layers: int | float | str | list[int | float | str] | None = None,
        *,
        modules: str | list[str] | None = None,
        full_precision: bool = True,
    ) -> None:
        if layers is None and modules is None:
            raise EditError(
                "layers or modules must be set, got neither, so every parameter would be trained; choose a scope, for "
                'example ParameterScope(0.7, modules="mlp.down_proj"). For full fine-tuning, use modules="*".',
                component="ParameterScope",
            )
        with reported_by("ParameterScope"):
            check_selection(layers, modules)
        self.layers = layers
        self.modules = modules
        self.full_precision = full_precision
        self._handles: list[Any] = []

    def prepare(self, run: EditRun) -> None:
        run.full_precision = self.full_precision
        trainable = [p for p in run.model.parameters() if p.requires_grad]
        run.set_scope(resolve_scope(run.model, self.layers, self.modules))
        self._handles = keep_frozen(run.model, [p for p in trainable if not p.requires_grad])
        if run.host.is_main and (experts := experts_per_block(run.scope)):
            counts = "-".join(map(str, sorted({min(experts.values()), max(experts.values())})))
            print(f"ParameterScope: {counts} experts per layer are trained ({len(experts)} layers)")

    def attach(self, run: EditRun) -> None:
        self._handles += check_ddp_at_first_forward(run.model)

    def detach(self, run: EditRun) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def metrics(self, run: EditRun) -> dict[str, float]:
        """Return the number of parameters in the scope and their distance from the reference weights.

        The distance is the L2 norm of the change divided by the L2 norm of the reference weights. In a
        mixture-of-experts model, also return the number of experts in the scope, over all layers.
        """
        squared_change, squared_norm = torch.zeros(()), torch.zeros(())
        with torch.no_grad():
            for name, parameter in run.scope.items():
                reference = run.reference[name].float()
                squared_change += full_tensor((parameter.float() - reference).square().sum()).cpu()
                squared_norm += full_tensor(reference.square().sum()).cpu()
        metrics = {
            "edit/scope/parameters": float(sum(p.numel() for p in run.scope.values())),
            "edit/drift/relative": float((squared_change / squared_norm.clamp(min=1e-30)).sqrt()),
        }
        experts = sum(experts_per_block(run.scope).values())
        return metrics | {"edit/scope/experts": float(experts)} if experts else metrics

    def __repr__(self) -> str:
        return f"ParameterScope({self.layers!r}, modules={self.modules!r})"
