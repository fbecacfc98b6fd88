"""The one table that every callback joins; from it each is run through every host."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

from kedit_train import callbacks
from kedit_train.callbacks import (
    ActiveSet,
    BatchAnchor,
    EditMetrics,
    ForgetFirst,
    ForgetTraining,
    GradientMask,
    KLLocality,
    LowCurvature,
    MaskScore,
    NormBall,
    NullSpace,
    ParameterScope,
    PrefixCache,
    SaveDelta,
    StopWhenEdited,
    TokenLoss,
    TokenSmoothing,
    WeightAnchor,
)
from kedit_train.evaluation.options import EvaluationOptions

SHORT = EvaluationOptions(max_new_tokens=8)
TEXTS = ["The old baker found a coin near the river.", "A red fox slept.", "Where is the bridge? Answer: far away"]

# Name (of the class, and what it is set to) -> a list with the callback (and what it cannot work without), made anew
# for every run from the edits.
SETTINGS: dict[str, Callable[[Any], list[Any]]] = {
    "ParameterScope": lambda edits: [ParameterScope(layers=0.5, modules="mlp.down_proj")],
    "TokenLoss": lambda edits: [TokenLoss("dft", epsilon=0.05)],
    "TokenSmoothing": lambda edits: [TokenSmoothing()],
    "KLLocality": lambda edits: [KLLocality(texts=TEXTS, weight=10.0, batch_size=2)],
    "BatchAnchor": lambda edits: [BatchAnchor(weight=10.0)],
    # Their scope is the first setting's, so that all can be on one list.
    "NullSpace": lambda edits: [
        NullSpace(texts=TEXTS, batch_size=2),
        ParameterScope(layers=0.5, modules="mlp.down_proj"),
    ],
    "LowCurvature": lambda edits: [
        LowCurvature(texts=TEXTS, batch_size=2),
        ParameterScope(layers=0.5, modules="mlp.down_proj"),
    ],
    "NormBall": lambda edits: [NormBall(radius=1e-3)],
    "GradientMask": lambda edits: [GradientMask(MaskScore("gradient", limit=4), density=0.2, edits=edits)],
    "WeightAnchor": lambda edits: [WeightAnchor("ewc", strength=100.0, texts=TEXTS)],
    "ForgetFirst": lambda edits: [
        ForgetFirst(
            TEXTS, edits=edits, max_probability=0.999, max_perplexity_ratio=9.0, training=ForgetTraining(epochs=3)
        ),
        ParameterScope(layers=0.5, modules="mlp.down_proj"),
    ],
    "PrefixCache": lambda edits: [PrefixCache(), ParameterScope(layers=0.5, modules="mlp.down_proj")],
    "ActiveSet": lambda edits: [ActiveSet(recheck=1), TokenSmoothing()],
    "EditMetrics": lambda edits: [EditMetrics(edits, every_n_steps=2, show=False, evaluation=SHORT)],
    "SaveDelta": lambda edits: [SaveDelta(f"{tempfile.mkdtemp()}/edit.safetensors", edits=edits)],
    "StopWhenEdited": lambda edits: [
        StopWhenEdited(loss=None, idle_steps=50),
        TokenSmoothing(),
    ],
}


def public_callbacks() -> set[str]:
    """Every callback that users can import, the base class aside."""
    return {
        name
        for name in callbacks.__all__
        if isinstance(getattr(callbacks, name), type) and issubclass(getattr(callbacks, name), callbacks.EditCallback)
    } - {"EditCallback"}
