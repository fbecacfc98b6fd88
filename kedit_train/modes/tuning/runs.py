"""The runs of ``tune``: train the model with one setting on some edits, evaluate it, and restore the unedited model."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kedit_train.callbacks import NullSpace, ParameterScope, editing
from kedit_train.core.fingerprint import fingerprint
from kedit_train.core.locality.texts import Texts
from kedit_train.core.scope.scope import resolve_scope
from kedit_train.data import EditDataset
from kedit_train.data.answer_end import decide_append_eos
from kedit_train.data.chat_format import describe_format
from kedit_train.errors import EditError
from kedit_train.evaluation import EvaluationOptions, Report, evaluate
from kedit_train.modes.runner import part_of
from kedit_train.modes.train_loop import ExampleOptions, TrainLoop
from kedit_train.modes.tuning.halving import Trial, covering
from kedit_train.modes.tuning.journal import Journal, key_of
from kedit_train.modes.tuning.settings import (
    BATCH_SIZE,
    EPOCHS,
    KL_BATCH_SIZE,
    NEIGHBORS,
    STOP_LOSS,
    Layers,
    TuneGrid,
    TuneSetting,
)
from kedit_train.modes.weight_backup import WeightBackup


@dataclass
class TuneRuns:
    """Trains and evaluates single settings for ``tune``. Every run starts from the unedited model."""

    model: nn.Module
    tokenizer: Any
    texts: Texts
    options: EvaluationOptions
    seed: int
    folder: Path
    backup: WeightBackup
    weights: str
    unedited: Report
    journal: Journal
    scopes: dict[Layers, Layers]
    modules: str
    keys: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def start(
        cls, model: nn.Module, tokenizer: Any, edits: EditDataset, keep: Any, grid: TuneGrid, folder: Path,
        options: EvaluationOptions, seed: int,
    ) -> TuneRuns:  # fmt: skip
        """Do all checks that are possible before the first run, and evaluate the unedited model."""
        texts = Texts.of(keep)
        # All runs get the same texts, whatever edits they train, so that they share the statistics of the texts.
        loaded = texts.load(edits, tokenizer=texts.tokenizer or tokenizer)
        texts = replace(texts, source=loaded, nearest=None)
        scopes = covering({layers: frozenset(resolve_scope(model, layers, grid.modules)) for layers in grid.layers})
        backup, weights = WeightBackup(model), fingerprint(model)
        length = (texts.max_length, texts.seed, str(texts.tokenizer))
        keys = {
            "weights": weights,
            "texts": hashlib.sha256(json.dumps([loaded, length]).encode()).hexdigest(),
            "training": [EPOCHS, BATCH_SIZE, STOP_LOSS, KL_BATCH_SIZE, NEIGHBORS],
            "protocol": options.protocol if isinstance(options.protocol, str) else list(options.protocol),
            "max_new_tokens": options.max_new_tokens,
            "prompt_format": describe_format(options.asked_format),
            "seed": seed,
        }
        path = folder / f"unedited-{key_of({**keys, 'edits': edits.hash})[:16]}.json"
        if path.exists():
            unedited = Report.load(path)
        else:
            unedited = evaluate(model, tokenizer, edits, options=options, seed=seed, progress=False)
            unedited.save(path)
        if all(unedited.metrics[name]["generated"].n == 0 for name in ("generality", "locality")):
            raise EditError(
                "edits must have rephrases or locality probes, got neither; add rephrases or locality probes."
            )
        end = decide_append_eos("auto", tokenizer, edits, model=model, prompt_format=options.asked_format)
        return cls(
            model, tokenizer, texts, options, seed, folder, backup, weights, unedited,
            Journal(folder / "results.jsonl"), scopes, grid.modules,
            {**keys, "append_eos": end.append, "versions": unedited.meta["versions"]},
        )  # fmt: skip

    @property
    def append_eos(self) -> bool:
        """Whether all runs append the end-of-text token to targets. This was decided before the first run."""
        return self.keys["append_eos"]

    def _key(self, setting: TuneSetting, part: EditDataset) -> str:
        return key_of({**self.keys, "setting": setting.to_dict(), "edits": part.hash})

    def known(self, setting: TuneSetting, part: EditDataset) -> Trial | None:
        """Return the trial if it was measured before, in this call or an earlier call of ``tune``; otherwise None."""
        record = self.journal.get(self._key(setting, part))
        try:
            scores = {n: record[n] for n in ("reliability", "generality", "locality", "seconds")} if record else None
        except KeyError:
            return None
        return None if scores is None else Trial(setting=setting, edits=len(part), **scores)

    def measure(self, setting: TuneSetting, part: EditDataset) -> Trial:
        """Train the model with a setting on some edits, evaluate it on these edits, and restore the unedited model."""
        if (known := self.known(setting, part)) is not None:
            return known
        try:
            factors = self._factors(setting.layers)
            started = time.perf_counter()
            scores = self._train_and_evaluate(setting, part, factors)
        except EditError as error:
            # The arguments were checked before the first run, so the setting is the cause (for example, the loss is not
            # finite). Other settings may work.
            return Trial(setting=setting, edits=len(part), reliability=None, error=str(error))
        finally:
            self._restore()
        trial = Trial(setting=setting, edits=len(part), seconds=round(time.perf_counter() - started, 3), **scores)
        record = {name: value for name, value in asdict(trial).items() if name != "error"}
        self.journal.add(self._key(setting, part), record)
        return trial

    def _train_and_evaluate(self, setting: TuneSetting, part: EditDataset, factors: Path) -> dict[str, Any]:
        train = TrainLoop(
            self.tokenizer,
            callbacks=setting.build_callbacks(self.texts, factors, self.folder / "reference_states"),
            epochs=EPOCHS,
            batch_size=BATCH_SIZE,
            stop_loss=STOP_LOSS,
            examples=ExampleOptions(prompt_format=self.options.asked_format, append_eos=self.append_eos),
        )
        devices = sorted({p.device.index for p in self.model.parameters() if p.device.type == "cuda"})
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            train(self.model, part)
        unedited = part_of(self.unedited, part, self.seed)
        report = evaluate(
            self.model, self.tokenizer, part, options=self.options, unedited=unedited, seed=self.seed, progress=False
        )
        locality = report.metrics["locality"]
        kept = locality["tokens_kept"] if locality["tokens_kept"].n else locality["generated"]
        reliability, generality = (report.metrics[name]["generated"] for name in ("reliability", "generality"))
        return {"reliability": reliability.value, "generality": generality.value, "locality": kept.value}

    def _factors(self, layers: Layers) -> Path:
        """Return the file with the text statistics that ``NullSpace`` needs. Create the file if it does not exist.

        The statistics cover the largest scope of the grid that includes ``layers``. All smaller scopes inside this
        scope share the file, so the model reads the texts only once for them.
        """
        largest = self.scopes[layers]
        name = key_of({"weights": self.weights, "texts": self.keys["texts"], "scope": [str(largest), self.modules]})
        path = self.folder / f"factors-{name[:16]}.safetensors"
        if not path.exists():
            scope = ParameterScope(largest, modules=self.modules)
            callbacks = [scope, NullSpace(self.texts, batch_size=64, factors_path=path)]
            with editing(self.model, callbacks, tokenizer=self.tokenizer) as edit:
                # The callbacks read the texts when the first step begins. No step is taken.
                edit.before_step()
        return path

    def _restore(self) -> None:
        self.backup.restore()
        if fingerprint(self.model) != self.weights:
            raise EditError(
                "the unedited model could not be restored: after the attempt, the configuration, the weights or the "
                "buffers still differ from the original; load the model again."
            )
