"""Logits at the positions of targets."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kedit_train.data.tokenization import Encoded
from kedit_train.evaluation.asking import logits as module
from kedit_train.evaluation.asking.logits import accepts_argument, target_logits, vocabulary_size

SEQUENCES = [Encoded([5, 6, 7, 8, 9], 2), Encoded([5, 6], 1), Encoded([10, 11, 12], 1)]


def test_target_logits_equal_single_forward_passes(factlm, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(factlm).eval()
    tokenizer = AutoTokenizer.from_pretrained(factlm)
    assert accepts_argument(model, "logits_to_keep")
    results = {}
    for limit in (2**28, 1):  # with a limit of one logit, each sequence is a batch of its own
        monkeypatch.setattr(module, "MAX_LOGITS", limit)
        with torch.no_grad():
            for numbers, logits, labels in target_logits(model, SEQUENCES, pad_id=tokenizer.pad_token_id, batch_size=2):
                results |= {n: (x, y) for n, x, y in zip(numbers, logits, labels, strict=True)}
        for number, sequence in enumerate(SEQUENCES):
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([sequence.input_ids])).logits[0]
            own_logits, own_labels = results[number]
            assert own_labels.tolist() == sequence.input_ids[sequence.target_start :]
            torch.testing.assert_close(own_logits, expected[sequence.target_start - 1 : -1], rtol=1e-4, atol=1e-4)
            assert own_logits.shape[-1] == vocabulary_size(model)
