"""Write the picked setting to a recipe (the YAML file of a complete run), and the grid to a W&B sweep file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kedit_train.modes.tuning.halving import Trial
from kedit_train.modes.tuning.settings import BATCH_SIZE, EPOCHS, KL_BATCH_SIZE, STOP_LOSS, TuneGrid

# The comment above each callback.
_COMMENTS = {
    "ParameterScope": "Where may the model change?",
    "TokenLoss": "What is each token trained towards?",
    "NullSpace": "What must stay? The layer outputs on these texts, and on the edits' prompts with other subjects.",
    "KLLocality": "What must stay? A KL penalty on a few of the texts in every step.",
    "PolyakStep": "How long is a step? Its length follows from the loss, so no learning rate is needed.",
    "StopWhenEdited": "Stop when the mean loss over an epoch reaches this value.",
    "EditMetrics": "How well did the edit work?",
}
# The arguments of the recipe that a sweep changes.
_SWEPT = {
    "layers": "ParameterScope.layers",
    "step_sizes": "PolyakStep.step_size",
    "energies": "NullSpace.energy",
    "kl_weights": "KLLocality.weight",
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """The model, the edits and the texts that a recipe uses.

    Args:
        model: the name of the model.
        edits: the file of edits, or "world".
        keep: the file of texts on which predictions should stay the same, or "world".
        path: the file of the recipe.
    """

    model: str
    edits: str
    keep: str
    path: Path


def recipe_text(
    trial: Trial, held_out: Trial, source: Source, rule: str, meta: Mapping[str, Any], *, with_kl: bool = False
) -> str:
    """Return a recipe as YAML with comments.

    Args:
        trial: the picked trial.
        held_out: the scores of the picked setting on the held-out edits.
        source: the model, edits and texts that the recipe uses, and the path of the recipe.
        rule: the rule by which the setting was picked.
        meta: the metadata of the result.
        with_kl: whether the recipe contains ``KLLocality`` even if the picked setting has a KL weight of 0. This is
            needed for a sweep, because a sweep can set the weight only if the recipe contains the callback.
    """
    scores = (("reliability", held_out.reliability), ("generality", held_out.generality))
    scores = (*scores, ("locality", held_out.locality))
    measured = ", ".join(f"{name} {value:.2f}" for name, value in scores if value is not None)
    run = f"runs/{source.path.stem}"
    callbacks = trial.setting.callback_arguments(source.keep)
    if with_kl and not trial.setting.kl_weight:
        callbacks.append(("KLLocality", {"texts": source.keep, "weight": 0.0, "batch_size": KL_BATCH_SIZE}))
    callbacks.append(("StopWhenEdited", {"loss": STOP_LOSS}))
    callbacks.append(("EditMetrics", {"every_n_steps": 0, "report_path": f"{run}/report.json"}))
    lines = [
        "# Settings that kedit tune found for this model and these edits.",
        "#",
        f"#   lightning run {_quoted(str(source.path))}",
        "#   ... --data.path other_edits.jsonl      the same settings for other edits",
        "#   ... --model.save_path edited_model     save the edited model",
        "#",
        f"# Measured on {held_out.edits} held-out edits: {measured}",
        f"# ({meta['date'][:10]}, protocol {meta['protocol']}).",
        "# Locality is the fraction of the first tokens of the unedited model's answers that do not change.",
        f"# Picked by: {rule}.",
        f"seed_everything: {meta['seed']}",
        "model:",
        f"  name: {_yaml(source.model)}",
        "  # PolyakStep sets the length of each step, so the learning rate has no effect.",
        "  learning_rate: 1.0e-3",
        "data:",
        f"  path: {_yaml(source.edits)}",
        f"  batch_size: {BATCH_SIZE}",
        f"  append_eos: {_yaml(meta['append_eos'])}",
        f"  prompt_format: {_yaml(meta['prompt_format'])}",
        "trainer:",
        f"  max_epochs: {EPOCHS}",
        "  logger: false",
        "  enable_checkpointing: false",
        "  enable_model_summary: false",
        "  log_every_n_steps: 4",
        f"  default_root_dir: {_yaml(run)}",
        "  callbacks:",
    ]
    for kind, arguments in callbacks:
        lines += [f"    # {_COMMENTS[kind]}", f"    - class_path: kedit_train.callbacks.{kind}", "      init_args:"]
        lines += [f"        {key}: {_yaml(value)}" for key, value in arguments.items()]
    return "\n".join(lines) + "\n"


def sweep_text(grid: TuneGrid, recipe: Path, path: Path) -> str:
    """Return the text of a W&B sweep file that starts one run for each setting of the grid.

    Args:
        grid: the grid.
        recipe: the recipe that every run starts.
        path: the sweep file. A comment in the text shows the command that starts a sweep with this file.
    """
    command = ["${env}", "${interpreter}", "-m", "${program}", "fit", "--config", str(recipe)]
    command += ["--trainer.logger=WandbLogger", "${args}"]
    lines = [
        f"# wandb sweep {_quoted(str(path))}      prints the id of the sweep",
        "# wandb agent ID                 runs the settings; several agents share them",
        "#",
        "# Each run also logs edit/reliability and edit/generality.",
        "program: kedit_train",
        "method: grid",
        "metric:",
        "  name: edit/locality_tokens_kept",
        "  goal: maximize",
        "parameters:",
    ]
    for name, key in _SWEPT.items():
        values = list(dict.fromkeys(getattr(grid, name)))
        lines += [f"  trainer.callbacks.{key}:", f"    values: [{', '.join(map(_yaml, values))}]"]
    lines += ["command:", *(f"  - {_yaml(word)}" for word in command)]
    return "\n".join(lines) + "\n"


def _quoted(path: str) -> str:
    """Return a path as text for a YAML comment, in quotes if the path contains spaces or control characters."""
    return path if path.isprintable() and " " not in path else _yaml(path)


def _yaml(value: Any) -> str:
    """Return a plain value as YAML on one line."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=not value.isprintable())
    text = json.dumps(value)
    # YAML 1.1 reads 1e-05 as a string.
    return text.replace("e", ".0e") if isinstance(value, float) and "e" in text and "." not in text else text
