"""Losses and perplexity of texts."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kedit_train.evaluation.scoring.perplexity import perplexity, text_losses


def test_perplexity_is_the_exponential_of_the_mean_loss_per_token():
    score = perplexity([(2.0, 1), (4.0, 3)])
    assert score.value == pytest.approx(math.exp(6 / 4))
    assert score.n == 4


def test_a_long_text_is_split_into_windows(factlm):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(factlm), AutoTokenizer.from_pretrained(factlm)
    text = "It rains in Spain today and the road is long."
    ids = tokenizer(text, return_tensors="pt").input_ids
    width = 4
    expected, count = 0.0, 0
    for window in ids[0].split(width):
        if len(window) > 1:
            with torch.no_grad():
                loss = float(model(input_ids=window[None], labels=window[None]).loss)
            expected, count = expected + loss * (len(window) - 1), count + len(window) - 1
    ((total, n),) = text_losses(model, tokenizer, [text], max_length=width)
    assert (total, n) == (pytest.approx(expected, rel=1e-5), count)
