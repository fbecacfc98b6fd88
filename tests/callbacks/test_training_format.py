"""Chats: EditMetrics uses the prompt format of the training examples, and KLLocality warns if no text is a chat."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conformance.hosts import ARGUMENTS, collator, lightning_trainer
from installed import needs
from trl import SFTConfig, SFTTrainer

from kedit_train import EditSFTConfig, EditSFTTrainer, world
from kedit_train.callbacks import EditMetrics, KLLocality, ParameterScope, SecondOrderLocality, TokenLoss, editing
from kedit_train.core.training_format import is_chat
from kedit_train.data import EditDataset
from kedit_train.evaluation.options import EvaluationOptions

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}[answer] {% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}[{{ m.role }}] {{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[answer]{% endif %}"
)
TEXTS = ["The old baker found a coin.", "A red fox slept."]
UNKNOWN = "EditMetrics: the evaluation uses plain prompts, because it is unknown whether"


def chat_world() -> tuple[Any, Any, EditDataset]:
    model, tokenizer = world.load()
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer, EditDataset(world.edits(n=3))


def metrics_of(edits: EditDataset, **options: Any) -> EditMetrics:
    return EditMetrics(edits, every_n_steps=0, show=False, evaluation=EvaluationOptions(max_new_tokens=2, **options))


def asked(metrics: EditMetrics) -> str:
    assert metrics.unedited is not None
    return metrics.unedited.meta["settings"]["prompt_format"]


def messages(edits: EditDataset, system: str = "") -> datasets.Dataset:
    first = [{"role": "system", "content": system}] if system else []
    rows = [[*first, {"role": "user", "content": e.prompt}, {"role": "assistant", "content": e.target}] for e in edits]
    return datasets.Dataset.from_dict({"messages": rows})


def sft(folder: Path, data: Any, callbacks: list[Any], **arguments: Any) -> None:
    model, tokenizer, _ = chat_world()
    args = SFTConfig(str(folder), **(ARGUMENTS | {"max_steps": 1} | arguments))
    SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, callbacks=callbacks).train()


SCOPE = {"layers": 0.9, "modules": "mlp.down_proj"}


@pytest.mark.parametrize("data", ["messages", "system prompt", "prompt and completion"])
def test_the_metrics_ask_chats_if_the_trainer_trains_chats(data: str, tmp_path: Path) -> None:
    *_, edits = chat_world()
    made = {
        "messages": lambda: messages(edits),
        "system prompt": lambda: messages(edits, system="Be brief."),
        "prompt and completion": lambda: edits.to_prompt_completion(prompt_format="chat"),
    }[data]()
    metrics = metrics_of(edits)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        sft(tmp_path, made, [ParameterScope(**SCOPE), metrics], assistant_only_loss=data == "messages")
    warned = [str(w.message) for w in caught if "begin with messages that the evaluation" in str(w.message)]
    assert len(warned) == (data == "system prompt")
    assert asked(metrics) == "chat"


def test_the_metrics_ask_plainly_or_in_questions_if_the_trainer_trains_those(tmp_path: Path) -> None:
    *_, edits = chat_world()
    for prompt_format in ("plain", "question"):
        metrics = metrics_of(edits)
        sft(tmp_path, edits.to_prompt_completion(prompt_format=prompt_format), [ParameterScope(**SCOPE), metrics])
        assert asked(metrics) == prompt_format


@needs("trl", "1.16")
@pytest.mark.parametrize("prompt_format", ["plain", "question", "chat"])
def test_the_metrics_ask_as_prompts_without_completions_are_written(prompt_format: Any, tmp_path: Path) -> None:
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    model, tokenizer, edits = chat_world()
    metrics = metrics_of(edits)
    given = {"max_steps": 1, "max_completion_length": 2, "num_generations": 4, "teacher_model_kind": "live"}
    SDFTTrainer(
        model,
        args=SDFTConfig(str(tmp_path), **(ARGUMENTS | given)),
        train_dataset=edits.to_privileged_context(prompt_format=prompt_format),
        processing_class=tokenizer,
        callbacks=[ParameterScope(**SCOPE), metrics],
    ).train()
    assert asked(metrics) == prompt_format


def test_a_system_prompt_is_asked_if_it_is_set(tmp_path: Path) -> None:
    *_, edits = chat_world()
    metrics = metrics_of(edits, prompt_format={"system": "Be brief."})
    sft(tmp_path, messages(edits, system="Be brief."), [ParameterScope(**SCOPE), metrics])
    assert asked(metrics) == {"system": "Be brief.", "history": [], "thinking": False}


def test_an_explicit_format_wins(tmp_path: Path) -> None:
    *_, edits = chat_world()
    metrics = metrics_of(edits, prompt_format="plain")
    sft(tmp_path, messages(edits), [ParameterScope(**SCOPE), metrics])
    assert asked(metrics) == "plain"


def test_the_edit_trainer_follows_a_conversational_dataset(tmp_path: Path) -> None:
    model, tokenizer, edits = chat_world()
    arguments = {**ARGUMENTS, "max_steps": 1, "edit_metrics": {"show": False, "every_n_steps": 0}}
    args = EditSFTConfig(str(tmp_path), **arguments, parameter_scope=SCOPE)
    trainer = EditSFTTrainer(model, args=args, edits=edits, train_dataset=messages(edits), processing_class=tokenizer)
    trainer.train()
    assert asked(next(c for c in trainer.callback_handler.callbacks if isinstance(c, EditMetrics))) == "chat"


def test_a_data_module_says_its_format() -> None:
    import lightning as L

    from kedit_train.modules import EditDataModule, EditModule

    data, module = EditDataModule(limit=2, prompt_format="question"), EditModule()
    metrics = EditMetrics(every_n_steps=0, show=False, evaluation=EvaluationOptions(max_new_tokens=2))
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    options |= {"accelerator": "cpu", "max_steps": 1, "enable_progress_bar": False}
    L.Trainer(callbacks=[ParameterScope(**SCOPE), metrics], **options).fit(module, datamodule=data)
    assert asked(metrics) == "question"


def loop(callbacks: list[Any], template: str | None = TEMPLATE) -> None:
    model, tokenizer, edits = chat_world()
    tokenizer.chat_template = template
    batch = collator(tokenizer)(edits.encode(tokenizer))
    with editing(model, [ParameterScope(**SCOPE), *callbacks], tokenizer=tokenizer) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=1e-3)
        edit.before_step()
        model(**batch).loss.backward()
        optimizer.step()


def test_an_unknown_format_is_one_warning_if_there_is_a_template() -> None:
    *_, edits = chat_world()
    with pytest.warns(UserWarning, match=UNKNOWN) as caught:
        loop([metrics_of(edits)])
    assert len(caught) == 1
    assert '; set prompt_format in EvaluationOptions to "chat" or "plain".' in str(caught[0].message)
    model, tokenizer, edits = chat_world()
    with pytest.warns(UserWarning, match="training examples of this lightning run"):
        lightning_trainer(model, tokenizer, edits, [ParameterScope(**SCOPE), metrics_of(edits)], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop([metrics_of(edits, prompt_format="plain")])
        loop([metrics_of(edits)], template=None)


def test_a_chat_run_whose_texts_are_plain_is_one_warning(tmp_path: Path) -> None:
    *_, edits = chat_world()
    message = r'^KLLocality: the training examples are chats, but none of the 2 texts in texts= is a chat, .*"messages"'
    with pytest.warns(UserWarning, match=message) as caught:
        sft(tmp_path, messages(edits), [ParameterScope(**SCOPE), KLLocality(TEXTS, batch_size=1)])
    assert len([w for w in caught if "KLLocality" in str(w.message)]) == 1
    with pytest.warns(UserWarning, match=message.replace("KLLocality", "SecondOrderLocality")):
        sft(tmp_path, messages(edits), [ParameterScope(**SCOPE), TokenLoss(), SecondOrderLocality(TEXTS)])
    talk = [{"role": "user", "content": "Who slept?"}, {"role": "assistant", "content": "A fox."}]
    chat = {"messages": talk}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sft(tmp_path, messages(edits), [ParameterScope(**SCOPE), KLLocality([*TEXTS, chat], batch_size=1)])
        sft(tmp_path, edits.to_prompt_completion(), [ParameterScope(**SCOPE), KLLocality(TEXTS, batch_size=1)])


def test_a_chat_is_recognized_by_what_stands_before_the_answer() -> None:
    _, tokenizer, _ = chat_world()
    assert is_chat(tokenizer)("[user]Who?[answer]Ann")
    assert not is_chat(tokenizer)("Theansweris42")
    tokenizer.chat_template = None
    assert not is_chat(tokenizer)("[user]Who?[answer]Ann")
