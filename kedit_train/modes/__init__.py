"""Editing modes: single, batch, sequential and streaming edits, evaluated with the same probes."""

from kedit_train.modes.result import Checkpoint, ModeResult, retention_curve
from kedit_train.modes.runner import run_edits
from kedit_train.modes.schedule import Mode, ScheduleStep, make_schedule
from kedit_train.modes.survey_metrics import SurveyMetrics, retainability, scalability, survey
from kedit_train.modes.train_loop import ExampleOptions, TrainLoop

__all__ = [
    "Checkpoint",
    "ExampleOptions",
    "Mode",
    "ModeResult",
    "ScheduleStep",
    "SurveyMetrics",
    "TrainLoop",
    "make_schedule",
    "retainability",
    "retention_curve",
    "run_edits",
    "scalability",
    "survey",
]
