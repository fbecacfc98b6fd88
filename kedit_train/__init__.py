"""Turn a fine-tuning run into a knowledge edit.

The names in ``__all__`` are the public interface. All other names are internal and may change in any release.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kedit_train.version import __version__ as __version__

if TYPE_CHECKING:
    from kedit_train.augmentation import AugmentationOptions
    from kedit_train.callbacks import (
        ActiveSet,
        BatchAnchor,
        ContextTeacher,
        EditCallback,
        EditMetrics,
        ForgetFirst,
        ForgettingBudget,
        ForgetTraining,
        GradientMask,
        KLLocality,
        LowCurvature,
        MaskScore,
        NormBall,
        NullSpace,
        ParameterScope,
        PolyakStep,
        PrefixCache,
        ReferenceCache,
        SaveDelta,
        SecondOrderLocality,
        StopWhenEdited,
        SubjectTokens,
        SubjectValues,
        Teacher,
        Texts,
        TokenLoss,
        TokenSmoothing,
        WeightAnchor,
        editing,
    )
    from kedit_train.data import ChatFormat, EditCollator, EditDataset
    from kedit_train.delta import EditDelta, TaskVector, merge, sweep
    from kedit_train.edit import Edit, Probe
    from kedit_train.errors import EditError
    from kedit_train.evaluation import EvaluationOptions, Report, evaluate, generate_answers
    from kedit_train.evaluation.scoring.capability import CapabilityProbe
    from kedit_train.modes import TrainLoop, run_edits, survey, tune
    from kedit_train.modules import EditDataModule, EditModule
    from kedit_train.pretrained import load_model
    from kedit_train.trainers import EditSFTConfig, EditSFTTrainer

# Section of docs/api.md -> public name -> the module that defines it or re-exports it.
PUBLIC_SECTIONS: dict[str, dict[str, str]] = {
    "Edits and models": {
        "Edit": "kedit_train.edit",
        "Probe": "kedit_train.edit",
        "EditDataset": "kedit_train.data",
        "EditCollator": "kedit_train.data",
        "ChatFormat": "kedit_train.data",
        "EditError": "kedit_train.errors",
        "load_model": "kedit_train.pretrained",
        "world": "kedit_train",
    },
    "Callbacks": {
        "EditCallback": "kedit_train.callbacks",
        "ParameterScope": "kedit_train.callbacks",
        "SubjectTokens": "kedit_train.callbacks",
        "SubjectValues": "kedit_train.callbacks",
        "GradientMask": "kedit_train.callbacks",
        "MaskScore": "kedit_train.callbacks",
        "TokenLoss": "kedit_train.callbacks",
        "TokenSmoothing": "kedit_train.callbacks",
        "ContextTeacher": "kedit_train.callbacks",
        "ForgetFirst": "kedit_train.callbacks",
        "ForgetTraining": "kedit_train.callbacks",
        "KLLocality": "kedit_train.callbacks",
        "BatchAnchor": "kedit_train.callbacks",
        "ForgettingBudget": "kedit_train.callbacks",
        "Texts": "kedit_train.callbacks",
        "Teacher": "kedit_train.callbacks",
        "ReferenceCache": "kedit_train.callbacks",
        "NormBall": "kedit_train.callbacks",
        "WeightAnchor": "kedit_train.callbacks",
        "NullSpace": "kedit_train.callbacks",
        "LowCurvature": "kedit_train.callbacks",
        "SecondOrderLocality": "kedit_train.callbacks",
        "PolyakStep": "kedit_train.callbacks",
        "EditMetrics": "kedit_train.callbacks",
        "StopWhenEdited": "kedit_train.callbacks",
        "SaveDelta": "kedit_train.callbacks",
        "PrefixCache": "kedit_train.callbacks",
        "ActiveSet": "kedit_train.callbacks",
        "editing": "kedit_train.callbacks",
    },
    "Trainers and modules": {
        "EditSFTTrainer": "kedit_train.trainers",
        "EditSFTConfig": "kedit_train.trainers",
        "EditModule": "kedit_train.modules",
        "EditDataModule": "kedit_train.modules",
        "AugmentationOptions": "kedit_train.augmentation",
    },
    "Evaluation": {
        "evaluate": "kedit_train.evaluation",
        "EvaluationOptions": "kedit_train.evaluation",
        "Report": "kedit_train.evaluation",
        "generate_answers": "kedit_train.evaluation",
        "CapabilityProbe": "kedit_train.evaluation.scoring.capability",
    },
    "Single, batch, sequential and streaming edits": {
        "run_edits": "kedit_train.modes",
        "TrainLoop": "kedit_train.modes",
        "survey": "kedit_train.modes",
        "tune": "kedit_train.modes",
    },
    "Edits as files": {
        "EditDelta": "kedit_train.delta",
        "TaskVector": "kedit_train.delta",
        "merge": "kedit_train.delta",
        "sweep": "kedit_train.delta",
    },
}
PUBLIC_NAMES = {name: module for names in PUBLIC_SECTIONS.values() for name, module in names.items()}

__all__ = [
    "ActiveSet",
    "AugmentationOptions",
    "BatchAnchor",
    "CapabilityProbe",
    "ChatFormat",
    "ContextTeacher",
    "Edit",
    "EditCallback",
    "EditCollator",
    "EditDataModule",
    "EditDataset",
    "EditDelta",
    "EditError",
    "EditMetrics",
    "EditModule",
    "EditSFTConfig",
    "EditSFTTrainer",
    "EvaluationOptions",
    "ForgetFirst",
    "ForgetTraining",
    "ForgettingBudget",
    "GradientMask",
    "KLLocality",
    "LowCurvature",
    "MaskScore",
    "NormBall",
    "NullSpace",
    "ParameterScope",
    "PolyakStep",
    "PrefixCache",
    "Probe",
    "ReferenceCache",
    "Report",
    "SaveDelta",
    "SecondOrderLocality",
    "StopWhenEdited",
    "SubjectTokens",
    "SubjectValues",
    "TaskVector",
    "Teacher",
    "Texts",
    "TokenLoss",
    "TokenSmoothing",
    "TrainLoop",
    "WeightAnchor",
    "editing",
    "evaluate",
    "generate_answers",
    "load_model",
    "merge",
    "run_edits",
    "survey",
    "sweep",
    "tune",
    "world",
]


def __getattr__(name: str) -> Any:
    # A name is imported when it is first used, so that reading edits does not import a training framework.
    if name not in PUBLIC_NAMES:
        raise AttributeError(f"module 'kedit_train' has no attribute {name!r}")
    if name == "world":
        return import_module("kedit_train.world")
    return getattr(import_module(PUBLIC_NAMES[name]), name)


def __dir__() -> list[str]:
    return __all__
