"""General ability, computed by hand on a scripted model, and lm-eval on a model in memory."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kedit_train.errors import EditError
from kedit_train.evaluation.scoring.capability import CapabilityProbe, text_beginnings
from kedit_train.evaluation.scoring.lm_eval_tasks import LmEvalTasks, lm_eval_scores

# The scripted model gives its first choice this logit, and 0 to the other 257 tokens.
SHARP, VOCAB = 10.0, 258
RIGHT = SHARP - math.log(math.exp(SHARP) + VOCAB - 1)
WRONG = RIGHT - SHARP


def test_scores_equal_a_computation_by_hand(scripted_model: Any) -> None:
    prompts = ["a:", "b:", "c:", "d:"]
    old = {"a:": "xy", "b:": "xy", "c:": "x", "d:": "Say it."}
    new = old | {"b:": "xz", "d:": "say  it"}
    probe = CapabilityProbe(["a:xy", "b:xy"], prompts=prompts)
    before = probe(*scripted_model(old))
    assert set(before.scores()) == {"perplexity"}
    # Bytes 2 to 4 of each text count: the model expects end-of-text instead of the colon, then "x" and "y".
    assert before.perplexity.n == 6
    assert before.perplexity.value == pytest.approx(math.exp(-(2 * WRONG + 4 * RIGHT) / 6), rel=1e-5)
    after = probe(*scripted_model(new), unedited=before)
    assert after.perplexity.value == pytest.approx(math.exp(-(3 * WRONG + 3 * RIGHT) / 6), rel=1e-5)
    # The answer to "b:" changed. That to "d:" changed only in what normalization removes.
    assert (after.agreement.value, after.agreement.n) == (0.75, 4)
    # The unedited answers have 3 + 3 + 2 + 8 tokens with their ends. Each position where another token is ranked first
    # adds the same divergence.
    moved = 1 + sum(a != b for a, b in zip("Say it.", "say  it", strict=True))
    one = (math.exp(RIGHT) - math.exp(WRONG)) * SHARP
    assert after.kl.n == 16
    assert after.kl.value == pytest.approx(moved * one / 16, rel=1e-4)
    assert list(after.scores()) == ["perplexity", "kl", "agreement"]
    same = probe(*scripted_model(old), unedited=before)
    assert (same.kl.value, same.agreement.value, same.perplexity) == (0.0, 1.0, before.perplexity)


def test_the_batch_size_does_not_matter_and_the_model_is_unchanged(scripted_model: Any) -> None:
    old = {"a:": "xy", "bb:": "longer answer", "c:": ""}
    model, tokenizer = scripted_model(old)
    model.train()
    one, many = (CapabilityProbe(["a:xy"], prompts=list(old), batch_size=size)(model, tokenizer) for size in (1, 64))
    assert one.perplexity == many.perplexity
    assert one.answers == many.answers
    assert model.training


def test_prompts_are_the_beginnings_of_texts() -> None:
    assert text_beginnings(["one two three four five", "alone", "a b"]) == ["one two", "a"]
    assert len(text_beginnings(["w " * 100])[0].split()) == 16
    assert CapabilityProbe(["one two three", "one two four"]).prompts == ["one"]
    with pytest.raises(EditError, match="at least one text with two or more words"):
        CapabilityProbe(["alone"])
    with pytest.raises(EditError, match="contains no text"):
        CapabilityProbe([])
    with pytest.raises(EditError, match="tasks and prompts must be lists of strings"):
        CapabilityProbe(["a b"], tasks="arc_easy")


def test_the_result_of_another_probe_is_refused(scripted_model: Any) -> None:
    model, tokenizer = scripted_model({"a:": "x"})
    before = CapabilityProbe(["a:x b"], prompts=["a:"])(model, tokenizer)
    with pytest.raises(EditError, match="unedited= must be a result on the prompts of this probe"):
        CapabilityProbe(["a:x b"], prompts=["b:"])(model, tokenizer, before)


def test_tasks_need_lm_eval(scripted_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EditError, match=r"pip install 'kedit-train\[eval\]'"):
        lm_eval_scores(*scripted_model({}), LmEvalTasks(["arc_easy"]))
    assert lm_eval_scores(*scripted_model({}), LmEvalTasks([])) == {}


TASK = """\
task: small_facts
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


def _settings(tokenizer: Any) -> tuple[Any, ...]:
    return tokenizer.padding_side, tokenizer.truncation_side, tokenizer.special_tokens_map, len(tokenizer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_lm_eval_runs_on_the_model_in_memory(factlm: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the eval extra (lm-eval) is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(factlm), AutoTokenizer.from_pretrained(factlm)
    model.train()
    records = json.loads((factlm / "records.json").read_text(encoding="utf-8"))[:20]
    rows = [
        {"prompt": r["prompt"], "choices": [r["ground_truth"], r["target_new"]], "label": int(i % 4 == 0)}
        for i, r in enumerate(records)
    ]
    data, file = tmp_path / "facts.jsonl", tmp_path / "facts.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    file.write_text(TASK.format(data=data, cache=tmp_path / "cache"), encoding="utf-8")
    python, state, kept = random.getstate(), torch.get_rng_state(), _settings(tokenizer)
    # The model knows all twenty true answers; every fourth record is labeled with the other answer.
    by_file = lm_eval_scores(model, tokenizer, LmEvalTasks([str(file)]))["small_facts/acc"]
    assert (by_file.value, by_file.n) == (0.75, 20)
    assert by_file.low is not None
    assert by_file.low == pytest.approx(0.75 - 1.96 * math.sqrt(0.75 * 0.25 / 19), rel=1e-3)
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), state)
    assert _settings(tokenizer) == kept
    assert model.training
    probe = CapabilityProbe(["a b c"], tasks=LmEvalTasks(["small_facts"], folder=str(tmp_path), limit=8))
    before = probe(model, tokenizer)
    assert (before.tasks["small_facts/acc"].value, before.tasks["small_facts/acc"].n) == (0.75, 8)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    # All tokens are equally probable now, so the answer with fewer tokens wins, and the first one in a tie.
    after = probe(model, tokenizer, before)
    lengths = [[len(tokenizer(f" {c}", add_special_tokens=False).input_ids) for c in row["choices"]] for row in rows]
    right = [int(second < first) == row["label"] for (first, second), row in zip(lengths, rows, strict=True)]
    assert after.scores()["small_facts/acc"].value == sum(right[:8]) / 8
    assert after.agreement.value == 0.0
    with pytest.raises(EditError, match="lm-eval has no task 'no_such_task'"):
        lm_eval_scores(model, tokenizer, LmEvalTasks(["no_such_task"]))
    with pytest.raises(EditError, match="there is no file"):
        lm_eval_scores(model, tokenizer, LmEvalTasks([str(tmp_path / "none.yaml")]))
