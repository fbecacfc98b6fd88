"""Scores under teacher forcing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from kedit_train.data.tokenization import encode_edit
from kedit_train.errors import EditError
from kedit_train.evaluation.asking.teacher_forced import TeacherForced, teacher_forced


def test_token_accuracy_and_log_probability_equal_a_computation_by_hand(scripted_model: Any) -> None:
    """The target " Parma" shares its first four of six bytes with the answer " Paris"."""
    model, tokenizer = scripted_model({"Q:": " Paris", "R:": " Rome"})
    wrong, right, short = teacher_forced(model, tokenizer, [("Q:", "Parma"), ("R:", "Rome"), ("R:", "Ro")])
    rest = math.log(math.exp(10.0) + 257)
    assert wrong.correct == (True, True, True, True, False, False)
    assert wrong.accuracy == pytest.approx(4 / 6)
    assert not wrong.exact
    assert wrong.log_probs == pytest.approx([10 - rest] * 4 + [-rest] * 2, abs=1e-5)
    # The scripted model counts positions: its answer ends after six tokens, whatever they are.
    assert wrong.end_correct is True
    assert right.correct == (True,) * 5
    assert right.exact
    assert right.end_correct is True
    assert right.end_log_prob == pytest.approx(10 - rest, abs=1e-5)
    assert short.exact
    assert short.end_correct is False
    assert short.end_log_prob == pytest.approx(-rest, abs=1e-5)


def reference(model: Any, tokenizer: Any, prompt: str, target: str) -> TeacherForced:
    """Compute the scores from one sequence at a time, with all logits and no padding."""
    row = encode_edit(tokenizer, prompt, target)
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([row.input_ids])).logits[0].float().log_softmax(-1)
    places = range(row.target_start, len(row.input_ids))
    correct = [int(log_probs[t - 1].argmax()) == row.input_ids[t] for t in places]
    scores = [float(log_probs[t - 1, row.input_ids[t]]) for t in places]
    return TeacherForced(tuple(correct[:-1]), tuple(scores[:-1]), correct[-1], scores[-1])


def same(found: TeacherForced, wanted: TeacherForced) -> None:
    assert found.correct == wanted.correct
    assert found.end_correct == wanted.end_correct
    assert found.log_probs == pytest.approx(wanted.log_probs, abs=2e-5)
    assert found.end_log_prob == pytest.approx(wanted.end_log_prob, abs=2e-5)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_single_sequences(factlm: Path, batch_size: int, side: str) -> None:
    torch.set_num_threads(1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(factlm).eval(), AutoTokenizer.from_pretrained(factlm)
    tokenizer.padding_side = side
    records = json.loads((factlm / "records.json").read_text())[:12]
    pairs = [(r["prompt"], r[key]) for r in records for key in ("ground_truth", "target_new")]
    found = teacher_forced(model, tokenizer, pairs + pairs[:3], batch_size=batch_size)
    assert found[: len(pairs)][:3] == found[len(pairs) :]
    for pair, one in zip(pairs, found, strict=False):
        same(one, reference(model, tokenizer, *pair))
    assert sum(one.exact for one in found[: len(pairs) : 2]) == 12


def test_models_with_absolute_positions(factlm: Path) -> None:
    """GPT-2 counts positions from the left edge, so padding there would shift them."""
    tokenizer = AutoTokenizer.from_pretrained(factlm)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_positions=64, n_embd=16, n_layer=2, n_head=2)).eval()
    pairs = [("Paris is in", "France"), ("The long way to the town of", "Connecticut, in the east"), ("A", "b")]
    for pair, one in zip(pairs, teacher_forced(model, tokenizer, pairs), strict=True):
        same(one, reference(model, tokenizer, *pair))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers for it
@pytest.mark.parametrize("kind", ["lora", "prompt_tuning"])
def test_peft_models(factlm: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(factlm), AutoTokenizer.from_pretrained(factlm)
    config = {
        "lora": lambda: peft.LoraConfig(
            r=2, target_modules=["down_proj"], task_type="CAUSAL_LM", init_lora_weights=False
        ),
        "prompt_tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }[kind]()
    wrapped = peft.get_peft_model(model, config).eval()
    pairs = [("Isola Dovarese is located in", "Italy"), ("The profession of Beata Tyszkiewicz is", "actor")]
    for (prompt, target), one in zip(pairs, teacher_forced(wrapped, tokenizer, pairs), strict=True):
        row = encode_edit(tokenizer, prompt, target)
        with torch.no_grad():
            logits = wrapped(input_ids=torch.tensor([row.input_ids])).logits[0, -len(row.input_ids) :]
        labels = torch.tensor(row.input_ids[row.target_start : -1])
        wanted = logits[row.target_start - 1 : -2].log_softmax(-1)[range(len(labels)), labels]
        assert one.log_probs == pytest.approx(wanted.tolist(), abs=2e-5)


def test_refusals(scripted_model: Any) -> None:
    model, tokenizer = scripted_model({"Q:": " Rome"}, context=12)
    with pytest.raises(EditError, match=r"'Q:' and its target must have at most 12 tokens together, got 13"):
        teacher_forced(model, tokenizer, [("Q:", "Rome, Ita")])
    with pytest.raises(EditError, match="only an end-of-text"):
        teacher_forced(model, tokenizer, [("Q: ", "</s>")])
    model.nan = True
    with pytest.raises(EditError, match="NaN logits after 'Q:'"):
        teacher_forced(model, tokenizer, [("Q:", "Rome")])
    with pytest.raises(EditError, match="got Linear, which cannot generate"):
        teacher_forced(torch.nn.Linear(1, 1), tokenizer, [("Q:", "Rome")])
