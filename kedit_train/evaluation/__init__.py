"""Evaluation of edited models: probes, scores with confidence intervals, and reports."""

from typing import TYPE_CHECKING, Any

from kedit_train.evaluation.asking.generate import Answer, generate_answers
from kedit_train.evaluation.evaluator import evaluate
from kedit_train.evaluation.options import EvaluationOptions
from kedit_train.evaluation.report import Report
from kedit_train.evaluation.scoring.bootstrap import Score
from kedit_train.evaluation.scoring.capability import Capability, CapabilityProbe
from kedit_train.evaluation.scoring.lm_eval_tasks import LmEvalTasks
from kedit_train.evaluation.scoring.normalize import contains, exact_match, normalize

if TYPE_CHECKING:
    from kedit_train.evaluation.scoring.mean_over_edits import MeanOverEdits

__all__ = [
    "Answer",
    "Capability",
    "CapabilityProbe",
    "EvaluationOptions",
    "LmEvalTasks",
    "MeanOverEdits",
    "Report",
    "Score",
    "contains",
    "evaluate",
    "exact_match",
    "generate_answers",
    "normalize",
]


def __getattr__(name: str) -> Any:
    # MeanOverEdits is imported only when it is first used, because its module imports torchmetrics.
    if name != "MeanOverEdits":
        raise AttributeError(f"module 'kedit_train.evaluation' has no attribute {name!r}")
    from kedit_train.evaluation.scoring.mean_over_edits import MeanOverEdits

    return MeanOverEdits
