"""The loss head on a batch against its examples one at a time, packed sequences and micro-batches."""

from __future__ import annotations

import pytest
import torch
from core.tokens.loss_heads import TEXTS, assert_same, batch, gradients, loss_head, smoothed
from torch import Tensor
from torch.nn import functional as F


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reduction", ["token", "sample"])
def test_a_batch_equals_its_examples_one_at_a_time(tiny, family, side, reduction):
    model = tiny(family)
    with loss_head(model, smoothed, reduction):
        got = model(**batch(TEXTS, side)).loss
        got_grads = gradients(model, got)
        tokens = [len(target) for _, target in TEXTS]
        shares = [1 / 3] * 3 if reduction == "sample" else [n / sum(tokens) for n in tokens]
        terms = [model(**batch([text])).loss * share for text, share in zip(TEXTS, shares, strict=True)]
        want: Tensor = torch.stack(terms).sum()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert_same(got_grads, gradients(model, want), 1e-5)


def test_packed_sequences_have_equal_weights(tiny):
    model = tiny("llama")
    packed: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
    for prompt, target in TEXTS:
        packed["input_ids"] += prompt + target
        packed["labels"] += [-100] * len(prompt) + target
        packed["position_ids"] += range(len(prompt + target))
    inputs = {key: torch.tensor([row]) for key, row in packed.items()}
    lengths = [len(target) for _, target in TEXTS]
    with torch.no_grad():
        # With a cache, transformers takes the row for one sequence.
        unlabelled = {key: value for key, value in inputs.items() if key != "labels"}
        logits = model(**unlabelled, use_cache=False).logits
    each = F.cross_entropy(logits[0, :-1], inputs["labels"][0, 1:], reduction="none").split(1)
    losses = iter(x for x, label in zip(each, inputs["labels"][0, 1:], strict=True) if label != -100)
    want = sum(sum(next(losses) for _ in range(n)) / n for n in lengths) / len(lengths)
    with loss_head(model, reduction="sample"):
        assert model(**inputs).loss.item() == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("reduction", ["token", "sample"])
def test_micro_batches_add_up_to_the_batch(tiny, reduction):
    model = tiny("llama")
    with loss_head(model, reduction=reduction, shares=lambda: 2):
        items = torch.tensor(sum(len(target) for _, target in TEXTS))
        parts = [model(**batch(part), num_items_in_batch=items).loss for part in (TEXTS[:1], TEXTS[1:])]
        whole = [model(**batch(part)).loss for part in (TEXTS[:1], TEXTS[1:])]
    n = [sum(len(target) for _, target in part) for part in (TEXTS[:1], TEXTS[1:])]
    want = sum(w * k for w, k in zip(whole, n, strict=True)) / sum(n) if reduction == "token" else sum(whole) / 2
    torch.testing.assert_close(parts[0] + parts[1], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reduction", ["token", "sample"])
def test_a_batch_without_supervised_tokens_has_loss_zero(tiny, reduction):
    model = tiny("llama")
    inputs = batch(TEXTS)
    inputs["labels"][:] = -100
    with loss_head(model, smoothed, reduction):
        loss = model(**inputs).loss
        assert loss.item() == 0.0
        assert not any(g.any() for g in gradients(model, loss).values())
