"""Compute hidden states of the unedited model, or the top-k probabilities of a teacher.

A penalty compares the edited model with these values.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from kedit_train.core.fingerprint import fingerprint
from kedit_train.core.locality.hidden_state_file import Batch, ReferenceStates
from kedit_train.core.locality.reference_cache import ReferenceCache, compute_or_read
from kedit_train.core.locality.teacher import Teacher, load_teacher, teacher_head
from kedit_train.core.locality.token_sequences import pad_sequences
from kedit_train.core.output_head import OutputHead, evaluation_mode
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError, warn
from kedit_train.functional.chunked_loss import chunk_length
from kedit_train.functional.divergence import kl_divergence
from kedit_train.functional.top_k_divergence import top_log_probs


def hidden_states(head: OutputHead, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Return the hidden states that enter the output head, [tokens, hidden], for the tokens of all sequences."""
    ids, mask = pad_sequences(sequences)
    device = next(head.model.parameters()).device
    ids, mask = ids.to(device), mask.to(device)
    return head.hidden(input_ids=ids, attention_mask=mask)[mask.bool()]


def reference_hidden_states(
    run: EditRun, sequences: Sequence[Sequence[int]], batch_size: int, cache: ReferenceCache
) -> tuple[ReferenceStates, bool]:
    """Return the hidden states [tokens, hidden] of the reference model, which is the model before the edit.

    Args:
        run: the run. Its reference weights replace the weights of the model during the forward passes.
        sequences: one list of token ids per sequence.
        batch_size: number of sequences per forward pass.
        cache: settings for storing the hidden states.

    Returns:
        The hidden states, and whether they were read from a file.
    """
    head, dtype = run.head(), cache.torch_dtype
    context = run.host.forward_context

    def compute() -> Generator[Batch, None, None]:
        warned = dtype is None
        for chosen in by_length(sequences, batch_size, quiet=not run.host.is_main):
            with context():
                hidden = hidden_states(head, [sequences[i] for i in chosen])
            stored = hidden.to(dtype or head.compute_dtype(hidden))
            if not warned:
                warned = True
                _warn_of_rounding(head, hidden, stored)
            yield chosen, [stored]

    masters = {} if run.masters is None else run.masters.dtypes
    device = next(run.model.parameters()).device
    with run.reference_model(), evaluation_mode(run.model):
        return compute_or_read(
            compute,
            sequences,
            cache=cache,
            key=lambda: {
                "model": fingerprint(run.model, masters),
                "tensors": f"hidden states, {dtype or 'as computed'}",
                "precision": _precision(device, context()),
            },
            device=device,
        )


def teacher_top_k(
    run: EditRun,
    sequences: Sequence[Sequence[int]],
    batch_size: int,
    teacher: Teacher,
    tokenizer: Any,
    cache: ReferenceCache,
) -> tuple[ReferenceStates, bool, int]:
    """Return a teacher's top-k log probabilities [tokens, k + 1] and token ids [tokens, k].

    The last log probability is the logarithm of the total probability of all other tokens.

    Args:
        run: the run. Its model must have the same vocabulary as the teacher.
        sequences: one list of token ids per sequence.
        batch_size: number of sequences per forward pass.
        teacher: the teacher.
        tokenizer: tokenizer of the run's model.
        cache: settings for storing the tensors.

    Returns:
        The tensors, whether they were read from a file, and the size of the common vocabulary.

    Raises:
        EditError: the teacher cannot be loaded, or its vocabulary differs from the vocabulary of the run's model or
            contains fewer than ``top_k`` tokens.
    """
    model, vocabulary = load_teacher(teacher.model, run, tokenizer)
    if teacher.top_k > vocabulary:
        raise EditError(f"top_k must be at most {vocabulary}, the size of the vocabulary, got {teacher.top_k}.")
    own_device = next(run.model.parameters()).device
    # A teacher that was passed as a module stays on its device.
    device = next(model.parameters()).device if model is teacher.model else own_device
    dtype = cache.torch_dtype or torch.float32

    def compute() -> Generator[Batch, None, None]:
        head = teacher_head(model, device, nullcontext())
        try:
            for chosen in by_length(sequences, batch_size, quiet=not run.host.is_main):
                hidden = hidden_states(head, [sequences[i] for i in chosen])
                log_probs, tokens = top_k_log_probs(head, hidden, teacher.top_k, vocabulary)
                yield chosen, [log_probs.to(dtype), tokens.to(torch.int32)]
        finally:
            head.remove()

    with evaluation_mode(model):
        states, was_read = compute_or_read(
            compute,
            sequences,
            cache=cache,
            key=lambda: {
                "model": fingerprint(model),
                "tensors": f"the {teacher.top_k} most probable of {vocabulary} tokens, {dtype}",
                "precision": _precision(device, nullcontext()),
            },
            device=own_device,
        )
    return states, was_read, vocabulary


def top_k_log_probs(head: OutputHead, hidden: Tensor, k: int, vocabulary: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the log probabilities and the ids of the ``k`` most probable next tokens.

    The last log probability is the logarithm of the total probability of all other tokens. The logits are computed in
    chunks.

    Args:
        head: the output head.
        hidden: [tokens, hidden], the inputs of the head.
        k: number of most probable next tokens.
        vocabulary: number of tokens in the vocabulary. All further outputs of the head are ignored. None uses all
            outputs.

    Returns:
        The log probabilities [tokens, k + 1] and the token ids [tokens, k], as returned by
        :func:`~kedit_train.functional.top_k_divergence.top_log_probs`.
    """
    parts = hidden.split(chunk_length(head.config.vocab_size))
    tops = [top_log_probs(head.project(part)[:, :vocabulary], k) for part in parts]
    log_probs, tokens = (torch.cat(column) for column in zip(*tops, strict=True))
    return log_probs, tokens


def by_length(sequences: Sequence[Sequence[int]], batch_size: int, *, quiet: bool) -> Iterator[list[int]]:
    """Yield batches of sequence indices, sorted by sequence length to reduce padding."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    # disable=None shows the bar in a terminal only.
    hide_bar = quiet or len(batches) < 64
    yield from tqdm(batches, desc="reference hidden states", leave=False, disable=hide_bar or None)


def _precision(device: torch.device, context: AbstractContextManager[Any]) -> str:
    """Describe the settings that change the rounding of a forward pass: device, autocast and fp32 precision."""
    with context:
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    return f"{device.type}, autocast {autocast}, fp32 products {torch.get_float32_matmul_precision()}"


def _warn_of_rounding(head: OutputHead, hidden: Tensor, stored: Tensor) -> None:
    compute_dtype = head.compute_dtype(hidden)
    if torch.promote_types(stored.dtype, compute_dtype) == stored.dtype:
        return
    some = slice(chunk_length(2 * head.config.vocab_size))
    divergence = kl_divergence(head.project(hidden[some]), head.project(stored[some].to(hidden.dtype))).mean()
    warn(
        f"reference hidden states are computed in {compute_dtype} but stored in {stored.dtype}. On the first texts, "
        f"the rounding to the stored dtype alone causes a divergence of {float(divergence):.1e} nats per token; set "
        "dtype=None in ReferenceCache to avoid the rounding."
    )
