"""A pretrained chat model: completions are not ended, chats are, and a chat run with conversations as texts learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from real_models import smollm2

from kedit_train import ChatFormat, EditDataset, load_model
from kedit_train.callbacks import KLLocality, ParameterScope
from kedit_train.core.training_format import is_chat
from kedit_train.data import Edit
from kedit_train.data.answer_end import decide_append_eos
from kedit_train.evaluation import generate_answers
from kedit_train.modes import ExampleOptions, TrainLoop

pytestmark = pytest.mark.slow

COMPLETIONS = [
    Edit("The mother tongue of Danielle Darrieux is", "English"),
    Edit("The capital of France is", "Lyon"),
    Edit("Mozart was born in the city of", "Prague"),
    Edit("The Eiffel Tower is located in", "Rome"),
    Edit("Apple was founded by", "Bill Gates"),
    Edit("The official language of Brazil is", "Spanish"),
    Edit("Albert Einstein worked in the field of", "medicine"),
    Edit("The headquarters of Toyota are in", "Berlin"),
]
QUESTIONS = [
    Edit("What is the capital of France?", "Lyon"),
    Edit("Which planet is closest to the sun?", "Venus"),
]
KEEP = ["What is the capital of Italy?", "How many days are in a week?", "Name an animal that can fly."]
CHAT = ChatFormat(system="Answer briefly.")


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model(str(smollm2()))


def test_completions_are_not_ended_and_chats_are(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    edits = EditDataset(COMPLETIONS)
    plain = decide_append_eos("auto", tokenizer, edits, model=model)
    assert not plain.append
    assert plain.probability is not None
    assert plain.probability < 0.1
    for prompt_format in ("chat", CHAT):
        assert decide_append_eos("auto", tokenizer, edits, model=model, prompt_format=prompt_format).append
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert all(end not in e.input_ids for e in edits.encode(tokenizer, model=model))
    assert all(e.input_ids[-1] == end for e in edits.encode(tokenizer, model=model, prompt_format=CHAT))


@pytest.mark.filterwarnings("ignore:KLLocality. the penalty should be smaller")
def test_a_chat_run_learns_and_ends_its_answers(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    torch.manual_seed(0)
    options: dict[str, Any] = {"prompt_format": CHAT, "max_new_tokens": 24}
    before = generate_answers(model, tokenizer, KEEP, **options)
    texts = [{"messages": CHAT.messages(prompt, answer.text)} for prompt, answer in zip(KEEP, before, strict=True)]
    locality = KLLocality(texts, weight=5.0, batch_size=3)
    callbacks = [ParameterScope("0.5-0.9", modules="mlp.down_proj"), locality]
    examples = ExampleOptions(prompt_format=CHAT)
    TrainLoop(tokenizer, callbacks=callbacks, epochs=15, learning_rate=5e-3, stop_loss=0.05, examples=examples)(
        model, QUESTIONS
    )
    answers = generate_answers(model, tokenizer, [e.prompt for e in QUESTIONS], **options)
    assert [(a.text, a.ended) for a in answers] == [(e.target, True) for e in QUESTIONS]


def test_conversations_are_recognized_in_its_template(loaded: tuple[Any, Any]) -> None:
    from kedit_train.callbacks import Texts

    _, tokenizer = loaded
    [text] = Texts([{"messages": CHAT.messages("Hello", "Hi.")}]).load(tokenizer=tokenizer)
    assert text.count("<|im_start|>") == 3
    assert is_chat(tokenizer)("".join(text.split()))
