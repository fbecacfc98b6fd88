"""The editing modes (single, batch, sequential and streaming), and a search for the best settings for a model."""

from kedit_train.modes.result import Checkpoint, ModeResult, retention_curve
from kedit_train.modes.runner import run_edits
from kedit_train.modes.schedule import Mode, ScheduleStep, make_schedule
from kedit_train.modes.survey_metrics import SurveyMetrics, retainability, scalability, survey
from kedit_train.modes.train_loop import ExampleOptions, TrainLoop
from kedit_train.modes.tuning.result import TuneResult
from kedit_train.modes.tuning.settings import TuneGrid
from kedit_train.modes.tuning.tuner import tune

__all__ = [
    "Checkpoint",
    "ExampleOptions",
    "Mode",
    "ModeResult",
    "ScheduleStep",
    "SurveyMetrics",
    "TrainLoop",
    "TuneGrid",
    "TuneResult",
    "make_schedule",
    "retainability",
    "retention_curve",
    "run_edits",
    "scalability",
    "survey",
    "tune",
]
