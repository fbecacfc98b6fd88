"""Did it take, and what did it cost? What the model says before and after, scored and kept."""

from kedit_train.evaluation.asking.generate import Answer, generate_answers
from kedit_train.evaluation.evaluator import evaluate
from kedit_train.evaluation.options import EvaluationOptions
from kedit_train.evaluation.report import Report
from kedit_train.evaluation.scoring.bootstrap import EditMean, Score
from kedit_train.evaluation.scoring.normalize import contains, exact_match, normalise

__all__ = [
    "Answer",
    "EditMean",
    "EvaluationOptions",
    "Report",
    "Score",
    "contains",
    "evaluate",
    "exact_match",
    "generate_answers",
    "normalise",
]
