"""Greedy generation of answers."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kedit_train.errors import EditError
from kedit_train.evaluation import Answer, exact_match, generate_answers


def load(path: Path) -> tuple[Any, Any]:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def prompts_of(factlm: Path, n: int, rephrases: bool = False) -> list[str]:
    records = json.loads((factlm / "records.json").read_text())[:n]
    return [p for r in records for p in [r["prompt"], *(r["rephrase_prompts"] if rephrases else [])]]


def test_where_an_answer_ends(scripted_model: Any) -> None:
    script = {
        "Arch city:": " St. Louis",
        "Wrote HP:": " J. K. Rowling",
        "Seven halves:": " 3.5",
        "Full stop:": " Paris.",
        "Two lines:": " Paris\nLondon",
        "Blank line first:": "\n Paris",
        "Silence:": "",
        "Spaces:": "   ",
    }
    model, tokenizer = scripted_model(script, endless={"Song:": " la"})
    answers = generate_answers(model, tokenizer, [*script, "Song:"], max_new_tokens=16)
    assert answers == [
        Answer("St. Louis", ended=True),
        Answer("J. K. Rowling", ended=True),
        Answer("3.5", ended=True),
        Answer("Paris.", ended=True),
        Answer("Paris", ended=True),
        Answer("", ended=True),
        Answer("", ended=True),
        Answer("", ended=True),
        Answer("la la la la la", ended=False),
    ]


def test_an_answer_as_long_as_the_limit_has_not_ended(scripted_model: Any) -> None:
    model, tokenizer = scripted_model({"Q:": " Paris"})
    assert generate_answers(model, tokenizer, ["Q:"], max_new_tokens=6) == [Answer("Paris", ended=False)]
    assert generate_answers(model, tokenizer, ["Q:"], max_new_tokens=7) == [Answer("Paris", ended=True)]


@pytest.mark.parametrize("answer", [" Rome", " Rome\nItaly and more"])
def test_generation_stops_with_the_longest_answer(scripted_model: Any, answer: str) -> None:
    model, tokenizer = scripted_model({"Q:": answer, "P:": " Ro"})
    generate_answers(model, tokenizer, ["Q:", "P:"], max_new_tokens=64)
    assert model.calls == len(" Rome") + 1


def test_a_repeated_prompt_is_generated_once(scripted_model: Any) -> None:
    model, tokenizer = scripted_model({"Q:": " Rome", "Q: Q:": " Oslo"})
    answers = generate_answers(model, tokenizer, ["Q:", "Q: Q:", "Q:", "Q:"], batch_size=1)
    assert [answer.text for answer in answers] == ["Rome", "Oslo", "Rome", "Rome"]
    assert model.calls == 2 * len(" Rome.")


def test_no_prompts_no_answers(scripted_model: Any) -> None:
    model, tokenizer = scripted_model({})
    assert generate_answers(model, tokenizer, []) == []


def test_the_context_limits_each_sequence_by_itself(scripted_model: Any) -> None:
    model, tokenizer = scripted_model({}, endless={"12345678:": " la", "Q:": " la"}, context=12)
    answers = generate_answers(model, tokenizer, ["Q:", "12345678:"], max_new_tokens=8)
    assert answers == [Answer("la la l", ended=False), Answer("la", ended=False)]


def test_refusals_name_the_prompt(scripted_model: Any) -> None:
    model, tokenizer = scripted_model({"Q:": " Rome"}, context=12)
    message = r"'123456789012' must have fewer tokens than the context of the model \(12\), got 12"
    with pytest.raises(EditError, match=message):
        generate_answers(model, tokenizer, ["Q:", "123456789012"])
    with pytest.raises(EditError, match="no token"):
        generate_answers(model, tokenizer, [""])
    with pytest.raises(EditError, match="batch_size must be >= 1, got 0"):
        generate_answers(model, tokenizer, ["Q:"], batch_size=0)
    with pytest.raises(EditError, match="max_new_tokens must be >= 1, got 0"):
        generate_answers(model, tokenizer, ["Q:"], max_new_tokens=0)
    with pytest.raises(EditError, match="prompts must be a list of strings, got one string"):
        generate_answers(model, tokenizer, "Q:")
    model.nan = True
    with pytest.raises(EditError, match="NaN logits after 'Q:'"):
        generate_answers(model, tokenizer, ["Q:"])


def test_answers_do_not_depend_on_batch_size_or_padding_side(factlm: Path) -> None:
    model, tokenizer = load(factlm)
    records = json.loads((factlm / "records.json").read_text())[:100]
    prompts = prompts_of(factlm, 100)
    tokenizer.padding_side = "left"
    many = generate_answers(model, tokenizer, prompts)
    right = sum(exact_match(a.text, [r["ground_truth"]]) for a, r in zip(many, records, strict=True))
    new = sum(exact_match(a.text, [r["target_new"]]) for a, r in zip(many, records, strict=True))
    assert right >= 97
    assert new <= 1
    assert all(answer.ended for answer in many)
    tokenizer.padding_side = "right"
    one = generate_answers(model, tokenizer, prompts[:40], batch_size=1)
    assert one == many[:40]
    assert generate_answers(model, tokenizer, prompts, batch_size=7) == many
    assert tokenizer.padding_side == "right"


def test_a_model_without_a_pad_token_gives_the_same_text_in_any_batch(stories: Path) -> None:
    model, tokenizer = load(stories)
    assert tokenizer.pad_token_id is None
    prompts = ["Once upon a time", "Lily", "The big dog saw a cat and", "Tom and his mom went to the"]
    together = generate_answers(model, tokenizer, prompts, max_new_tokens=24)
    assert together == generate_answers(model, tokenizer, prompts, max_new_tokens=24, batch_size=1)
    assert together == generate_answers(model, tokenizer, prompts[::-1], max_new_tokens=24, batch_size=3)[::-1]
    assert not any(answer.ended for answer in together)
    # The greedy search of transformers, one prompt at a time.
    ids = tokenizer(prompts[2], return_tensors="pt").input_ids
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0)
    text = tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True)
    assert together[2].text == text.split("\n")[0].strip()
    assert tokenizer.pad_token_id is None


def test_the_generation_settings_of_the_model_are_ignored_and_kept(factlm: Path) -> None:
    model, tokenizer = load(factlm)
    prompts = prompts_of(factlm, 12)
    plain = generate_answers(model, tokenizer, prompts)
    own = model.generation_config
    own.do_sample, own.temperature, own.top_k = True, 5.0, 7
    own.repetition_penalty, own.no_repeat_ngram_size, own.min_new_tokens = 9.0, 1, 20
    own.suppress_tokens = list(range(3, 4000))
    own.num_beams = 3
    kept = deepcopy(own.to_dict())
    model.config.use_cache = False
    assert generate_answers(model, tokenizer, prompts) == plain
    assert model.generation_config is own
    assert own.to_dict() == kept
    assert model.config.use_cache is False


def test_training_flags_and_gradient_mode_are_restored(factlm: Path) -> None:
    model, tokenizer = load(factlm)
    model.train()
    model.model.layers[2].eval()
    model.config.attention_dropout = 0.5
    before = [module.training for module in model.modules()]
    generate_answers(model, tokenizer, prompts_of(factlm, 3))
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()
    own = model.generation_config
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    with pytest.raises(EditError, match="NaN"):
        generate_answers(model, tokenizer, prompts_of(factlm, 3))
    assert [module.training for module in model.modules()] == before
    assert model.generation_config is own
    assert torch.is_grad_enabled()


def test_dropout_is_off_during_generation(factlm: Path) -> None:
    model, tokenizer = load(factlm)
    prompts = prompts_of(factlm, 8)
    plain = generate_answers(model, tokenizer, prompts)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    model.train()
    assert generate_answers(model, tokenizer, prompts) == plain


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers for it
def test_a_peft_model_answers_with_its_adapter(factlm: Path) -> None:
    peft = pytest.importorskip("peft")
    model, tokenizer = load(factlm)
    prompts = prompts_of(factlm, 8)
    plain = generate_answers(model, tokenizer, prompts)
    lora = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM", lora_dropout=0.5)
    )
    lora.train()
    own = model.generation_config
    own.repetition_penalty = 9.0
    assert generate_answers(lora, tokenizer, prompts) == plain
    assert model.generation_config is own
    for name, weight in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=1.0)
    changed = generate_answers(lora, tokenizer, prompts, batch_size=3)
    assert changed != plain
    merged = lora.merge_and_unload()
    assert generate_answers(merged, tokenizer, prompts) == changed
