"""Representation editing: train a value function on hidden states, and control generation with its gradient.

The answers of a language model change, but its weights stay the same (RE-Control, arXiv 2406.05954). See
``docs/representation_control.md``.
"""

from kedit_train.control.control_metrics import ControlMetrics, measure_control
from kedit_train.control.controlled import Control, controlled
from kedit_train.control.response_data import ResponseDataModule
from kedit_train.control.responses import SamplingOptions
from kedit_train.control.rewards import FactReward, PatternReward, Reward, ShortAnswer
from kedit_train.control.value import ValueModel
from kedit_train.control.value_module import ValueModule

__all__ = [
    "Control",
    "ControlMetrics",
    "FactReward",
    "PatternReward",
    "ResponseDataModule",
    "Reward",
    "SamplingOptions",
    "ShortAnswer",
    "ValueModel",
    "ValueModule",
    "controlled",
    "measure_control",
]
