"""Single, batch, sequential and streaming edits, compared by the same questions."""

from kedit_train.modes.result import Checkpoint, ModeResult
from kedit_train.modes.retention_curve import retention_curve
from kedit_train.modes.runner import run_edits
from kedit_train.modes.schedule import Mode, Round, rounds
from kedit_train.modes.survey_metrics import SurveyMetrics, retainability, scalability, survey
from kedit_train.modes.train_loop import TrainLoop

__all__ = [
    "Checkpoint",
    "Mode",
    "ModeResult",
    "Round",
    "SurveyMetrics",
    "TrainLoop",
    "retainability",
    "retention_curve",
    "rounds",
    "run_edits",
    "scalability",
    "survey",
]
