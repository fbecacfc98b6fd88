"""The table of callbacks that the conformance tests run in every host."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from kedit_train import callbacks, world
from kedit_train.callbacks import (
    ActiveSet,
    BatchAnchor,
    ContextTeacher,
    EditMetrics,
    ForecastMetrics,
    ForgetFirst,
    ForgettingBudget,
    ForgetTraining,
    GatedAdapter,
    GradientMask,
    KLLocality,
    LowCurvature,
    MaskScore,
    NormBall,
    NullSpace,
    OutputAnchor,
    ParameterScope,
    PolyakStep,
    PrefixCache,
    SaveDelta,
    SecondOrderLocality,
    StopWhenEdited,
    SubjectTokens,
    SubjectValues,
    TokenLoss,
    TokenSmoothing,
    WeightAnchor,
)
from kedit_train.evaluation.options import EvaluationOptions

SHORT = EvaluationOptions(max_new_tokens=8)
TEXTS = ["The old baker found a coin near the river.", "A red fox slept.", "Where is the bridge? Answer: far away"]


def token_inputs() -> list[dict[str, torch.Tensor]]:
    """Return the inputs of two forward passes of a causal language model, without padding."""
    return [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in torch.arange(4, 28).view(2, 2, 6)]


def mean_logits(output: Any) -> torch.Tensor:
    return output.logits.mean(-1)


# Name of the callback -> a function of the edits that returns a new instance, with the callbacks that it requires.
SETTINGS: dict[str, Callable[[Any], list[Any]]] = {
    "ParameterScope": lambda edits: [ParameterScope(layers=0.5, modules="mlp.down_proj")],
    "TokenLoss": lambda edits: [TokenLoss("dft", epsilon=0.05)],
    "TokenSmoothing": lambda edits: [TokenSmoothing()],
    "KLLocality": lambda edits: [KLLocality(texts=TEXTS, weight=10.0, batch_size=2)],
    "BatchAnchor": lambda edits: [BatchAnchor(weight=10.0)],
    # The same scope as in the first setting, so that all callbacks can be on one list.
    "NullSpace": lambda edits: [
        NullSpace(texts=TEXTS, batch_size=2),
        ParameterScope(layers=0.5, modules="mlp.down_proj"),
    ],
    "LowCurvature": lambda edits: [
        LowCurvature(texts=TEXTS, batch_size=2),
        ParameterScope(layers=0.5, modules="mlp.down_proj"),
    ],
    "SecondOrderLocality": lambda edits: [
        SecondOrderLocality(texts=TEXTS, batch_size=2),
        ParameterScope(layers=0.5, modules="mlp.down_proj"),
        TokenSmoothing(),
    ],
    "PolyakStep": lambda edits: [
        PolyakStep(step_size=0.05),
        ParameterScope(layers=0.5, modules="mlp.down_proj"),
        TokenSmoothing(),
    ],
    "NormBall": lambda edits: [NormBall(radius=1e-3)],
    "GradientMask": lambda edits: [GradientMask(MaskScore("gradient", limit=4), density=0.2, edits=edits)],
    "WeightAnchor": lambda edits: [WeightAnchor("ewc", strength=100.0, texts=TEXTS)],
    "WeightAnchor (K-FAC)": lambda edits: [
        WeightAnchor("kfac", strength=100.0, texts=TEXTS),
        ParameterScope(layers=0.5, modules="mlp.down_proj"),
    ],
    "SubjectTokens": lambda edits: [
        SubjectTokens(edits=edits),
        ParameterScope(layers=0.5, modules="mlp.down_proj.weight"),
    ],
    "SubjectValues": lambda edits: [
        SubjectValues(texts=TEXTS, edits=edits, batch_size=2),
        ParameterScope(layers=0.5, modules="mlp.down_proj"),
        TokenSmoothing(),
    ],
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
    # The bundled model follows no fact in its context. The teacher then teaches later tokens and ends of answers.
    "ContextTeacher": lambda edits: [ContextTeacher(edits, min_followed=0.0)],
    # The outputs of these models are logits. The anchor compares them like the outputs of a forecaster.
    "OutputAnchor": lambda edits: [OutputAnchor(token_inputs(), distance="kl", weight=20.0, output="logits")],
    "ForecastMetrics": lambda edits: [
        ForecastMetrics(
            (token_inputs(), [torch.zeros(2, 6)] * 2), kept=token_inputs(), every_n_steps=2, output=mean_logits
        )
    ],
    # A few steps stay below this budget, so the weight falls.
    "ForgettingBudget": lambda edits: [ForgettingBudget(5.0, measured_on="batch"), BatchAnchor(weight=50.0)],
}

# Callbacks that need a model with a LoRA adapter.
ADAPTED: dict[str, Callable[[Any], list[Any]]] = {
    "GatedAdapter": lambda edits: [
        GatedAdapter(TEXTS, edits=edits, batch_size=2),
        ParameterScope(layers=0.5, modules="mlp.down_proj"),
    ],
}
ALL = SETTINGS | ADAPTED


def load(callback: str) -> tuple[Any, Any]:
    """Return the bundled model and its tokenizer, with the LoRA adapter that a callback needs."""
    model, tokenizer = world.load()
    if callback not in ADAPTED:
        return model, tokenizer
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=32, target_modules=["down_proj"], layers_to_transform=[3], task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config), tokenizer


def in_scope(names: Iterable[str]) -> set[str]:
    """Return the parameters that ParameterScope(layers=0.5, modules="mlp.down_proj") selects in these models."""
    return {name for name in names if "layers.3.mlp.down_proj" in name and "base_layer" not in name}


def one_host_each(names: Iterable[str], hosts: Iterable[str], only: Iterable[str] = SETTINGS) -> list[Any]:
    """Return test parameters for all pairs of callback and host. The default run takes only some of the pairs.

    The default run takes each callback of ``only`` in one host, and the next callback in the next host. The other pairs
    are marked as slow.
    """
    hosts, only, parameters = list(hosts), set(only), []
    for i, name in enumerate(names):
        for host in hosts:
            in_default_run = name in only and host == hosts[i % len(hosts)]
            marks = () if in_default_run else pytest.mark.slow
            parameters.append(pytest.param(name, host, id=f"{name}-{host}", marks=marks))
    return parameters


def public_callbacks() -> set[str]:
    """Return the names of all public callbacks except the base class."""
    return {
        name
        for name in callbacks.__all__
        if isinstance(getattr(callbacks, name), type) and issubclass(getattr(callbacks, name), callbacks.EditCallback)
    } - {"EditCallback"}
