"""ChatFormat: a system prompt, earlier turns and thoughts, in training and in generation."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from installed import older

from kedit_train import ChatFormat, EditDataset, EditSFTConfig, evaluate, world
from kedit_train.data import Edit
from kedit_train.data.chat_format import describe_format, read_format
from kedit_train.data.prompts import prompt_ids, render_prompt
from kedit_train.errors import EditError
from kedit_train.evaluation import EvaluationOptions, generate_answers
from kedit_train.evaluation.asking.thoughts import after_thoughts

HISTORY = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
CHAT = ChatFormat(system="Be brief.", history=HISTORY)
SIMPLE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# The generation prompt of DeepSeek-R1 opens the thoughts, and a rendered answer has none.
OPENING = SIMPLE.replace("[assistant]{% endif %}", "[assistant]<think>\n{% endif %}")


def with_template(template: str) -> tuple[Any, Any]:
    model, tokenizer = world.load()
    tokenizer.chat_template = template
    return model, tokenizer


def real(name: str) -> str:
    if older("trl", "1.16"):
        pytest.skip("this version of TRL contains no chat templates of models")
    return files("trl").joinpath("chat_templates", f"{name}.jinja").read_text()


def test_system_prompt_and_earlier_turns_come_first() -> None:
    _, tokenizer = with_template(SIMPLE)
    expected = "[system] Be brief. [user] Hello [assistant] Hi.{eos} [user] Who? [assistant]"
    assert render_prompt(tokenizer, "Who?", CHAT) == expected.format(eos=tokenizer.eos_token)
    one = EditDataset([Edit("Who?", "Ann")]).encode(tokenizer, prompt_format=CHAT)[0]
    assert one.input_ids[: one.target_start] == prompt_ids(tokenizer, "Who?", CHAT)
    assert tokenizer.decode(one.input_ids[one.target_start :]) == f" Ann{tokenizer.eos_token}"


def test_an_empty_chat_format_is_a_chat() -> None:
    _, tokenizer = with_template(SIMPLE)
    edits = EditDataset(world.edits(2))
    assert edits.encode(tokenizer, prompt_format=ChatFormat()) == edits.encode(tokenizer, prompt_format="chat")
    assert describe_format(ChatFormat()) == "chat"
    assert read_format(describe_format(CHAT)) == CHAT


def test_trl_gets_the_same_messages() -> None:
    row = EditDataset([Edit("Who?", "Ann")]).to_prompt_completion(prompt_format=CHAT)[0]
    assert row["prompt"] == CHAT.messages("Who?")
    assert row["completion"] == [{"role": "assistant", "content": "Ann"}]
    row = EditDataset([Edit("Who?", "Ann")]).to_privileged_context(prompt_format=CHAT)[0]
    assert row == {"prompt": CHAT.messages("Who?"), "privileged_context": "Who? Ann."}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"system": 3}, r"^ChatFormat: system must be text, or None, got 3"),
        ({"history": "Hello"}, r"^ChatFormat: history must be a list of messages, got 'Hello'"),
        ({"history": [{"role": "user"}]}, r"^ChatFormat: history, message 1: expected"),
        ({"thinking": 1}, r"^ChatFormat: thinking must be True or False, got 1"),
        ({"sytem": "x"}, r"^ChatFormat: unknown argument 'sytem'; use only system, history, thinking"),
    ],
)
def test_malformed_arguments_are_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(EditError, match=message):
        read_format(arguments)


def test_thoughts_are_context_without_a_loss() -> None:
    chat = ChatFormat(thinking=True)
    empty = "<think>\n\n</think>\n\n"
    for template, opened in ((real("qwen3"), ""), (SIMPLE, ""), (OPENING, "<think>\n")):
        _, tokenizer = with_template(template)
        generation = render_prompt(tokenizer, "Who?", chat)
        assert generation.endswith(opened)
        assert "</think>" not in generation
        one = EditDataset([Edit("Who?", "Ann")]).encode(tokenizer, prompt_format=chat)[0]
        head = tokenizer.decode(one.input_ids[: one.target_start])
        target = tokenizer.decode(one.input_ids[one.target_start :])
        assert head == tokenizer.decode(
            tokenizer(generation + empty.removeprefix(opened), add_special_tokens=False).input_ids
        )
        assert target.startswith("Ann")
        assert target.count("Ann") == 1
        with pytest.raises(EditError, match=r"edit 1: with thinking=True, the target must be the answer after"):
            EditDataset([Edit("Who?", "<think>No</think>Ann")]).encode(tokenizer, prompt_format=chat)
    with pytest.raises(
        EditError, match=r"prompt_format must have thinking=False, because SFTTrainer would train.*to_tokens"
    ):
        EditDataset([Edit("Who?", "Ann")]).to_prompt_completion(prompt_format=chat)
    with pytest.raises(EditError, match=r"must have thinking=False, because the trainer.*chat_template_kwargs="):
        EditDataset([Edit("Who?", "Ann")]).to_privileged_context(prompt_format=chat)


def test_the_answer_stands_after_the_thoughts() -> None:
    _, tokenizer = world.load()

    def answer(text: str, ended: bool = True) -> str:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokenizer.decode(after_thoughts(tokenizer, ids, ended=ended)).strip()

    known = tokenizer.decode(tokenizer(" Ann", add_special_tokens=False)["input_ids"]).strip()
    assert answer("<think>It may be Bob.\n\nNo.</think>\n\n Ann") == known
    assert answer("It may be Bob.</think> Ann") == known
    assert answer("It may be Bob.</think>") == ""
    assert answer("<think>It may be Bob", ended=False) == ""
    assert answer("<think>It may be Bob") == ""
    assert answer(" Ann") == known
    assert answer(" Ann", ended=False) == ""


def test_a_thinking_model_is_scored_after_its_thoughts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model writes a fixed text: thoughts of two lines with the old answer, then the new answer."""
    from kedit_train.evaluation.asking import generate as module
    from kedit_train.evaluation.asking.decoding import Continuation

    model, tokenizer = with_template(SIMPLE)
    edit = world.edits(1)[0]
    text = f"<think>Is it {edit.old_target}?\nNo.</think>\n\n {edit.target}"
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    seen: list[Any] = []

    def decode(inner: Any, sequences: Any, limits: Any, is_end: Any, **options: Any) -> list[Continuation]:
        seen.extend(tokenizer.decode(s) for s in sequences)
        assert not any(map(is_end, ids[:-1]))
        return [Continuation(list(ids), True) for _ in sequences]

    monkeypatch.setattr(module, "decode_greedily", decode)
    chat = ChatFormat(thinking=True)
    assert generate_answers(model, tokenizer, [edit.prompt], prompt_format=chat)[0].text == edit.target
    report = evaluate(model, tokenizer, [edit], options=EvaluationOptions(prompt_format=chat, max_new_tokens=64))
    assert report.metrics["reliability"]["generated"].value == 1.0
    assert report.meta["settings"]["prompt_format"] == {"system": None, "history": [], "thinking": True}
    assert set(seen) == {tokenizer.decode(prompt_ids(tokenizer, p, chat)) for p in {r.prompt for r in report.answers}}


def test_a_configuration_gives_a_mapping(tmp_path: Path) -> None:
    args = EditSFTConfig(str(tmp_path), bf16=False, prompt_format={"system": "Be brief."}, edit_metrics={})
    [metrics] = args.edit_callbacks()
    assert metrics.evaluation.prompt_format == ChatFormat(system="Be brief.")
    args.to_json_string()
    args = EditSFTConfig(str(tmp_path), bf16=False, prompt_format='{"system": "Be brief."}')
    assert read_format(args.prompt_format) == ChatFormat(system="Be brief.")
    with pytest.raises(EditError, match=r"prompt_format must be valid JSON, got '\{'"):
        read_format("{")


def test_the_unedited_report_must_have_the_same_format() -> None:
    model, tokenizer = with_template(SIMPLE)
    edits = world.edits(1)
    options = [EvaluationOptions(prompt_format=f, max_new_tokens=2) for f in (CHAT, ChatFormat(system="Be long."))]
    before = evaluate(model, tokenizer, edits, options=options[0])
    evaluate(model, tokenizer, edits, options=options[0], unedited=before)
    with pytest.raises(EditError, match="was made with prompt_format="):
        evaluate(model, tokenizer, edits, options=options[1], unedited=before)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"history":' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"history":' + "[" * 600 + "]" * 600 + "}", "more than 400 levels"),
        ('{"system": ' + "1" * 5000 + "}", "digits"),
        ('{"system"', "delimiter"),
    ],
)
def test_json_that_cannot_be_read_is_one_short_line(text: str, reason: str) -> None:
    with pytest.raises(EditError, match=reason) as error:
        EvaluationOptions(prompt_format=text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
