"""The recipes as methods: each file of recipes/ as ``train(model, edits)`` on a model of small facts.

What a recipe says is what is run: its callbacks, rate, budget of epochs and rule to stop. Only what depends on the
model is put in its place: the texts that must stay, and the batch.
"""

from __future__ import annotations

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
from kedit_train.modes import TrainLoop
from kedit_train.modules import WORLD_EDITS
from kedit_train.pretrained import lora_config

SHARED = Path(__file__).resolve().parents[3] / "shared"
FACTLM = SHARED / "models" / "factlm"
# Hyperparameters are chosen on edits of these draws, which are not reported.
HELD_OUT = 100
RECIPES = (
    "ft_m", "ft_l", "ft_l_inf", "low_layer", "masked_fisher", "locft_bf", "overtone", "overtone_lora", "kl_locality",
    "null_space", "replay", "f_learning", "kedit_default",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A model, edits by draw, and the texts that go with them."""

    name: str
    path: Path
    batch_size: int
    edits: Callable[[int, int], list[Edit]]  # how many, and which draw
    texts: Callable[[Sequence[Edit]], list[str]]  # must stay, and ask for nothing that the edits are scored on
    unrelated: Callable[[], list[str]]  # for the perplexity
    prompts: Callable[[Sequence[Edit]], list[str]]  # of other facts, to be replayed


def load(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path)


def embedded() -> Setting:
    def texts(edits: Sequence[Edit]) -> list[str]:
        # Beside one edit all that there is, among which the nearest are looked for.
        return world.locality_texts(exclude=edits, n=1024 if len(edits) > 1 else None)

    def edits(n: int, draw: int) -> list[Edit]:
        return world.edits(n, seed=draw)

    return Setting("world", world.path(), 20, edits, texts, lambda: world.prose(100), world.other_prompts)


def factlm() -> Setting:
    """CounterFact's records that this model knows the true answers to; those from 1,200 on are its held-out draws."""
    if not FACTLM.exists():
        raise EditError(f"the model factlm is not at {FACTLM}; compare on the world alone")
    # Every sentence that this model has read ends with a full stop; edits without it would teach it to leave them out.
    records = [replace(e, target=f"{e.target}.") for e in EditDataset.load(FACTLM / "records.json")]

    def edits(n: int, draw: int) -> list[Edit]:
        # Three draws of 300 and, of 100, three times as many that share no edit.
        first = 1200 + (draw - HELD_OUT) * 100 if draw >= HELD_OUT else draw % 3 * 300 + draw // 3 * 100
        return records[first : first + n]

    def others(edits: Sequence[Edit]) -> list[Edit]:
        """Not edited, nor about a subject that a probe asks about: in other words, that may be the fact it asks for."""
        mine = {edit.id for edit in edits}
        asked = prompts_of(edits)
        return [e for e in records if e.id not in mine and not any(e.subject and e.subject in p for p in asked)]

    def prompts_of(edits: Sequence[Edit]) -> list[str]:
        return [prompt for edit in edits for prompt in (edit.prompt, *scored_prompts(edit))]

    def texts(edits: Sequence[Edit]) -> list[str]:
        asked = prompts_of(edits)
        subjects = [e.subject for e in edits if e.subject]
        # None that asks for what the edits are scored on, or names their subjects.
        true = [f"{e.prompt} {e.old_target}." for e in others(edits)]
        return [t for t in true if not any(word in t for word in (*asked, *subjects))]

    def unrelated() -> list[str]:
        lines = (SHARED / "data" / "text" / "wikitext-2.valid.txt").read_text().splitlines()
        return [line.strip() for line in lines if len(line) > 200][:60]

    def prompts(edits: Sequence[Edit]) -> list[str]:
        return [e.prompt for e in others(edits)]

    return Setting("factlm", FACTLM, 20, edits, texts, unrelated, prompts)


SETTINGS: dict[str, Callable[[], Setting]] = {"world": embedded, "factlm": factlm}


# One edit at a time is learned at a fifth of the rate and with ten times the KL penalty: a batch's gradients partly
# cancel, one edit's do not. The penalty holds the texts nearest to it. In a sequence kedit_default is one_by_one.py.
ALONE, ALONE_KL, ALONE_TEXTS, NEAREST, SEQUENCE_TEXTS = 0.2, 10.0, 256, 24, 32
# The rates that a recipe says are for other numbers of edits than the 24 of its file.
USUAL_RATES = {
    ("kedit_default", "batch"): 3e-3,
    ("kedit_default", "sequential"): 3e-3,
    ("kedit_default", "single"): 1.5e-3,
}


def usual(name: str, mode: str) -> list[str]:
    """What to say to ``recipe.load`` for this mode."""
    return [f"--model.learning_rate={USUAL_RATES[name, mode]}"] if (name, mode) in USUAL_RATES else []


class Method:
    """``train(model, edits)`` as a recipe does it.

    Args:
        setting: the model with its edits.
        model, tokenizer: the unedited ones.
        name, config: of the recipe, and of ``kedit_train.cli.recipe.load``.
        scored: all the edits of the run: texts that they ask for are not trained on.
        mode: of ``run_edits``.
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
        # Their answers are taken anew for every edit that is trained alone, and once for a sequence.
        self.texts = setting.texts(scored)[: ALONE_TEXTS if mode == "single" else None]
        self.lr = config.model.init_args.learning_rate * (ALONE if alone else 1.0)
        data = config.data.init_args
        self.extra: Any = ()
        options = data.augmentation
        if options.prefixes or options.replay:
            # As many other facts beside one edit as the recipe has beside each of its own.
            share = (options.replay_limit or 0) / (data.limit or WORLD_EDITS)
            rows = round(share * (1 if alone else len(scored))) if options.replay else None
            prompts = self.setting.prompts(scored) if options.replay else None
            self.extra = augmentation(
                model, tokenizer, scored, prefixes=options.prefixes, replay=prompts, replay_limit=rows, seed=0
            )
        self.adapter = config.model.init_args.lora
        self.beside: dict[str | None, list[str]] = {}
        self.made: list[Any] = list(recipe.callbacks(config))
        if (name, mode) == ("kedit_default", "sequential"):
            # What recipes/one_by_one.py has beside it.
            self.made.append(NormBall(norm="l2", per="scope", fraction=0.5))
        for callback in self.made:
            if isinstance(callback, KLLocality) and alone:
                callback.weight *= ALONE_KL
            if isinstance(callback, KLLocality) and (name, mode) == ("kedit_default", "sequential"):
                callback.batch_size = SEQUENCE_TEXTS
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
            self.callbacks(edits),
            epochs=self.config.trainer.max_epochs,
            batch_size=batch,
            lr=self.lr,
            stop_loss=0.0,
            append_eos=self.config.data.init_args.append_eos,
            extra=extra,
        )
        if self.adapter is None:
            loop(model, edits)
            return
        from peft import get_peft_model

        trained = [p.requires_grad for p in model.parameters()]
        adapted: Any = get_peft_model(model, lora_config(self.adapter))  # type: ignore[arg-type]
        loop(adapted, edits)
        # The very modules that the model had, with what was learned added to their weights.
        adapted.merge_and_unload()
        for parameter, flag in zip(model.parameters(), trained, strict=True):
            parameter.requires_grad_(flag)

    def callbacks(self, edits: Sequence[Edit]) -> list[EditCallback]:
        """Those of the recipe; its reports are the comparison's own."""
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
