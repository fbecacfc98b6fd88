"""Chat and question formats equal the templates of real models and the tokens of an SFTTrainer."""

from __future__ import annotations

import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from installed import older

from kedit_train import world
from kedit_train.data import Edit, EditDataset
from kedit_train.data.prompts import as_question, end_id, pair_ids, prompt_ids, render_prompt
from kedit_train.errors import EditError
from kedit_train.evaluation import generate_answers

# Shortened versions of common templates. The last one closes no turn.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_BREAK = CHATML.replace("<|im_end|>\n", "<|im_end|>")
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
OPEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<end_of_turn>"]
# Templates of real models that trl contains, and the token that closes the turn of the assistant.
REAL = {"qwen3": "<|im_end|>", "qwen2_5": "<|im_end|>", "llama3": "<|eot_id|>", "gemma3": "<end_of_turn>"}


@pytest.fixture
def chatty() -> Any:
    def make(template: str) -> tuple[Any, Any]:
        model, tokenizer = world.load()
        tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
        with torch.random.fork_rng():
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        tokenizer.chat_template = template
        return model, tokenizer

    return make


def real(name: str) -> str:
    if older("trl", "1.16"):
        pytest.skip("this version of TRL contains no chat templates of models")
    return files("trl").joinpath("chat_templates", f"{name}.jinja").read_text()


@pytest.mark.parametrize("name", REAL)
def test_a_chat_equals_the_template_of_a_real_model(chatty: Any, name: str) -> None:
    _, tokenizer = chatty(real(name))
    edit = world.edits(1)[0]
    one = EditDataset([edit]).encode(tokenizer, prompt_format="chat")[0]
    head, tail = one.input_ids[: one.target_start], one.input_ids[one.target_start :]
    closing = tokenizer.convert_tokens_to_ids(REAL[name])
    assert (tail[-1], tail.count(closing)) == (closing, 1)
    assert tokenizer.eos_token_id not in tail
    assert tokenizer.decode(tail[:-1]).strip() == edit.target
    assert head == prompt_ids(tokenizer, edit.prompt, "chat")
    messages = [{"role": "user", "content": edit.prompt}, {"role": "assistant", "content": edit.target}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    # Everything before the target is text of the template, also an empty thinking block.
    assert whole.startswith(render_prompt(tokenizer, edit.prompt, "chat"))
    assert ("</think>" in render_prompt(tokenizer, edit.prompt, "chat")) == (name == "qwen3")
    assert tokenizer.decode(one.input_ids) == tokenizer.decode(
        tokenizer(whole[: whole.rindex(REAL[name]) + len(REAL[name])], add_special_tokens=False)["input_ids"]
    )
    without = EditDataset([edit]).encode(tokenizer, prompt_format="chat", append_eos=False)[0]
    assert without.input_ids == one.input_ids[:-1]
    assert pair_ids(tokenizer, edit.prompt, edit.target, "chat") == one


def test_an_answer_ends_with_end_of_text_if_the_template_closes_no_turn(chatty: Any) -> None:
    _, tokenizer = chatty(OPEN)
    assert end_id(tokenizer, "chat") == tokenizer.eos_token_id == end_id(tokenizer)
    one = EditDataset([Edit("Who?", "Ann")]).encode(tokenizer, prompt_format="chat")[0]
    tail = one.input_ids[one.target_start :]
    assert (tail.count(tokenizer.eos_token_id), tail[-1]) == (1, tokenizer.eos_token_id)
    tokenizer.eos_token = None
    with pytest.raises(EditError, match=r"^facts, edit 1: .*neither the chat template nor the tokenizer"):
        EditDataset([Edit("Who?", "Ann")], name="facts").encode(tokenizer, prompt_format="chat")
    tokenizer.chat_template = None
    with pytest.raises(EditError, match=r"needs a chat template.*--model.chat_template in a recipe"):
        EditDataset([Edit("Who?", "Ann")]).encode(tokenizer, prompt_format="chat")


def test_spaces_of_the_template_belong_to_the_answer(chatty: Any) -> None:
    _, tokenizer = chatty(INST)
    one = pair_ids(tokenizer, "Who?", "Ann", "chat")
    assert render_prompt(tokenizer, "Who?", "chat").endswith("[/INST]")
    assert tokenizer.decode(one.input_ids[one.target_start :]) == f" Ann{tokenizer.eos_token}"


def trl_rows(model: Any, tokenizer: Any, edits: EditDataset, prompt_format: Any, folder: Path) -> list[Any]:
    """Return the token ids and labels that the collator of an SFTTrainer returns."""
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    args = SFTConfig(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = edits.to_prompt_completion(prompt_format=prompt_format)
        trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    rows = []
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        rows.append((batch["input_ids"][0].tolist(), batch["labels"][0].tolist()))
    return rows


def ours(edits: EditDataset, tokenizer: Any, prompt_format: Any) -> list[Any]:
    encoded = edits.encode(tokenizer, prompt_format=prompt_format)
    return [(e.input_ids, [-100] * e.target_start + e.input_ids[e.target_start :]) for e in encoded]


@pytest.mark.parametrize("form", ["chat", "question", "plain"])
def test_trl_trains_the_same_tokens(chatty: Any, form: str, tmp_path: Path) -> None:
    model, tokenizer = chatty(NO_BREAK)
    edits = EditDataset(world.edits(4))
    own = ours(edits, tokenizer, form)
    if form != "chat":
        assert own[0][0][0] == tokenizer.bos_token_id
    assert trl_rows(model, tokenizer, edits, form, tmp_path) == own
    if form == "question":
        assert tokenizer.decode(own[0][0]).removeprefix(tokenizer.bos_token).startswith(as_question(edits[0].prompt))


def test_trl_also_trains_the_text_after_the_turn(chatty: Any, tmp_path: Path) -> None:
    model, tokenizer = chatty(CHATML)
    edits = EditDataset(world.edits(2))
    line_break = tokenizer("\n", add_special_tokens=False)["input_ids"]
    expected = [(ids + line_break, labels + line_break) for ids, labels in ours(edits, tokenizer, "chat")]
    assert trl_rows(model, tokenizer, edits, "chat", tmp_path) == expected


def test_a_chat_is_learned_and_generation_stops_at_the_end_of_the_turn(chatty: Any) -> None:
    from kedit_train.callbacks import ParameterScope
    from kedit_train.modes import ExampleOptions, TrainLoop

    model, tokenizer = chatty(CHATML)
    edits = world.edits(4)
    closing = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert closing not in {tokenizer.eos_token_id, model.generation_config.eos_token_id}
    before = generate_answers(model, tokenizer, [e.prompt for e in edits], prompt_format="chat")
    assert not any(a.text == e.target for a, e in zip(before, edits, strict=True))
    train = TrainLoop(
        tokenizer,
        callbacks=[ParameterScope(modules="*")],
        learning_rate=2e-3,
        epochs=40,
        examples=ExampleOptions(prompt_format="chat"),
    )
    train(model, edits)
    said = generate_answers(model, tokenizer, [e.prompt for e in edits], prompt_format="chat")
    assert [(a.text, a.ended) for a in said] == [(e.target, True) for e in edits]
    row = torch.tensor([prompt_ids(tokenizer, edits[0].prompt, "chat")])
    length = len(said[0].ids)
    raw = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=length + 1, do_sample=False)
    assert raw[0, row.shape[1] :].tolist() == [*said[0].ids, closing]
