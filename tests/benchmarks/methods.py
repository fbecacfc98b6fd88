"""The recipes as methods: each file of recipes/ as ``train(model, edits)`` on a model of settings.py.

Callbacks, epochs and stopping rule are those of the recipe. Texts and batch size, which depend on the model, are
replaced. On the two small models, the learning rate is that of the recipe.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from settings import Setting
from torch import nn

from kedit_train import world
from kedit_train.augmentation import augmentation
from kedit_train.callbacks import (
    EditCallback,
    EditMetrics,
    KLLocality,
    LowCurvature,
    NormBall,
    NullSpace,
    SaveDelta,
    Texts,
    TokenLoss,
)
from kedit_train.cli import recipe
from kedit_train.data import Edit
from kedit_train.modes import ExampleOptions, TrainLoop
from kedit_train.pretrained import lora_config
from kedit_train.world.counterfactual import EDITS as WORLD_EDITS

RECIPES = (
    "ft_m", "ft_l", "ft_l_inf", "low_layer", "masked_fisher", "locft_bf", "overtone", "overtone_lora", "kl_locality",
    "null_space", "replay", "f_learning", "kedit_default", "second_order", "one_by_one",
)  # fmt: skip
# Callbacks, learning rate and epochs of these recipes are those of recipes/one_by_one.py, without and with its option
# --subject_tokens, and with --keep subject_values.
ONE_BY_ONE, ONE_BY_ONE_SUBJECT, ONE_BY_ONE_VALUES = SCRIPTED = (
    "one_by_one",
    "one_by_one_subject",
    "one_by_one_values",
)
# Methods without a file of their own, and the recipe whose settings they share: LowCurvature in place of NullSpace,
# LoRA without callbacks, and two pseudo-paraphrases per edit.
VARIANTS = {
    **dict.fromkeys(SCRIPTED, "kedit_default"),
    "low_curvature": "null_space",
    "plain_lora": "overtone_lora",
    "subject_values_prefixes": "subject_values",
}
# The settings in which a method differs from the recipe whose settings it shares.
VARIANT_SETTINGS = {"subject_values_prefixes": "--data.augmentation.prefixes=2"}
# The pretrained model is a hundred times as large as the world, so fewer recipes are compared on it.
ON_SMOLLM2 = (
    "ft_m", "locft_bf", "overtone", "plain_lora", "overtone_lora", "kl_locality", "null_space", "low_curvature",
    "replay", "second_order", "kedit_default", "subject_tokens", "subject_values",
    "subject_values_prefixes", *SCRIPTED,
)  # fmt: skip
# Which modes a recipe is compared in, if not in all.
ONLY = {
    "kedit_default": ("batch",),
    "second_order": ("batch",),
    "subject_tokens": ("batch",),
    "subject_values": ("batch",),
    "subject_values_prefixes": ("batch",),
    **dict.fromkeys(SCRIPTED, ("single", "sequential")),
}
ALL_MODES_ON_SMOLLM2 = ("ft_m", "overtone", "kl_locality", *SCRIPTED)
# The learning rates of the recipes were chosen on the world. These were chosen on SmolLM2 with 15 edits of a held-out
# draw (compare.py tune --model smollm2 --edits 15 --texts 100), for ft_m, overtone, null_space and overtone_lora: the
# rate with the largest product of reliability, PS and the fraction of other facts whose first tokens are kept. The
# other recipes have the rate of the one with the same kind of training. Second-order steps need no learning rate.
LEARNING_RATES: dict[str, dict[str, float]] = {
    "smollm2": {
        "ft_m": 2e-3,
        "locft_bf": 2e-3,
        "overtone": 2e-3,
        "plain_lora": 5e-4,
        "overtone_lora": 5e-4,
        "null_space": 5e-3,
        "low_curvature": 5e-3,
        "kl_locality": 2e-3,
        "replay": 2e-3,
    }
}
# Other settings of a recipe on a model: fewer texts per step, so that a run takes minutes.
OTHERWISE = {"smollm2": {"kl_locality": "trainer.callbacks.KLLocality.batch_size=8"}}
# How many of its texts a recipe reads on a model, so that a run takes minutes. The first 600 are passages of
# prose and statements of facts in turn, and all others are statements.
TEXTS: dict[str, dict[str, int]] = {
    "smollm2": {
        **dict.fromkeys(("second_order", "null_space", "low_curvature", "kl_locality"), 700),
        **dict.fromkeys(SCRIPTED, 1000),
    }
}
# A single edit is trained with a fifth of the learning rate and ten times the KL weight, because the gradients of a
# batch partly cancel and those of one edit do not. Its texts for the KL penalty are the most similar ones.
ALONE, ALONE_KL, ALONE_TEXTS, NEAREST = 0.2, 10.0, 256, 24
# one_by_one.py trains with half of its learning rate and without NormBall if every edit starts from the unedited model.
ALONE_RATE = 0.5


def recipes_of(model: str) -> tuple[str, ...]:
    """Return the recipes that are compared on a model by default."""
    return {"smollm2": ON_SMOLLM2, "smollm2_zsre": ("ft_m",)}.get(model, RECIPES)


def modes_of(model: str, name: str, modes: Sequence[str]) -> list[str]:
    """Return the modes in which a recipe is compared on a model."""
    if model == "smollm2_zsre" or (model == "smollm2" and name not in ALL_MODES_ON_SMOLLM2):
        modes = [mode for mode in modes if mode == "batch"]
    return [mode for mode in modes if mode in ONLY.get(name, modes)]


def judged(model: str) -> tuple[str, str, str]:
    """Return the scores that count: tune maximizes their product, and the report marks the recipes on their front.

    SmolLM2 does not end its answers, so the first tokens of other answers count. It seldom gives the new answer to a
    rephrased prompt, so PS counts: for how many of these prompts the new answer is more probable than the old one.
    """
    return ("reliability", "PS", "others") if model == "smollm2" else ("reliability", "generality", "locality")


def one_by_one() -> Any:
    """Return the module recipes/one_by_one.py."""
    folder = str(Path(__file__).resolve().parents[2] / "recipes")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("one_by_one")


def load_recipe(name: str, *given: str, model: str = world.NAME) -> Any:
    """Return the configuration of a recipe, with its learning rate and its other settings for a model.

    For the script one_by_one.py, this supplies only the data.
    """
    rate, other = (table.get(model.removesuffix("_zsre"), {}).get(name) for table in (LEARNING_RATES, OTHERWISE))
    own = [] if rate is None else [f"--model.learning_rate={rate}"]
    own += [] if other is None else [f"--{other}"]
    own += [VARIANT_SETTINGS[name]] if name in VARIANT_SETTINGS else []
    return recipe.load(VARIANTS.get(name, name), *own, *given)


def variant(name: str, callbacks: list[Any]) -> list[Any]:
    """Return the callbacks of a method that has no file of its own."""
    if name == "plain_lora":
        # This is the cross-entropy of the training loop. It is a callback, because the loop needs a callback for its
        # loss.
        return [TokenLoss(reduction="sample")]
    if name == "low_curvature":
        return [
            LowCurvature(each.texts, energy=each.energy, batch_size=16) if isinstance(each, NullSpace) else each
            for each in callbacks
        ]
    return callbacks


class Method:
    """A recipe as ``train(model, edits)``.

    Args:
        setting: the model with its edits.
        model, tokenizer: the reference model and its tokenizer.
        name, config: name of the recipe, and the result of :func:`load_recipe`.
        scored: all edits of the run; texts with their scored prompts are not trained on.
        mode: mode of ``run_edits``.
        texts: how many texts the recipe may read. None: the number in ``TEXTS``, or all texts.
    """

    def __init__(
        self,
        setting: Setting,
        model: nn.Module,
        tokenizer: Any,
        name: str,
        config: Any,
        scored: Sequence[Edit],
        mode: str,
        texts: int | None = None,
    ) -> None:
        self.setting, self.tokenizer, self.config = setting, tokenizer, config
        alone = mode in ("single", "sequential")
        # Reference hidden states are computed for every single edit, and once for a sequence.
        limit = TEXTS.get(setting.name, {}).get(name) if texts is None else texts
        self.texts = setting.texts(scored)[: ALONE_TEXTS if mode == "single" else limit]
        self.lr = config.model.init_args.learning_rate * (ALONE if alone else 1.0)
        data = config.data.init_args
        self.extra: Any = ()
        options = data.augmentation
        if options.prefixes or options.replay or options.rewrite is not None:
            # As many other facts per edit as in the recipe.
            share = (options.replay_limit or 0) / (data.limit or WORLD_EDITS)
            rows = round(share * (1 if alone else len(scored))) if options.replay else None
            prompts = self.setting.prompts(scored) if options.replay else None
            self.extra = augmentation(
                model,
                tokenizer,
                scored,
                prefixes=options.prefixes,
                replay=prompts,
                replay_limit=rows,
                rewrite=options.rewrite,
                seed=0,
            )
            print(self.extra.summary, file=sys.stderr, flush=True)
        self.adapter, self.epochs = config.model.init_args.lora, config.trainer.max_epochs
        self.beside: dict[str | None, list[str]] = {}
        self.made: list[Any] = variant(name, list(recipe.callbacks(config)))
        if name in SCRIPTED:
            script = one_by_one()
            subject_tokens = name == ONE_BY_ONE_SUBJECT
            if name == ONE_BY_ONE_VALUES:
                self.made = script.subject_values(world.NAME)
            elif subject_tokens or setting.name.startswith("smollm2"):
                self.made = script.null_space(world.NAME, subject_tokens=subject_tokens)
            else:
                self.made = [*script.learning(), *script.constraints(world.NAME, script.BALL)]
            own: float = script.LEARNING_RATE
            self.lr = LEARNING_RATES.get(setting.name, {}).get(name, own)
            self.epochs = script.EPOCHS
            if mode == "single":
                self.lr *= ALONE_RATE
                self.made = [callback for callback in self.made if not isinstance(callback, NormBall)]
        for callback in self.made:
            if isinstance(callback, KLLocality) and alone and name not in SCRIPTED:
                callback.weight *= ALONE_KL
            if isinstance(callback, KLLocality) and mode == "single":
                callback.texts = replace(callback.texts, nearest=NEAREST)
                self.beside = {edit.id: setting.texts([edit]) for edit in scored}
            if hasattr(callback, "sequential"):
                callback.sequential = mode == "sequential"
            if isinstance(held := getattr(callback, "texts", None), Texts) and held.of_world:
                callback.texts = replace(held, source=self.texts)

    def __call__(self, model: nn.Module, edits: Sequence[Edit]) -> None:
        examples = self.extra(edits) if self.extra else ()
        batch = self.setting.batch_size * (1 + len(examples) // max(1, len(edits)))
        loop = TrainLoop(
            self.tokenizer,
            callbacks=self.callbacks(edits),
            epochs=self.epochs,
            batch_size=batch,
            learning_rate=self.lr,
            stop_loss=0.0,
            examples=ExampleOptions(append_eos=self.config.data.init_args.append_eos, extra_edits=self.extra),
        )
        if self.adapter is None:
            loop(model, edits)
            return
        from peft import get_peft_model

        trained = [p.requires_grad for p in model.parameters()]
        adapted: Any = get_peft_model(model, lora_config(self.adapter))  # type: ignore[arg-type]
        loop(adapted, edits)
        # The original modules of the model, with the merged weights.
        adapted.merge_and_unload()
        for parameter, flag in zip(model.parameters(), trained, strict=True):
            parameter.requires_grad_(flag)

    def callbacks(self, edits: Sequence[Edit]) -> list[EditCallback]:
        """Return the callbacks of the recipe without its reports, because the comparison writes its own."""
        kept = []
        for callback in self.made:
            if isinstance(callback, (EditMetrics, SaveDelta)):
                continue
            if hasattr(callback, "edits"):
                callback.edits = list(edits)
            if isinstance(callback, KLLocality) and callback.texts.nearest:
                callback.texts = replace(callback.texts, source=self.beside[edits[0].id])
            kept.append(callback)
        return kept
