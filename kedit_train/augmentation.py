"""What is trained beside the edits, made once on the unedited model: pseudo-paraphrases and replayed facts.

"Model Editing by Standard Fine-Tuning" (Gangadhar & Stratos, arXiv 2402.11078) trains edits with generated prefixes
before their prompts, for generality, and with random unedited facts, for locality. Here those facts are answered by the
unedited model itself, since what is wanted is that it stays as it was, right or wrong.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kedit_train import world
from kedit_train.core.locality.texts import Texts
from kedit_train.data import Edit, EditDataset
from kedit_train.data.leaks import LeakGuard, with_prefixes
from kedit_train.data.prompts import PromptFormat
from kedit_train.data.readers.files import SUFFIXES
from kedit_train.data.tokenization import context_length, token_ids
from kedit_train.errors import EditError
from kedit_train.evaluation import generate_answers
from kedit_train.evaluation.asking.batching import inference_context, model_device, unwrap_model
from kedit_train.evaluation.asking.probes import PREFIXES

# Prefixes to draw from, for each that an edit gets: edits share them.
POOL = 8
# What a text begins with where the tokenizer has no begin-of-text.
OPENINGS = ("The", "In", "It", "When", "A", "We", "There", "This")


@torch.no_grad()
def generate_prefixes(
    model: nn.Module, tokenizer: Any, n: int, lengths: Sequence[int] = (5, 10), seed: int = 0
) -> list[str]:
    """``n`` different short texts that the model itself samples from its begin-of-text (temperature 1).

    From a common word, one after the other of ``OPENINGS``, where the tokenizer has no begin-of-text. Special tokens
    are not sampled; a text without a mark at its end gets a full stop. Deterministic under ``seed``, on one device;
    torch's own random state takes no part.

    Args:
        lengths: tokens of the texts, in turn.

    Raises:
        EditError: the model says the same again and again, so that there are no ``n`` different ones.
    """
    inner, generator = unwrap_model(model), torch.Generator().manual_seed(seed)
    found: dict[str, None] = {}
    with inference_context(inner):
        for _ in range(8):
            for length in lengths:
                texts = _sampled(inner, tokenizer, -(-n // len(lengths)), length, generator)
                found.update(dict.fromkeys(text for text in texts if text.strip(" .")))
            if len(found) >= n:
                # Each length in its share.
                return random.Random(seed).sample(list(found), n)
    raise EditError(f"generate_prefixes: the model's samples gave {len(found)} different texts of {n}: ask for fewer")


def _sampled(model: Any, tokenizer: Any, n: int, length: int, generator: torch.Generator) -> list[str]:
    begin = tokenizer.bos_token_id
    starts = [[begin]] if begin is not None else [token_ids(tokenizer, word, special=False)[:1] for word in OPENINGS]
    ids = torch.tensor([starts[i % len(starts)] for i in range(n)], device=model_device(model))
    special = torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.long)
    for _ in range(length):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1].float().cpu()
        # Rows of the head that no token has are not sampled either.
        logits[:, len(tokenizer) :] = -torch.inf
        logits[:, special[special < logits.shape[1]]] = -torch.inf
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, drawn.to(ids.device)], dim=1)
    texts = (" ".join(tokenizer.decode(row, skip_special_tokens=True).split()) for row in ids)
    return [text if text[-1:] in tuple(".!?:。！？") else f"{text}." for text in texts]


@dataclass(frozen=True)
class Replayed:
    """Unedited facts as rows.

    Args:
        rows: what is trained.
        prompts: different ones that were looked at.
        leaked: those left out because an edit is scored on them or is about the same.
        empty, unended: those left out because the model said nothing, or came to no end.
    """

    rows: tuple[Edit, ...]
    prompts: int
    leaked: int
    empty: int = 0
    unended: int = 0


def replayed(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    edits: Sequence[Edit],
    *,
    n: int | None = None,
    seed: int = 0,
    prompt_format: PromptFormat = "plain",
    batch_size: int = 64,
    max_new_tokens: int = 32,
) -> Replayed:
    """Prompts with the model's own greedy answers, as further rows beside ``edits``.

    Left out, and counted: what an edit is scored on or about (``LeakGuard.refuses``), and prompts to which the model
    says nothing or finds no end. Each distinct prompt is asked once.

    Args:
        n: as many rows, of prompts in an order drawn by ``seed``, or fewer where the prompts do not suffice; None takes
            all.
        prompt_format: in which form the prompts are asked; to be that of the training.
        batch_size, max_new_tokens: see ``generate_answers``.

    Raises:
        EditError: not one row is left.
    """
    guard, order = LeakGuard(edits), list(dict.fromkeys(prompts))
    random.Random(seed).shuffle(order)
    free = [prompt for prompt in order if not guard.refuses(Edit(prompt, ""))]
    leaked, empty, unended = len(order) - len(free), 0, 0
    rows: list[Edit] = []
    want = len(free) if n is None else n
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "prompt_format": prompt_format}
    for start in range(0, len(free), batch_size):
        if len(rows) >= want:
            break
        some = free[start : start + batch_size]
        said = generate_answers(model, tokenizer, some, batch_size=batch_size, **how)
        for prompt, answer in zip(some, said, strict=True):
            row = Edit(prompt, answer.text, id=f"replayed {prompt!r}")
            if not answer.text:
                empty += 1
            elif not answer.ended:
                unended += 1
            elif guard.refuses(row):
                leaked += 1
            else:
                rows.append(row)
    found = Replayed(tuple(rows[:want]), len(order), leaked, empty, unended)
    if not rows:
        raise EditError(f"no prompt is left to be replayed: {_told(found)}; give prompts of other facts")
    return found


def _told(found: Replayed) -> str:
    fraction = found.leaked / max(1, found.prompts)
    return (
        f"of {found.prompts} prompts {found.leaked} left out as leaks (fraction {fraction:.3f}), {found.empty} as "
        f"empty, {found.unended} as unended"
    )


@dataclass(frozen=True)
class AugmentationOptions:
    """Examples to train beside the edits, as a recipe names them (``data.augmentation``). See :func:`augmentation`.

    Args:
        prefixes: pseudo-paraphrases per edit: the prompt behind short texts that the unedited model generates.
        replay: prompts of other facts, trained with the answers of the unedited model: a ``.txt`` file with one per
            line, a file of edits (its prompts are used), or "world".
        replay_limit: replay at most this many facts, drawn anew under each seed. None replays as many as there are
            edits.
        previous_edits: a file of edits that the model has learned before. All are trained again.
    """

    prefixes: int = 0
    replay: str | None = None
    replay_limit: int | None = None
    previous_edits: str | None = None


@dataclass(frozen=True)
class Augmentation:
    """Called with edits, gives the rows to train beside them: their pseudo-paraphrases, and what is replayed.

    Args:
        prefixes: texts to draw from; per_edit: how many of them each edit gets, drawn by seed.
        replay: rows of other facts, the same whatever the edits.
        guard: of all edits that the run will see.
        line: what was made and left out, for a reader.
    """

    prefixes: tuple[str, ...]
    per_edit: int
    replay: tuple[Edit, ...]
    seed: int
    guard: LeakGuard
    line: str = ""

    def __call__(self, edits: Sequence[Edit]) -> list[Edit]:
        own = with_prefixes(edits, self.prefixes, self.per_edit, self.seed)
        return [*(row for row in own if not self.guard.scored(row.prompt)), *self.replay]

    def __repr__(self) -> str:
        return f"Augmentation(per_edit={self.per_edit}, replay={len(self.replay)}, seed={self.seed})"


def augmentation(
    model: nn.Module,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    prefixes: int = 0,
    replay: str | Path | Sequence[str] | None = None,
    replay_limit: int | None = None,
    previous_edits: str | Path | Sequence[Edit] | None = None,
    seed: int = 0,
    prompt_format: PromptFormat = "plain",
    batch_size: int = 64,
) -> Augmentation:
    """Make the further rows of a run, once, on the unedited model; never from what the edits are scored on.

    For a data module of Lightning it is behind ``EditDataModule(augmentation=)``; for a loop it is the
    ``extra`` of ``TrainLoop``; for TRL ``EditDataset([*edits, *augmentation(...)(edits)]).to_prompt_completion()``.

    Args:
        edits: all that the run is to learn; they decide what is a leak.
        prefixes: pseudo-paraphrases an edit (``with_prefixes``), of ``POOL`` times as many that the model generates.
        replay: prompts of other facts, which the unedited model answers: a list; a ``.txt`` file with one a line; a
            file of edits, of which the prompts alone are taken; or "world", other facts of the embedded world.
        replay_limit: how many of them to replay, drawn by ``seed``; None takes as many as there are edits.
        previous_edits: edits that the model has learned before, or a file of them: all are replayed with their own
            targets, unless the new ones supersede them.
        seed: of all that is drawn.
        prompt_format: in which form the edits are trained.
        batch_size: prompts asked together.

    Raises:
        EditError: a number below 0, a file that cannot be read, or nothing left to replay.
    """
    if prefixes < 0 or (replay_limit is not None and replay_limit < 1):
        raise EditError(f"augmentation: prefixes={prefixes}, replay_limit={replay_limit}: expected >= 0 and >= 1")
    if replay_limit is not None and replay is None:
        raise EditError(f"augmentation: replay_limit={replay_limit} of nothing: name the prompts with replay=")
    guard, told = LeakGuard(edits), []
    texts: list[str] = []
    if prefixes:
        made = generate_prefixes(model, tokenizer, POOL * prefixes, seed=seed)
        texts = [text for text in made if not (guard.scored(text) or guard.edited(text) or text in PREFIXES)]
        if len(texts) < prefixes:
            raise EditError(
                f"augmentation: of {len(made)} generated prefixes {len(texts)} are not about the edits and each edit "
                f"is to get {prefixes}: lower prefixes"
            )
        rows = with_prefixes(edits, texts, prefixes, seed)
        leaked = sum(guard.scored(row.prompt) for row in rows)
        told.append(
            f"{len(rows) - leaked} pseudo-paraphrases from {len(texts)} prefixes ({len(made) - len(texts)} prefixes "
            f"and {leaked} rows left out as leaks, fraction {leaked / len(rows):.3f})"
        )
    kept: list[Edit] = []
    if replay is not None:
        how: dict[str, Any] = {"n": replay_limit or len(edits), "seed": seed, "prompt_format": prompt_format}
        found = replayed(model, tokenizer, read_prompts(replay, edits), edits, batch_size=batch_size, **how)
        kept += found.rows
        told.append(f"{len(found.rows)} replayed facts ({_told(found)})")
    if previous_edits is not None:
        old = EditDataset.of(previous_edits) if isinstance(previous_edits, str | Path) else previous_edits
        own = [Edit(edit.prompt, edit.target, id=f"earlier {edit.id or i}") for i, edit in enumerate(old)]
        free = [row for row in own if not guard.refuses(row)]
        kept += free
        left = len(own) - len(free)
        told.append(f"{len(free)} earlier edits ({left} left out as leaks, fraction {left / len(own):.3f})")
    _fits(model, tokenizer, kept, prompt_format)
    return Augmentation(tuple(texts), prefixes, tuple(kept), seed, guard, "beside the edits: " + "; ".join(told))


def _fits(model: Any, tokenizer: Any, rows: Sequence[Edit], prompt_format: PromptFormat) -> None:
    """Rows that are too long are refused here, by name, before any training."""
    if rows:
        longest = context_length(unwrap_model(model).config)
        EditDataset(rows, name="replay").encode(tokenizer, max_length=longest, prompt_format=prompt_format)


def read_prompts(source: str | Path | Sequence[str], edits: Sequence[Edit]) -> list[str]:
    """The prompts behind ``replay``, see :func:`augmentation`."""
    if world.is_world(source):
        return world.other_prompts(exclude=edits)
    if not isinstance(source, str | Path):
        return list(source)
    path = Path(source)
    if not path.is_file():
        raise EditError(
            f"replay: there is no file {str(path)!r} (working directory: {Path.cwd()}): name one of prompts, .txt with "
            f"one a line or a file of edits ({', '.join(SUFFIXES)})"
        )
    if path.suffix.lower() not in (".txt", *SUFFIXES):
        raise EditError(
            f"replay: {path} is of no known kind: prompts are read from .txt, one a line, or from files of edits "
            f"({', '.join(SUFFIXES)}): rename or convert it"
        )
    if path.suffix.lower() == ".txt":
        return [line.strip() for line in Texts(source).load()]
    return [edit.prompt for edit in EditDataset.load(source)]
