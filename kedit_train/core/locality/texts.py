"""Texts whose next-token answers must stay: read from wherever they are, cut into windows of tokens."""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kedit_train.core.run import EditRun
from kedit_train.data.leaks import scored_prompts
from kedit_train.data.nearest_texts import nearest_texts
from kedit_train.data.tokenization import context_length, encode_edit
from kedit_train.edit import Edit
from kedit_train.errors import EditError


def load_texts(source: Any, *, edits: Sequence[Edit] = (), most: int | None = 1024) -> list[str]:
    """Read texts.

    Args:
        source: a list of strings; a path to ``.txt`` (one text a line), ``.jsonl`` or ``.json`` (strings, or records
            with ``text``); a ``datasets.Dataset`` with a column ``text``; or "world", the embedded world's facts.
        edits: with "world", what those facts must not touch.
        most: with "world", how many texts; None for all that there are.
    """
    if source == "world":
        from kedit_train import world

        return world.locality_texts(exclude=edits, n=most)
    name = "texts"
    if isinstance(source, str | Path):
        name, source = str(source), _read(Path(source))
    if getattr(source, "column_names", None) is not None and "text" not in source.column_names:
        raise EditError(f"the dataset has no column 'text' (it has {', '.join(source.column_names)})")
    if not isinstance(source, Iterable) or isinstance(source, dict):
        raise EditError(f"texts={source!r} is no list of texts, path or dataset")
    texts = []
    for number, record in enumerate(source, 1):
        text = record.get("text") if isinstance(record, dict) else record
        if not isinstance(text, str):
            raise EditError(f"{name}, record {number}: expected a text or a record with 'text', got {record!r}")
        texts.append(text)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise EditError(f"{name} holds no text; give some that the model should answer as before")
    return texts


def _read(path: Path) -> list[Any]:
    try:
        if not path.is_file():
            raise FileNotFoundError
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise EditError(f"{path} cannot be read: {error}") from error
    except OSError as error:
        raise EditError(f"no file {str(path)!r}; give a path to .txt, .jsonl or .json, or a list of texts") from error
    if path.suffix == ".json":
        records = _parse(content, str(path))
        return records if isinstance(records, list) else [records]
    # Not splitlines(): texts may hold separators that it takes for the end of a line.
    lines = content.split("\n")
    if path.suffix == ".jsonl":
        return [_parse(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    return lines


def _parse(content: str, where: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise EditError(f"{where} cannot be read: {error}") from error


def without_probes(texts: Sequence[str], edits: Iterable[Edit]) -> list[str]:
    """Leave out texts that hold a question an edit is scored on, or the edit itself; a warning says how many."""
    held = {prompt for edit in edits for prompt in (edit.prompt, *scored_prompts(edit))}
    kept = [text for text in texts if not any(prompt in text for prompt in held)]
    if len(kept) < len(texts):
        warnings.warn(
            f"{len(texts) - len(kept)} of {len(texts)} texts hold a prompt that the edits are scored on; "
            "they are left out, so that nothing the edit is scored on is trained on",
            stacklevel=2,
        )
    if not kept:
        raise EditError("every text holds a prompt that the edits are scored on; give other texts")
    return kept


def windows(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Tokenise; a text longer than ``max_length`` becomes several windows, so that nothing is cut off."""
    ids = tokenizer(list(texts), truncation=False)["input_ids"]
    rows = [row[i : i + max_length] for row in ids for i in range(0, len(row), max_length)]
    if not rows:
        raise EditError(f"the tokenizer makes no token of any of the {len(texts)} texts; give others")
    return rows


def text_rows(
    run: EditRun,
    texts: Any,
    *,
    tokenizer: Any = None,
    max_length: int = 256,
    samples: int | None = None,
    seed: int = 0,
    edits: Sequence[Edit] | None = None,
    nearest: int | None = None,
) -> list[list[int]]:
    """Texts as windows of tokens, without those that hold what edits are scored on.

    Args:
        texts: as :func:`load_texts` reads them.
        tokenizer: as :meth:`EditRun.tokenizer` takes it.
        max_length: tokens a window, at most what the model can read.
        samples: the most texts to take, drawn by ``seed``; None takes all.
        edits: what is scored; by default the run's own edits.
        nearest: how many texts for each edit, the nearest to it; None takes all.
    """
    edits = run.edits if edits is None else edits
    loaded = load_texts(texts, edits=edits, most=1024 if nearest is None else None)
    found = without_probes(loaded, edits)
    if nearest is not None:
        found = nearest_texts(found, edits, nearest)
        if not found:
            raise EditError(
                "every text states what an edit changes (its subject with its old answer), so none can "
                "be held; give other texts"
            )
    if samples is not None and samples < len(found):
        found = random.Random(seed).sample(found, samples)
    return windows(run.tokenizer(tokenizer), found, longest(run, max_length))


def hash_rows(rows: Sequence[Sequence[int]]) -> str:
    """SHA-256, hex, of rows of tokens in their order."""
    return hashlib.sha256(json.dumps([list(row) for row in rows]).encode()).hexdigest()


def edit_rows(run: EditRun, edits: Iterable[Edit], tokenizer: Any, max_length: int) -> list[list[int]]:
    """Edits, prompt with target, as windows of tokens."""
    eos = tokenizer.eos_token_id is not None
    rows = [encode_edit(tokenizer, edit.prompt, edit.target, append_eos=eos).input_ids for edit in edits]
    width = longest(run, max_length)
    return [row[i : i + width] for row in rows for i in range(0, len(row), width)]


def longest(run: EditRun, max_length: int) -> int:
    """``max_length``, or what the model can read where that is less."""
    return min(max_length, context_length(getattr(run.model, "config", None)) or max_length)


def pad(rows: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Right-pad to input_ids [B, S] and attention_mask [B, S]; the mask, not the pad id, tells what is real."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask
