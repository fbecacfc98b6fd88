"""Turn the fine-tuning run you already have into a knowledge edit."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kedit_train.callbacks.hosts.loop import editing
    from kedit_train.data import Edit, EditCollator, EditDataset, Probe
    from kedit_train.delta import EditDelta
    from kedit_train.errors import EditError
    from kedit_train.evaluation import Report, evaluate
    from kedit_train.modes import run_edits, survey
    from kedit_train.pretrained import load_model
    from kedit_train.trainers import EditSFTConfig, EditSFTTrainer

__version__ = "0.1.0"
__all__ = [
    "Edit",
    "EditCollator",
    "EditDataset",
    "EditDelta",
    "EditError",
    "EditSFTConfig",
    "EditSFTTrainer",
    "Probe",
    "Report",
    "editing",
    "evaluate",
    "load_model",
    "run_edits",
    "survey",
]

_HOMES = {
    "Edit": "data",
    "EditCollator": "data",
    "EditDataset": "data",
    "EditDelta": "delta",
    "EditError": "errors",
    "EditSFTConfig": "trainers",
    "EditSFTTrainer": "trainers",
    "Probe": "data",
    "Report": "evaluation",
    "editing": "callbacks.hosts.loop",
    "evaluate": "evaluation",
    "load_model": "pretrained",
    "run_edits": "modes",
    "survey": "modes",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: reading edits should not cost the import of a training framework.
    if name not in _HOMES:
        raise AttributeError(f"module 'kedit_train' has no attribute {name!r}")
    return getattr(import_module(f"kedit_train.{_HOMES[name]}"), name)
