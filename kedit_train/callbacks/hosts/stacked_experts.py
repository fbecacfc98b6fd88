"""Load stacked experts from a checkpoint of ``transformers``, because the trainer itself does not load them.

Some mixture-of-experts models stack the weights of all experts of a layer in one parameter. ``save_pretrained`` stores
the weights of each expert under separate names, and ``from_pretrained`` stacks them when it loads a checkpoint.
``Trainer``, however, loads a checkpoint with ``load_state_dict(strict=False)``. This call silently skips the separate
weights, because no parameter of the model has one of these names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kedit_train.core.scope.experts import is_stack
from kedit_train.delta.weight_source import INDEX, SINGLE, shards_of
from kedit_train.errors import EditError


@torch.no_grad()
def load_stacked_experts(run: Any, folder: str | Path) -> None:
    """Load the parameters in scope from a checkpoint that stores the weights of each expert under separate names.

    If the scope contains no stacked experts, or the checkpoint does not store separate experts, nothing is loaded.
    During loading, this function needs memory for a second copy of the model in fp32.

    Args:
        run: the :class:`~kedit_train.core.run.EditRun` that is resumed.
        folder: the checkpoint that the trainer has loaded.
    """
    folder = Path(folder)
    stacks = {name for name, parameter in run.scope.items() if is_stack(name, parameter.shape)}
    # Adapters and shards of FSDP are stored in other files, under the parameter names of the model.
    if not stacks or not ((folder / SINGLE).is_file() or (folder / INDEX).is_file()):
        return
    stored = {name for spans in shards_of(folder).values() for name in spans}
    if stacks <= stored:
        return
    # The checkpoint is loaded in fp32, because the scope may have been trained in fp32 although the configuration names
    # another dtype.
    saved = dict(type(run.language_model).from_pretrained(folder, dtype=torch.float32).named_parameters())
    for name, parameter in run.scope.items():
        parameter.copy_(saved[name])


def check_best_model(run: Any) -> None:
    """Raise an error if a run that trains stacked experts would load its best checkpoint at the end of training.

    The trainer does not load stacked experts, so they would keep the weights of the last step.

    Raises:
        EditError: ``load_best_model_at_end`` is set, and the scope contains stacked experts.
    """
    if run.host.args.load_best_model_at_end and any(is_stack(name, p.shape) for name, p in run.scope.items()):
        raise EditError(
            "load_best_model_at_end must be False in a run that trains stacked experts, because the trainer of "
            "transformers does not load stacked experts from a checkpoint; to keep the best weights, use "
            'SaveDelta(at="best").',
            component="ParameterScope",
        )
