"""Callbacks that turn a training run into a knowledge edit of the model."""

from kedit_train.callbacks.active_set import ActiveSet
from kedit_train.callbacks.base import EditCallback
from kedit_train.callbacks.batch_anchor import BatchAnchor
from kedit_train.callbacks.context_teacher import ContextTeacher
from kedit_train.callbacks.edit_metrics import EditMetrics
from kedit_train.callbacks.forecast_metrics import ForecastMetrics
from kedit_train.callbacks.forget_first import ForgetFirst
from kedit_train.callbacks.forgetting_budget import ForgettingBudget
from kedit_train.callbacks.gated_adapter import GatedAdapter
from kedit_train.callbacks.gradient_mask import GradientMask
from kedit_train.callbacks.hosts.loop import editing
from kedit_train.callbacks.kl_locality import KLLocality
from kedit_train.callbacks.low_curvature import LowCurvature
from kedit_train.callbacks.norm_ball import NormBall
from kedit_train.callbacks.null_space import NullSpace
from kedit_train.callbacks.output_anchor import OutputAnchor
from kedit_train.callbacks.parameter_scope import ParameterScope
from kedit_train.callbacks.polyak_step import PolyakStep
from kedit_train.callbacks.prefix_cache import PrefixCache
from kedit_train.callbacks.save_delta import SaveDelta
from kedit_train.callbacks.second_order_locality import SecondOrderLocality
from kedit_train.callbacks.stop_when_edited import StopWhenEdited
from kedit_train.callbacks.subject_tokens import SubjectTokens
from kedit_train.callbacks.subject_values import SubjectValues
from kedit_train.callbacks.token_loss import TokenLoss
from kedit_train.callbacks.token_smoothing import TokenSmoothing
from kedit_train.callbacks.weight_anchor import WeightAnchor
from kedit_train.core.locality.reference_cache import ReferenceCache
from kedit_train.core.locality.teacher import Teacher
from kedit_train.core.locality.texts import Texts
from kedit_train.core.scope.mask_scores import MaskScore
from kedit_train.core.tokens.old_answer_training import ForgetTraining

__all__ = [
    "ActiveSet",
    "BatchAnchor",
    "ContextTeacher",
    "EditCallback",
    "EditMetrics",
    "ForecastMetrics",
    "ForgetFirst",
    "ForgetTraining",
    "ForgettingBudget",
    "GatedAdapter",
    "GradientMask",
    "KLLocality",
    "LowCurvature",
    "MaskScore",
    "NormBall",
    "NullSpace",
    "OutputAnchor",
    "ParameterScope",
    "PolyakStep",
    "PrefixCache",
    "ReferenceCache",
    "SaveDelta",
    "SecondOrderLocality",
    "StopWhenEdited",
    "SubjectTokens",
    "SubjectValues",
    "Teacher",
    "Texts",
    "TokenLoss",
    "TokenSmoothing",
    "WeightAnchor",
    "editing",
]
