"""Reading each prompt once gives the same answers and scores as reading it for each target and answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kedit_train import world
from kedit_train.data import EditDataset
from kedit_train.errors import EditError
from kedit_train.evaluation import EvaluationOptions, evaluate, generate_answers
from kedit_train.evaluation.asking import shared_prompts
from kedit_train.evaluation.asking.shared_prompts import answer_and_score, can_share_prompts
from kedit_train.evaluation.asking.teacher_forced import teacher_forced

TARGETS = {
    "Paris is the capital of": ["France", "the United States of America", "France"],
    "A": [],
    "The mother tongue of Danielle Darrieux is": ["French", "English"],
    "Autonomous University of Madrid, which is located in": ["Spain"],
}


@pytest.mark.parametrize("batch_size", [64, 1])
def test_answers_and_scores_equal_those_of_separate_passes(factlm: Path, batch_size: int) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(factlm), AutoTokenizer.from_pretrained(factlm)
    assert can_share_prompts(model)
    limits = dict(zip(TARGETS, (9, 3, 1, 5), strict=True))
    answers, scores = answer_and_score(model, tokenizer, TARGETS, limits=limits, batch_size=batch_size)
    prompts = list(TARGETS)
    for prompt, expected in zip(
        prompts, generate_answers(model, tokenizer, prompts, max_new_tokens=limits), strict=True
    ):
        assert (answers[prompt], answers[prompt].ids) == (expected, expected.ids)
    pairs = list(scores)
    assert set(pairs) == {(prompt, target) for prompt, own in TARGETS.items() for target in own}
    for pair, expected in zip(pairs, teacher_forced(model, tokenizer, pairs), strict=True):
        found = scores[pair]
        assert (found.correct, found.choices) == (expected.correct, expected.choices[: len(expected.correct)])
        assert found.log_probs == pytest.approx(expected.log_probs, rel=1e-4, abs=1e-5)
        assert found.end_correct is None


def test_prompts_of_similar_length_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prompts, "SMALL_BATCH", 2)
    lengths = [20, 18, 16, 14, 9, 9, 9, 9, 2]
    batches = list(shared_prompts._batches([str(i) for i in range(9)], lengths, 3))
    assert [[int(prompt) for prompt in batch] for batch in batches] == [[0, 1, 2], [3, 4], [5, 6, 7], [8]]


def test_nan_logits_name_the_prompt() -> None:
    model, tokenizer = world.load()
    with torch.no_grad():
        dict(model.named_parameters())["model.layers.2.mlp.down_proj.weight"].fill_(float("nan"))
    with pytest.raises(EditError, match="gives NaN logits after 'Ann lives in'"):
        answer_and_score(model, tokenizer, {"Ann lives in": ["Bern"]}, limits={"Ann lives in": 3})


def test_the_protocols_agree_with_a_model_that_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = world.load()
    edits = EditDataset.load("world", limit=2)
    options = EvaluationOptions(protocol=["leading", "wild", "probability"], batch_size=8)
    shared = evaluate(model, tokenizer, edits, options=options, progress=False)
    module: Any = "kedit_train.evaluation.scoring.probe_results.can_share_prompts"
    monkeypatch.setattr(module, lambda model: False)
    separate = evaluate(model, tokenizer, edits, options=options, progress=False)
    assert [r.answer for r in shared.answers] == [r.answer for r in separate.answers]
    assert [r.right for r in shared.answers] == [r.right for r in separate.answers]
    for question in ("reliability", "generality", "locality"):
        for name in ("leading", "wild", "probability"):
            assert shared.metrics[question][name] == separate.metrics[question][name]
