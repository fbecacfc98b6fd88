"""The models of the comparison, each with the edits of a draw and with texts: world, factlm and SmolLM2."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from workload import COUNTERFACT, FACTLM, SHARED

from kedit_train import EditDataset, Probe, world
from kedit_train.data import Edit
from kedit_train.edit import scored_prompts
from kedit_train.errors import EditError
from kedit_train.evaluation.options import ExtraMetric

SMOLLM2 = Path(__file__).resolve().parents[2] / ".models" / "smollm2"
WIKITEXT = SHARED / "data" / "text" / "wikitext-2.valid.txt"
ZSRE = SHARED / "data" / "knowedit" / "zsre_test_all.json"
# Hyperparameters are chosen on the edits of draws from this number upwards, whose results are not reported.
HELD_OUT = 100


# The files that a setting needs. The world comes with the package.
_NEEDED: dict[str, tuple[Path, ...]] = {
    "world": (), "factlm": (FACTLM,), "smollm2": (SMOLLM2, COUNTERFACT, WIKITEXT),
    "smollm2_zsre": (SMOLLM2, ZSRE, WIKITEXT),
}  # fmt: skip


def missing(name: str) -> Path | None:
    """Return the first file that a setting needs and that does not exist."""
    return next((path for path in _NEEDED[name] if not path.exists()), None)


def _check(name: str) -> None:
    if path := missing(name):
        raise EditError(f"{name} needs {path}, which does not exist (make smollm2 creates SmolLM2); use another model.")


@dataclass(frozen=True)
class Setting:
    """A model, the edits of one draw, and texts."""

    name: str
    path: Path
    batch_size: int
    edits: Callable[[int], list[Edit]]  # called with the number of edits
    texts: Callable[[Sequence[Edit]], list[str]]  # texts that must stay, without scored prompts
    unrelated: Callable[[], list[str] | None]  # texts for the perplexity
    prompts: Callable[[Sequence[Edit]], list[str]]  # prompts of other facts, for the replay
    metrics: Sequence[ExtraMetric] = ("resurgence",)


def load(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path)


def embedded(draw: int = 0) -> Setting:
    def texts(edits: Sequence[Edit]) -> list[str]:
        # A single edit gets all texts, so that the nearest texts can be chosen. For 200 edits, fewer than 4,096 texts
        # are left.
        return world.locality_texts(exclude=edits, n=4096 if 1 < len(edits) <= 100 else None)

    def edits(count: int) -> list[Edit]:
        return world.edits(count, seed=draw)

    return Setting("world", world.path(), 20, edits, texts, lambda: world.prose(100), world.other_prompts)


def factlm(draw: int = 0) -> Setting:
    """Return CounterFact records whose true answers factlm knows; the held-out draws start at 1,200."""
    _check("factlm")
    # Every sentence in the training of this model ends with a full stop; edits without it would change that.
    records = [replace(e, target=f"{e.target}.") for e in EditDataset.load(FACTLM / "records.json")]

    def edits(count: int) -> list[Edit]:
        # Three draws of 300 edits and nine draws of 100 edits without overlap.
        first = 1200 + (draw - HELD_OUT) * 100 if draw >= HELD_OUT else draw % 3 * 300 + draw // 3 * 100
        return records[first : first + count]

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
        return [line.strip() for line in WIKITEXT.read_text().splitlines() if len(line) > 200][:60]

    def prompts(edits: Sequence[Edit]) -> list[str]:
        return [e.prompt for e in others(edits)]

    return Setting("factlm", FACTLM, 20, edits, texts, unrelated, prompts)


# The first of the shuffled records are edited. The OTHERS records from FIRST_OTHER on must keep their answers. The
# STATEMENTS records from FIRST_STATEMENT on are texts that must stay, together with passages of Wikipedia.
FIRST_OTHER, OTHERS, FIRST_STATEMENT, STATEMENTS, PASSAGES, PROSE = 600, 100, 1000, 3000, 300, 24


def smollm2(draw: int = 0, name: str = "smollm2", data: Path = COUNTERFACT) -> Setting:
    """Return SmolLM2 with facts from CounterFact (or the ZsRE of KnowEdit), whether or not it knows them.

    Each draw shuffles the records with its own seed. The other facts are locality prompts of the kind "others". The
    texts are 300 passages of prose and 3,000 statements of further facts, in turn while there are passages.
    """
    _check(name)
    records = list(EditDataset.load(data))
    random.Random(draw).shuffle(records)
    others = records[FIRST_OTHER : FIRST_OTHER + OTHERS]
    stated = records[FIRST_STATEMENT : FIRST_STATEMENT + STATEMENTS]
    probes = [Probe(other.prompt, (other.old_target or "",)) for other in others]
    prose = passages()
    statements = [f"{s.prompt} {s.old_target}." for s in stated]
    # Alternating, so that a recipe that reads only the first texts reads both kinds.
    pairs = zip(prose[PROSE : PROSE + PASSAGES], statements, strict=False)
    texts = [text for pair in pairs for text in pair] + statements[PASSAGES:]

    def edits(count: int) -> list[Edit]:
        return [
            replace(edit, locality={**edit.locality, "others": tuple(probes[i::count])})
            for i, edit in enumerate(records[:count])
        ]

    def prompts(edits: Sequence[Edit]) -> list[str]:
        return [statement.prompt for statement in stated]

    return Setting(name, SMOLLM2, 25, edits, lambda edits: texts, lambda: prose[:PROSE], prompts, metrics=())


def smollm2_zsre(draw: int = 0) -> Setting:
    """Return SmolLM2 with the ZsRE questions of KnowEdit, which also have portability questions."""
    return smollm2(draw, "smollm2_zsre", ZSRE)


def passages() -> list[str]:
    """Return the long lines of Wikipedia, at most 60 words each, without the marks of its tokenization."""
    marks = {" <unk>": "", " @-@ ": "-", " @,@ ": ",", " @.@ ": ".", " ,": ",", " .": "."}
    texts = []
    for line in WIKITEXT.read_text(encoding="utf-8").splitlines():
        for mark, plain in marks.items():
            line = line.replace(mark, plain)
        if len(line) > 300:
            texts.append(" ".join(line.split()[:60]))
    return texts


def half_passages() -> list[str]:
    """Return the passages with at most 30 words each, which halves the time."""
    return [" ".join(text.split()[:30]) for text in passages()]


SETTINGS: dict[str, Callable[[int], Setting]] = {
    "world": embedded, "factlm": factlm, "smollm2": smollm2, "smollm2_zsre": smollm2_zsre,
}  # fmt: skip
