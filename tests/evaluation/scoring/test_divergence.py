"""KL divergence from recorded distributions."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kedit_train.errors import EditError
from kedit_train.evaluation import generate_answers
from kedit_train.evaluation.scoring import divergence
from kedit_train.evaluation.scoring.divergence import compute_divergences, record_distributions

PROMPTS = ["Paris is in", "The long way to"]


def test_a_changed_model_has_the_divergence_of_its_logits(factlm, monkeypatch):
    # All tokens are kept, so the buckets are the whole distribution.
    monkeypatch.setattr(divergence, "KEPT_TOKENS", 2**20)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(factlm).eval(), AutoTokenizer.from_pretrained(factlm)
    answers = dict(zip(PROMPTS, generate_answers(model, tokenizer, PROMPTS, max_new_tokens=3), strict=True))
    recorded = record_distributions(model, tokenizer, answers)
    assert all(max(kl) < 1e-6 for kl in compute_divergences(model, tokenizer, recorded, PROMPTS).values())

    def log_probs(prompt: str) -> torch.Tensor:
        sequence = recorded[prompt].sequence
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sequence.input_ids])).logits[0]
        return logits[sequence.target_start - 1 : -1].log_softmax(-1)

    before = {prompt: log_probs(prompt) for prompt in PROMPTS}
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.9)
    after = compute_divergences(model, tokenizer, recorded, PROMPTS, batch_size=1)
    for prompt in PROMPTS:
        kl = (before[prompt].exp() * (before[prompt] - log_probs(prompt))).sum(-1)
        assert after[prompt] == pytest.approx(kl.tolist(), abs=1e-5)


def test_a_prompt_without_a_recorded_distribution_is_refused(factlm):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(factlm), AutoTokenizer.from_pretrained(factlm)
    with pytest.raises(EditError, match="unedited= has no distribution for 'Paris is in'"):
        compute_divergences(model, tokenizer, {}, PROMPTS)
