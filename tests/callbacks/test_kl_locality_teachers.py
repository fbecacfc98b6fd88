"""KLLocality with a teacher: the penalty follows its formula, and teachers that cannot be compared are refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from callbacks.kl_locality_inputs import TEXTS, TOKENS, value

from kedit_train.callbacks import Teacher
from kedit_train.errors import EditError


def by_hand(teacher: Any, model: Any, words: Any, k: int, direction: str) -> float:
    terms = []
    for text in TEXTS:
        ids = torch.tensor([words(text)["input_ids"]])
        with torch.no_grad():
            pair = [m(input_ids=ids).logits[0].double().softmax(-1).tolist() for m in (teacher, model)]
        for p, q in zip(*pair, strict=True):
            top = sorted(range(len(p)), key=lambda i: -p[i])[:k]
            a, b = ([r[i] for i in top] + [max(0.0, 1 - math.fsum(r[i] for i in top))] * (k < 61) for r in (p, q))
            a, b = (a, b) if direction == "forward" else (b, a)
            terms.append(math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True)))
    return math.fsum(terms) / len(terms)


@pytest.mark.parametrize(("k", "direction"), [(1, "forward"), (8, "forward"), (8, "reverse"), (61, "forward")])
def test_a_larger_teacher(make, words, tmp_path, k, direction):
    teacher, model = make("gpt2", n_embd=32), make()
    options = {"teacher": Teacher(teacher, top_k=k), "direction": direction, "cache": tmp_path}
    first, again = (value(shaken := copy.deepcopy(model), words, **options) for _ in range(2))
    shaken = copy.deepcopy(model)
    want = None
    got, _, metrics = value(shaken, words, **options)
    want = by_hand(teacher, shaken, words, k, direction)
    assert want > 0.01
    assert got == pytest.approx(want, rel=1e-4)
    assert (first[0], again[0]) == (got, got)
    assert (first[2]["edit/locality/store_hits"], again[2]["edit/locality/store_hits"]) == (0.0, 1.0)
    assert metrics["edit/locality/store_bytes"] == TOKENS * (8 * k + 4)
    assert not teacher.lm_head._forward_pre_hooks


def test_a_teacher_by_path_with_padded_rows(make, words, tmp_path):
    teacher = make(hidden_size=32, vocab_size=64)
    teacher.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    model = make()
    got = value(model, words, teacher={"model": str(tmp_path), "top_k": 5})[0]
    teacher.lm_head.weight = torch.nn.Parameter(teacher.lm_head.weight[:61])
    assert got == pytest.approx(by_hand(teacher, model, words, 5, "forward"), rel=1e-4)


def test_teachers_that_cannot_be_compared_are_refused(make, words, tmp_path):
    model = make()
    for teacher, message in (
        (make(vocab_size=77), "has another vocabulary than the edited model"),
        (str(tmp_path / "nothing"), "teacher cannot be loaded from"),
        (torch.nn.Linear(2, 2), "teacher must be a causal language model, got Linear without"),
        (model, "teacher must not be the edited model itself"),
    ):
        with pytest.raises(EditError, match=message):
            value(model, words, teacher=teacher)
    with pytest.raises(EditError, match="top_k must be at most 61, the size of the vocabulary, got 62"):
        value(model, words, teacher=Teacher(make("gpt2"), top_k=62))
