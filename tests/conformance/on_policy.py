"""Trainers of TRL that train on completions which the model generates itself, as training loops for the callbacks."""

from __future__ import annotations

import functools
import tempfile
from difflib import SequenceMatcher
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.hosts import ARGUMENTS
from installed import older
from transformers import AutoModelForCausalLM, AutoTokenizer

from kedit_train import world
from kedit_train.callbacks import ParameterScope
from kedit_train.data import EditDataset

PROMPTS = 8
# The fact precedes the prompt, so that the teacher completes the prompt.
TEMPLATE = "{privileged_context} {prompt}"
TEMPERATURE = 2.0
TRAINERS = ("SDFT", "Distillation", "GRPO", "RLOO")
SCOPE = {f"model.layers.{i}.mlp.down_proj.weight" for i in (2, 3)}
# The default run takes one trainer with a teacher and one with rewards.
SOME = [kind if kind in ("SDFT", "GRPO") else pytest.param(kind, marks=pytest.mark.slow) for kind in TRAINERS]


@functools.cache
def checkpoint() -> Path:
    """Return a folder with the bundled model, because TRL loads a teacher or a reference model from a path."""
    folder = Path(tempfile.mkdtemp())
    for part in world.load():
        part.save_pretrained(folder)
    return folder


@functools.cache
def edits() -> EditDataset:
    return EditDataset(world.edits(n=PROMPTS))


def student() -> tuple[Any, Any]:
    """Return the bundled model and its tokenizer, loaded from a path."""
    return AutoModelForCausalLM.from_pretrained(checkpoint()), AutoTokenizer.from_pretrained(checkpoint())


def teacher(shift: float = 0.1) -> Any:
    """Return a teacher for ``DistillationTrainer``: the bundled model with noise in its down-projections."""
    model, generator = student()[0], torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "down_proj" in name:
                parameter += shift * torch.randn(parameter.shape, generator=generator)
    return model


def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """Return for each completion how similar it is to the target of the edit, from 0 to 1."""
    targets = {edit.prompt: edit.target for edit in edits()}
    pairs = zip(prompts, completions, strict=True)
    return [SequenceMatcher(None, targets[prompt], completion.strip()).ratio() for prompt, completion in pairs]


def trainer(kind: str, model: Any, tokenizer: Any, callbacks: list[Any], steps: int, **extra: Any) -> Any:
    """Return a trainer of the given kind that samples four completions for each of two prompts in a step."""
    import trl

    if kind in ("SDFT", "Distillation") and older("trl", "1.16"):
        pytest.skip(f"trl {trl.__version__} has no {kind}Trainer")
    module: Any = import_module("trl.experimental.sdft") if kind == "SDFT" else trl
    generates = {} if kind == "Distillation" else {"num_generations": 4}
    own: dict[str, Any] = {
        # Forward KL on the whole vocabulary, from which the student learns faster than from TRL's default loss.
        "SDFT": {"teacher_prompt_template": TEMPLATE, "distillation_mode": "full_logits", "distillation_alpha": 0.0},
        "Distillation": {"beta": 0.0},
        # The bundled model is certain of its answers, so completions of one prompt differ only at a high temperature.
        "GRPO": {"temperature": TEMPERATURE},
        "RLOO": {"temperature": TEMPERATURE},
    }
    options = ARGUMENTS | {"output_dir": tempfile.mkdtemp(), "max_steps": steps, "per_device_train_batch_size": 8}
    options |= {"max_completion_length": 6} | generates | own[kind]
    given = {name: extra.pop(name) for name in ("peft_config", "teacher_model", "reward_funcs") if name in extra}
    if kind == "Distillation":
        given = {"teacher_model": teacher(), **given}
    elif kind != "SDFT":
        given = {"reward_funcs": reward, **given}
    return getattr(module, f"{kind}Trainer")(
        model=model,
        args=getattr(module, f"{kind}Config")(**(options | extra)),
        train_dataset=edits().to_privileged_context(),
        processing_class=tokenizer,
        callbacks=callbacks,
        **given,
    )


def scope() -> ParameterScope:
    return ParameterScope(layers="2-3", modules="mlp.down_proj")


def train(kind: str, callbacks: list[Any], steps: int = 3, **extra: Any) -> Any:
    model, tokenizer = student()
    used = trainer(kind, model, tokenizer, callbacks, steps, **extra)
    used.train()
    return used
