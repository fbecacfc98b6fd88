"""The recipes as methods: each file of recipes/ as ``train(model, edits)`` on a small model of facts.

Callbacks, learning rate, epochs and stopping rule are those of the recipe. Only the texts and the batch size, which
depend on the model, are replaced.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kedit_train import EditDataset, world
from kedit_train.augmentation import augmentation
from kedit_train.callbacks import EditCallback, EditMetrics, KLLocality, NormBall, SaveDelta, Texts
from kedit_train.cli import recipe
from kedit_train.data import Edit
from kedit_train.data.leaks import scored_prompts
from kedit_train.errors import EditError
from kedit_train.modes import ExampleOptions, TrainLoop
from kedit_train.pretrained import lora_config
from kedit_train.world.counterfactual import EDITS as WORLD_EDITS

SHARED = Path(__file__).resolve().parents[3] / "shared"
FACTLM = SHARED / "models" / "factlm"
# Hyperparameters are chosen on the edits of these draws, whose results are not reported.
HELD_OUT = 100
RECIPES = (
    "ft_m", "ft_l", "ft_l_inf", "low_layer", "masked_fisher", "locft_bf", "overtone", "overtone_lora", "kl_locality",
    "null_space", "replay", "f_learning", "kedit_default", "second_order", "one_by_one",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A model, its edits by draw, and its texts."""

    name: str
    path: Path
    batch_size: int
    edits: Callable[[int, int], list[Edit]]  # how many, and which draw
    texts: Callable[[Sequence[Edit]], list[str]]  # must stay, and ask for nothing that the edits are scored on
    unrelated: Callable[[], list[str]]  # for the perplexity
    prompts: Callable[[Sequence[Edit]], list[str]]  # of other facts, to be replayed


def one_by_one() -> Any:
    """Return the module recipes/one_by_one.py."""
    folder = str(Path(__file__).resolve().parents[2] / "recipes")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("one_by_one")


def load(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path)


def embedded() -> Setting:
    def texts(edits: Sequence[Edit]) -> list[str]:
        # For a single edit, all texts, so that the nearest can be chosen.
        return world.locality_texts(exclude=edits, n=4096 if len(edits) > 1 else None)

    def edits(n: int, draw: int) -> list[Edit]:
        return world.edits(n, seed=draw)

    return Setting("world", world.path(), 20, edits, texts, lambda: world.prose(100), world.other_prompts)


def factlm() -> Setting:
    """Return CounterFact records whose true answers factlm knows; the held-out draws start at 1,200."""
    if not FACTLM.exists():
        raise EditError(f"there is no model factlm at {FACTLM}; compare on the world only")
    # Every sentence in the training of this model ends with a full stop; edits without it would change that.
    records = [replace(e, target=f"{e.target}.") for e in EditDataset.load(FACTLM / "records.json")]

    def edits(n: int, draw: int) -> list[Edit]:
        # Three draws of 300 edits and nine draws of 100 edits without overlap.
        first = 1200 + (draw - HELD_OUT) * 100 if draw >= HELD_OUT else draw % 3 * 300 + draw // 3 * 100
        return records[first : first + n]

    def others(edits: Sequence[Edit]) -> list[Edit]:
        """Return records that are not edited and whose subjects no probe asks about."""
        mine = {edit.id for edit in edits}
        asked = prompts_of(edits)
        return [e for e in records if e.id not in mine and not any(e.subject and e.subject in p for p in asked)]

    def prompts_of(edits: Sequence[Edit]) -> list[str]:
        return [prompt for edit in edits for prompt in (edit.prompt, *scored_prompts(edit))]

    def texts(edits: Sequence[Edit]) -> list[str]:
        asked = prompts_of(edits)
        subjects = [e.subject for e in edits if e.subject]
        # No text that contains a scored prompt or a subject of the edits.
        true = [f"{e.prompt} {e.old_target}." for e in others(edits)]
        return [t for t in true if not any(word in t for word in (*asked, *subjects))]

    def unrelated() -> list[str]:
        lines = (SHARED / "data" / "text" / "wikitext-2.valid.txt").read_text().splitlines()
        return [line.strip() for line in lines if len(line) > 200][:60]

    def prompts(edits: Sequence[Edit]) -> list[str]:
        return [e.prompt for e in others(edits)]

    return Setting("factlm", FACTLM, 20, edits, texts, unrelated, prompts)


SETTINGS: dict[str, Callable[[], Setting]] = {"world": embedded, "factlm": factlm}


# Callbacks, learning rate and epochs of this recipe are those of recipes/one_by_one.py.
ONE_BY_ONE = "one_by_one"
# A single edit is trained with a fifth of the learning rate and ten times the KL weight, because the gradients of a
# batch partly cancel and those of one edit do not. Its texts for the KL penalty are the most similar ones.
ALONE, ALONE_KL, ALONE_TEXTS, NEAREST = 0.2, 10.0, 256, 24
# Which modes a recipe is compared in, if not in all.
ONLY = {"kedit_default": ("batch",), "second_order": ("batch",), ONE_BY_ONE: ("single", "sequential")}
# one_by_one.py trains with half of its learning rate and without NormBall if every edit starts from the unedited model.
ALONE_RATE = 0.5


def load_recipe(name: str, *given: str) -> Any:
    """Return the configuration of a recipe. For the script one_by_one.py, this supplies only the data."""
    return recipe.load("kedit_default" if name == ONE_BY_ONE else name, *given)


class Method:
    """A recipe as ``train(model, edits)``.

    Args:
        setting: the model with its edits.
        model, tokenizer: the reference model and its tokenizer.
        name, config: name of the recipe, and the result of :func:`load_recipe`.
        scored: all edits of the run; texts with their scored prompts are not trained on.
        mode: mode of ``run_edits``.
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
    ) -> None:
        self.setting, self.tokenizer, self.config = setting, tokenizer, config
        alone = mode in ("single", "sequential")
        # Reference hidden states are computed for every single edit, and once for a sequence.
        self.texts = setting.texts(scored)[: ALONE_TEXTS if mode == "single" else None]
        self.lr = config.model.init_args.learning_rate * (ALONE if alone else 1.0)
        data = config.data.init_args
        self.extra: Any = ()
        options = data.augmentation
        if options.prefixes or options.replay:
            # As many other facts per edit as in the recipe.
            share = (options.replay_limit or 0) / (data.limit or WORLD_EDITS)
            rows = round(share * (1 if alone else len(scored))) if options.replay else None
            prompts = self.setting.prompts(scored) if options.replay else None
            self.extra = augmentation(
                model, tokenizer, scored, prefixes=options.prefixes, replay=prompts, replay_limit=rows, seed=0
            )
        self.adapter, self.epochs = config.model.init_args.lora, config.trainer.max_epochs
        self.beside: dict[str | None, list[str]] = {}
        self.made: list[Any] = list(recipe.callbacks(config))
        if name == ONE_BY_ONE:
            script = one_by_one()
            self.made = [*script.learning(), *script.constraints(world.NAME, script.BALL)]
            self.lr, self.epochs = script.arguments([]).learning_rate, script.EPOCHS
            if mode == "single":
                self.lr *= ALONE_RATE
                self.made = [callback for callback in self.made if not isinstance(callback, NormBall)]
        for callback in self.made:
            if isinstance(callback, KLLocality) and alone and name != ONE_BY_ONE:
                callback.weight *= ALONE_KL
            if isinstance(callback, KLLocality) and mode == "single":
                callback.texts = replace(callback.texts, nearest=NEAREST)
                self.beside = {edit.id: setting.texts([edit]) for edit in scored}
            if hasattr(callback, "sequential"):
                callback.sequential = mode == "sequential"
            if isinstance(held := getattr(callback, "texts", None), Texts) and held.of_world:
                callback.texts = replace(held, source=self.texts)

    def __call__(self, model: nn.Module, edits: Sequence[Edit]) -> None:
        extra: Sequence[Edit] = self.extra(edits) if callable(self.extra) else self.extra  # type: ignore[assignment]
        batch = self.setting.batch_size * (1 + len(extra) // max(1, len(edits)))
        loop = TrainLoop(
            self.tokenizer,
            callbacks=self.callbacks(edits),
            epochs=self.epochs,
            batch_size=batch,
            learning_rate=self.lr,
            stop_loss=0.0,
            examples=ExampleOptions(append_eos=self.config.data.init_args.append_eos, extra_edits=extra),
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
