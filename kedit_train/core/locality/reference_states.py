"""Answers on given texts to compare an edit with: the unedited model's hidden states, or another model's top-k."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from kedit_train.atomic_write import remove_leftovers
from kedit_train.core.fingerprint import fingerprint
from kedit_train.core.locality.hidden_state_file import Answers, collect, load, make_place
from kedit_train.core.locality.teacher import head_of, open_teacher
from kedit_train.core.locality.texts import hash_rows, pad
from kedit_train.core.output_head import OutputHead, evaluation_mode
from kedit_train.core.processes import is_distributed
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError
from kedit_train.functional.chunked_loss import chunk_length
from kedit_train.functional.divergence import kl_divergence
from kedit_train.functional.top_k_divergence import top_log_probs

Rows = Sequence[Sequence[int]]
Batches = Generator[tuple[list[int], list[Tensor]], None, None]


def row_states(head: OutputHead, rows: Rows) -> Tensor:
    """What the head reads at every token of the rows, one row after the other, [tokens, d]."""
    ids, mask = pad(rows)
    device = next(head.model.parameters()).device
    ids, mask = ids.to(device), mask.to(device)
    return head.hidden(input_ids=ids, attention_mask=mask)[mask.bool()]


def hidden_states(
    run: EditRun,
    rows: Rows,
    batch_size: int,
    *,
    store: Path | None,
    dtype: torch.dtype | None,
    memory_limit: int | None,
) -> tuple[Answers, bool]:
    """The unedited model's hidden states [tokens, d] of rows of tokens, and whether ``store`` had them.

    Args:
        store: the folder of files; dtype: in which they are kept, None for the one in which the head multiplies.
        memory_limit: bytes of them to be held in memory.
    """
    head = run.head()
    context = run.host.forward_context

    def batches() -> Batches:
        warned = dtype is None
        for chosen in _by_length(rows, batch_size, quiet=not run.host.is_main):
            with context():
                hidden = row_states(head, [rows[i] for i in chosen])
            kept = hidden.to(dtype or head.compute_dtype(hidden))
            if not warned:
                warned = True
                _say_what_rounding_costs(head, hidden, kept)
            yield chosen, [kept]

    masters = {} if run.masters is None else run.masters.dtypes
    with run.unedited(), evaluation_mode(run.model):
        return _stored(
            batches,
            rows,
            store=store,
            memory_limit=memory_limit,
            key=lambda: {
                "model": fingerprint(run.model, masters),
                "answers": f"hidden states, {dtype or 'as computed'}",
                "precision": _precision(next(run.model.parameters()).device, context()),
            },
            device=next(run.model.parameters()).device,
        )


def teachers_answers(
    run: EditRun,
    rows: Rows,
    batch_size: int,
    teacher: Any,
    top_k: int,
    tokenizer: Any,
    *,
    store: Path | None,
    dtype: torch.dtype | None,
    memory_limit: int | None,
) -> tuple[Answers, bool, int]:
    """A teacher's log-probabilities [tokens, k + 1] and tokens [tokens, k] on rows of tokens.

    Returns:
        them, whether ``store`` had them, and the size of the vocabulary over which they are distributions.
    """
    model, shared = open_teacher(teacher, run, tokenizer)
    if top_k > shared:
        raise EditError(f"KLLocality: top_k={top_k} is more than the {shared} tokens of the vocabulary")
    own = next(run.model.parameters()).device
    # A module stays where its owner has put it.
    device = next(model.parameters()).device if model is teacher else own

    def batches() -> Batches:
        head = head_of(model, device, nullcontext())
        try:
            for chosen in _by_length(rows, batch_size, quiet=not run.host.is_main):
                hidden = row_states(head, [rows[i] for i in chosen])
                parts = hidden.split(chunk_length(head.config.vocab_size))
                tops = [top_log_probs(head.project(part)[:, :shared], top_k) for part in parts]
                log_probs, tokens = (torch.cat(column) for column in zip(*tops, strict=True))
                yield chosen, [log_probs.to(dtype or torch.float32), tokens.to(torch.int32)]
        finally:
            head.remove()

    with evaluation_mode(model):
        answers, reused = _stored(
            batches,
            rows,
            store=store,
            memory_limit=memory_limit,
            key=lambda: {
                "model": fingerprint(model),
                "answers": f"the {top_k} most probable of {shared} tokens, {dtype or torch.float32}",
                "precision": _precision(device, nullcontext()),
            },
            device=own,
        )
    return answers, reused, shared


@torch.no_grad()
def _stored(
    batches: Callable[[], Batches],
    rows: Rows,
    *,
    store: Path | None,
    memory_limit: int | None,
    key: Callable[[], dict[str, str]],
    device: torch.device,
) -> tuple[Answers, bool]:
    lengths = [len(row) for row in rows]
    if store is None:
        answers = collect(batches(), lengths, memory_limit=memory_limit)
        assert answers is not None
        return answers, False
    name = json.dumps({**key(), "texts": hash_rows(rows)}, sort_keys=True)
    path = store / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"
    # Every process computes (sharded models need them all); one on each machine writes.
    writes = os.environ.get("LOCAL_RANK", "0") == "0"
    if writes:
        remove_leftovers(path)
    found = load(path, name, lengths, memory_limit)
    if _everywhere(found is not None, device):
        assert found is not None
        return found, True
    refused = None
    if writes:
        refused = _refusal(lambda: make_place(path))
    _agree(refused, device)
    made = batches()
    if writes:
        refused = _refusal(lambda: collect(made, lengths, path=path, key=name))
    if refused is None or is_distributed():
        # Those that write nothing compute all the same; and nobody leaves the others alone in it.
        for _ in made:
            pass
    made.close()
    _agree(refused, device)
    found = load(path, name, lengths, memory_limit)
    if found is None:
        raise EditError(f"KLLocality: what was written to {path} is not there any more; give a folder of this machine")
    return found, False


def _refusal(write: Callable[[], object]) -> EditError | None:
    try:
        write()
    except EditError as error:
        return EditError(f"KLLocality: {error}")
    return None


def _agree(refused: EditError | None, device: torch.device) -> None:
    """Raise on every process what one of them was refused."""
    if not _everywhere(refused is None, device):
        raise refused or EditError("KLLocality: another process could not write its answers to store; see its error")


def _everywhere(value: bool, device: torch.device) -> bool:
    """Whether it is so on every process; waits for all of them."""
    if not is_distributed():
        return value
    flag = torch.tensor(int(value), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def _by_length(rows: Rows, batch_size: int, *, quiet: bool) -> Iterator[list[int]]:
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    yield from tqdm(batches, desc="answers before the edit", leave=False, disable=quiet or len(batches) < 64)


def _precision(device: torch.device, context: AbstractContextManager[Any]) -> str:
    """What two forward passes of the same weights may differ by."""
    with context:
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    return f"{device.type}, autocast {autocast}, fp32 products {torch.get_float32_matmul_precision()}"


def _say_what_rounding_costs(head: OutputHead, hidden: Tensor, kept: Tensor) -> None:
    multiplied = head.compute_dtype(hidden)
    if torch.promote_types(kept.dtype, multiplied) == kept.dtype:
        return
    some = slice(chunk_length(2 * head.config.vocab_size))
    cost = kl_divergence(head.project(hidden[some]), head.project(kept[some].to(hidden.dtype))).mean()
    warnings.warn(
        f"KLLocality: answers before the edit are kept in {kept.dtype} and computed in {multiplied}; on the first "
        f"texts that alone is a divergence of {float(cost):.1e} nats a token",
        stacklevel=2,
    )
