"""With neighbors, NullSpace also preserves layer outputs on the edits' prompts with other subjects."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
from callbacks.inputs import TEXTS, WEIGHT, ScopeOfEdits, adamw, inputs_of, principal, share_of, train

from kedit_train import EditDataModule, EditDataset, EditModule, TrainLoop, world
from kedit_train.callbacks import NullSpace, ParameterScope, TokenLoss, editing
from kedit_train.core.locality.neighbor_texts import neighbor_texts
from kedit_train.data import Edit
from kedit_train.data.neighbor_prompts import neighbor_prompts
from kedit_train.errors import EditError
from kedit_train.modes import ExampleOptions

NAME = WEIGHT["llama"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: "
    "{% endif %}"
)
EDIT = Edit("w40 w41 w50", "w42", subject="w41")


@pytest.mark.parametrize("neighbors", [0, 3])
def test_outputs_on_the_prompts_with_other_subjects_stay(make, words, neighbors):
    model = make("llama")
    before = model.get_parameter(NAME).detach().clone()
    prompts = neighbor_prompts([EDIT], TEXTS, 3)
    assert len(prompts) == 3
    of_neighbors = principal(inputs_of(model, words, NAME, prompts), 0.9)
    of_texts = principal(inputs_of(model, words, NAME), 0.9)
    ids = torch.tensor([words(f"{EDIT.prompt} {EDIT.target}")["input_ids"]])
    callbacks = [NullSpace(TEXTS, neighbors=neighbors), ScopeOfEdits([EDIT])]
    with editing(model, callbacks, tokenizer=words) as edit:
        train(model, edit, ids, adamw(edit.parameters()))
    change = model.get_parameter(NAME).detach().double() - before.double()
    assert share_of(change, of_texts) < 1e-5
    leak = share_of(change, of_neighbors)
    assert leak < 1e-5 if neighbors else leak > 0.05


def test_energy_applies_to_the_neighbors_separately(make, words):
    ids = torch.tensor([words(EDIT.prompt)["input_ids"]])
    model = make("llama")
    unedited = copy.deepcopy(model)
    callbacks = [NullSpace(TEXTS, energy=0.5, neighbors=3), ScopeOfEdits([EDIT])]
    with editing(model, callbacks, tokenizer=words, log_every_n_steps=1) as edit:
        train(model, edit, ids, adamw(edit.parameters()), 1)
    prompts = neighbor_prompts([EDIT], TEXTS, 3)
    ranks = [principal(inputs_of(unedited, words, NAME, texts), 0.5).shape[1] for texts in (TEXTS, prompts)]
    assert edit.history[-1]["edit/drift/null_space_rank"] == sum(ranks)


def test_the_limit_of_texts_does_not_limit_the_neighbors(make, words):
    read: list[int] = []

    class Recorder(NullSpace):
        def _moments(self, *given: Any, **options: Any) -> Any:
            before = len(read)
            found = super()._moments(*given, **options)
            read.insert(before, next(iter(found.values())).count)
            return found

    with editing(make("llama"), [Recorder(TEXTS, limit=2, neighbors=3), ScopeOfEdits([EDIT])], tokenizer=words) as edit:
        edit.before_step()
    assert len(read) == 2
    assert read[0] < sum(len(text.split()) for text in TEXTS)
    assert read[1] == sum(len(prompt.split()) for prompt in neighbor_prompts([EDIT], TEXTS, 3))


@pytest.mark.parametrize(
    "chosen", ["plain", *(pytest.param(name, marks=pytest.mark.slow) for name in ("question", "chat"))]
)
def test_in_a_loop_the_prompts_have_the_format_and_the_first_tokens_of_the_training_examples(chosen, monkeypatch):
    model, tokenizer = world.load()
    tokenizer.chat_template = TEMPLATE
    edits = list(world.edits(4))
    read: list[list[int]] = []

    def recorded(run: Any, *given: Any) -> Any:
        texts = neighbor_texts(run, *given)
        assert texts is not None
        read.extend(texts.tokenize(run))
        return texts

    monkeypatch.setattr("kedit_train.callbacks.null_space.neighbor_texts", recorded)

    scope = ParameterScope(0.7, modules="mlp.down_proj.weight")
    examples = ExampleOptions(prompt_format=chosen)
    loop = TrainLoop(tokenizer, callbacks=[NullSpace("world", neighbors=2), scope], epochs=1, examples=examples)
    loop(model, edits)
    assert len(read) > 4
    expected = [e.input_ids for e in EditDataset(edits).encode(tokenizer, prompt_format=chosen)]
    assert {tuple(ids[:1]) for ids in read} == {tuple(ids[:1]) for ids in expected}
    texts = [tokenizer.decode(ids) for ids in read]
    assert all(("user: " in text) == (chosen == "chat") for text in texts)
    assert all(("Question" in text or "?" in text) == (chosen == "question") for text in texts)


def test_in_chats_the_prompts_are_messages(tmp_path, monkeypatch):
    model, tokenizer = world.load()
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    read: list[str] = []

    def recorded(run: Any, *given: Any) -> Any:
        texts: Any = neighbor_texts(run, *given)
        read.extend(texts.source)
        return texts

    monkeypatch.setattr("kedit_train.callbacks.null_space.neighbor_texts", recorded)

    texts = ["The sky is blue.", "Grass grows in the green valley."]
    for chosen in ("plain", "question", "chat"):
        read.clear()
        callbacks = [NullSpace(texts, neighbors=2), ParameterScope(0.7, modules="mlp.down_proj.weight"), TokenLoss()]
        trainer = L.Trainer(max_steps=1, callbacks=callbacks, logger=False, enable_checkpointing=False)
        trainer.fit(EditModule(str(tmp_path)), EditDataModule(limit=4, prompt_format=chosen))
        assert read
        for text in read:
            assert text.startswith("user: ") == (chosen == "chat")
            assert text.rstrip().endswith("assistant:") == (chosen == "chat")


def test_a_run_without_edits_is_refused(make, words):
    with (
        editing(make("llama"), [NullSpace(TEXTS, neighbors=2)], tokenizer=words) as edit,
        pytest.raises(
            EditError, match=r"^NullSpace: neighbors=2 replaces the subjects .* but the edits of this run are"
        ),
    ):
        edit.before_step()


def test_edits_without_subjects_get_a_warning(make, words):
    edit = Edit("w51", "w2")
    with (
        editing(make("llama"), [NullSpace(TEXTS, neighbors=2), ScopeOfEdits([edit])], tokenizer=words) as run,
        pytest.warns(UserWarning, match="NullSpace: neighbors=2 replaces the subject .* but no prompt could be made"),
    ):
        run.before_step()


def test_edits_whose_prompt_does_not_contain_their_subject_are_counted(make, words):
    edits = [EDIT, Edit("w52 w53", "w2", subject="w54")]
    message = (
        r"NullSpace: neighbors=2 replaces the subject .*, but in 1 of 2 edits, the prompt does not contain the subject "
        r"\(the first: 'w52 w53'\); set the subj"
    )
    with (
        editing(make("llama"), [NullSpace(TEXTS, neighbors=2), ScopeOfEdits(edits)], tokenizer=words) as run,
        pytest.warns(UserWarning, match=message),
    ):
        run.before_step()


def test_wrong_arguments():
    with pytest.raises(EditError, match=r"^NullSpace: neighbors must be an integer >= 0, got -1"):
        NullSpace(TEXTS, neighbors=-1)
    with pytest.raises(EditError, match=r"^NullSpace: neighbors=2 needs texts, but texts= contains model inputs"):
        NullSpace([torch.ones(2, 3)], neighbors=2)
