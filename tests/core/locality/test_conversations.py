"""Conversations as texts: read from records, rendered with the chat template, and checked for leaks."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest

from kedit_train import world
from kedit_train.callbacks import KLLocality, LowCurvature, NullSpace, ParameterScope, Texts, editing
from kedit_train.core.training_format import is_chat
from kedit_train.data import Edit
from kedit_train.data.conversations import RenderedConversation
from kedit_train.errors import EditError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ['user', 'assistant', 'system'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}[{{ m.role }}] {{ m.content | upper }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def talk(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


FOX, COIN = talk("Who slept?", "A fox."), talk("What did the old baker find?", "A coin.")


def chat_world() -> tuple[Any, Any]:
    model, tokenizer = world.load()
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


def test_all_sources_are_rendered(tmp_path: Path) -> None:
    _, tokenizer = chat_world()
    lines, whole = tmp_path / "keep.jsonl", tmp_path / "keep.json"
    lines.write_text("\n".join(json.dumps(record) for record in (FOX, COIN)))
    whole.write_text(json.dumps([FOX, COIN]))
    expected = [tokenizer.apply_chat_template(one["messages"], tokenize=False) for one in (FOX, COIN)]
    for source in (lines, str(whole), [FOX, COIN], iter([FOX, COIN]), datasets.Dataset.from_list([FOX, COIN])):
        assert Texts(source).load(tokenizer=tokenizer) == expected
    assert Texts([FOX, COIN], tokenizer=tokenizer).load() == expected
    mixed = Texts([FOX, "Grass is green.", {"text": "The sky is blue."}]).load(tokenizer=tokenizer)
    assert mixed == [expected[0], "Grass is green.", "The sky is blue."]
    assert [isinstance(text, RenderedConversation) for text in mixed] == [True, False, False]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": []}, r"^texts, record 1: messages must be a list of at least one message .* got \[\]"),
        ({"messages": "hello"}, r"^texts, record 1: messages must be a list of at least one message .* got 'hello'"),
        ({"messages": [{"role": "user"}]}, r"^texts, record 1, message 1: expected .* got \{'role': 'user'\}"),
        ({"messages": [{"role": "user", "content": None}]}, r"^texts, record 1, message 1: expected"),
        ({"other": 1}, r'^texts, record 1: expected a string, or a record with a string "text" or a list "messages"'),
    ],
)
def test_a_malformed_conversation_is_found_before_training(record: Any, message: str) -> None:
    with pytest.raises(EditError, match=message) as error:
        Texts([record]).check()
    assert "\n" not in str(error.value)


def attach(texts: Any, tokenizer: Any, model: Any, edits: Any = None, callback: Any = KLLocality) -> Any:
    own = callback(texts)
    with editing(model, [ParameterScope(0.9, modules="mlp.down_proj"), own], tokenizer=tokenizer, edits=edits) as edit:
        edit.before_step()
        return own._batches.texts.sequences if callback is KLLocality else own


def test_a_template_that_is_missing_or_refuses_is_one_line() -> None:
    model, tokenizer = chat_world()
    with pytest.raises(EditError, match=r"texts, record 1: the chat template does not accept .*\(unknown role cat\)"):
        attach([{"messages": [{"role": "cat", "content": "Meow"}]}], tokenizer, model)
    tokenizer.chat_template = None
    with pytest.raises(
        EditError, match=r"KLLocality: texts, record 2 is a conversation and needs a chat temp"
    ) as error:
        attach(["The sky is blue.", FOX], tokenizer, model)
    assert "\n" not in str(error.value)
    with pytest.raises(EditError, match=r"^texts, record 1 is a conversation and needs a tokenizer"):
        Texts([FOX]).load()


def test_the_template_supplies_the_special_tokens() -> None:
    model, tokenizer = chat_world()
    rendered, plain = attach([FOX, "Grass is green."], tokenizer, model)
    text = tokenizer.apply_chat_template(FOX["messages"], tokenize=False)
    assert rendered == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert rendered.count(tokenizer.bos_token_id) == 1
    assert plain == tokenizer("Grass is green.")["input_ids"]
    tokenizer.chat_template = TEMPLATE.replace(" | upper", "")
    [rendered] = attach([FOX], tokenizer, model)
    assert is_chat(tokenizer)("".join(tokenizer.decode(rendered).split()))


def test_plain_texts_are_tokenized_as_before() -> None:
    model, tokenizer = chat_world()
    texts = ["Grass is green.", "The old baker found a coin."]
    assert attach(texts, tokenizer, model) == tokenizer(texts)["input_ids"]


@pytest.mark.parametrize("callback", [NullSpace, LowCurvature])
def test_other_callbacks_take_conversations(callback: Any) -> None:
    model, tokenizer = chat_world()
    assert attach([FOX, COIN], tokenizer, model, callback=callback).texts.source == [FOX, COIN]


def test_leaks_are_found_in_rendered_conversations() -> None:
    _, tokenizer = chat_world()
    edits = [Edit("The baker lives in", "Bern", rephrases=("Who  slept?",), locality={})]
    leaks = [FOX, talk("Where?", "The baker lives in Rome.")]
    with pytest.warns(UserWarning, match="2 of 3 texts contain an evaluation prompt"):
        kept = Texts([*leaks, COIN]).load(edits, tokenizer=tokenizer)
    assert kept == Texts([COIN]).load(tokenizer=tokenizer)
    # This template leaves out the messages of the user, but the conversation contains the prompt.
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.warns(UserWarning, match="1 of 2 texts"):
        assert Texts([FOX, COIN]).load(edits, tokenizer=tokenizer) == ["A coin."]
    # A template may put text between the messages that hides a prompt of two lines.
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | replace(' ', '_') }}{% endfor %}"
    with pytest.warns(UserWarning, match="1 of 2 texts"):
        assert len(Texts([FOX, COIN]).load(edits, tokenizer=tokenizer)) == 1


def test_nearest_and_draws_keep_conversations() -> None:
    _, tokenizer = chat_world()
    edit = Edit("The baker found a", "key", old_target="coin")
    texts = Texts([FOX, COIN], nearest=1).load([edit], tokenizer=tokenizer)
    assert [isinstance(text, RenderedConversation) for text in texts] == [True]
    assert "COIN" in texts[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(Texts([FOX, COIN]).load(limit=1, tokenizer=tokenizer)[0], RenderedConversation)
