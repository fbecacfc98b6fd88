"""NullSpace over several runs: which inputs are preserved, by how many directions, and what a checkpoint stores."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from callbacks.inputs import SCOPE, TEXTS, WEIGHT, ScopeOfEdits, adamw, attach, inputs_of, principal, share_of, train

from kedit_train.callbacks import NullSpace, ParameterScope, editing
from kedit_train.core.state_file import load_state, save_state
from kedit_train.data import Edit, Probe
from kedit_train.errors import EditError

NAME = WEIGHT["llama"]


def rank_after_a_step(make: Any, words: Any, ids: torch.Tensor, **options: Any) -> float:
    model = make("llama")
    callbacks = [NullSpace(TEXTS, **options), ParameterScope(1, modules=SCOPE["llama"])]
    with editing(model, callbacks, tokenizer=words, log_every_n_steps=1) as edit:
        train(model, edit, ids, adamw(edit.parameters()), 1)
    return edit.history[-1]["edit/drift/null_space_rank"]


def test_energy_applies_to_texts_and_to_preserved_edits_separately(make, words, ids):
    model = make("llama")
    preserve = [Edit("w40 w41", "w42"), Edit("w50", "w51 w52")]
    of_edits = principal(inputs_of(model, words, NAME, ["w40 w41 w42 </s>", "w50 w51 w52 </s>"]), 0.5)
    of_texts = principal(inputs_of(model, words, NAME), 0.5)
    before = model.get_parameter(NAME).detach().clone()
    callbacks = [NullSpace(TEXTS, energy=0.5, preserve=preserve), ParameterScope(1, modules=SCOPE["llama"])]
    with editing(model, callbacks, tokenizer=words, log_every_n_steps=50) as edit:
        train(model, edit, ids, adamw(edit.parameters()))
    assert edit.history[-1]["edit/drift/null_space_rank"] == of_texts.shape[1] + of_edits.shape[1]
    change = model.get_parameter(NAME).detach().double() - before.double()
    assert share_of(change, of_edits) < 1e-5
    assert share_of(change, of_texts) < 1e-5


def test_limit_reads_fewer_texts_and_preserve_reads_more(make, words, ids):
    # The texts have 13 tokens, but the inputs of the second layer are equal for the three tokens w7.
    assert rank_after_a_step(make, words, ids, energy=1.0) == 11
    assert rank_after_a_step(make, words, ids, energy=1.0, limit=2) < 11
    assert rank_after_a_step(make, words, ids, energy=1.0, preserve=["w33 w34"]) == 13


@pytest.mark.parametrize("sequential", [True, False])
def test_sequential_preserves_the_inputs_of_previous_edits(make, words, sequential):
    model = make("llama")
    null_space = NullSpace(TEXTS, energy=0.999, sequential=sequential)
    ranks, leaks = [], []
    for edits in ([Edit("w40 w41", "w42")], [Edit("w50 w51", "w52")]):
        first_edit = inputs_of(model, words, NAME, ["w40 w41 w42 </s>"])
        before = model.get_parameter(NAME).detach().clone()
        ids = torch.tensor([words(f"{edits[0].prompt} {edits[0].target}")["input_ids"]])
        with editing(model, [null_space, ScopeOfEdits(edits)], tokenizer=words, log_every_n_steps=5) as edit:
            train(model, edit, ids, adamw(edit.parameters()), 5)
        ranks.append(edit.history[-1]["edit/drift/null_space_rank"])
        change = model.get_parameter(NAME).detach().double() - before.double()
        leaks.append(share_of(change, principal(first_edit, 0.999)))
    assert leaks[0] > 0.1
    assert (leaks[1] < 1e-5) == sequential
    assert ranks[1] > ranks[0] if sequential else ranks[1] <= ranks[0] + 1


def test_sequential_forgets_previous_edits_with_another_model(make, words):
    null_space = NullSpace(TEXTS, sequential=True)
    attach_and_finish = [null_space, ScopeOfEdits([Edit("w40 w41", "w42")])]
    for _ in range(2):
        model = make("llama")
        with editing(model, attach_and_finish, tokenizer=words) as edit:
            if null_space._previous.edits:
                with pytest.warns(UserWarning, match="sequential=True"):
                    edit.before_step()
            else:
                edit.before_step()
            assert null_space._previous.edits == []
        assert len(null_space._previous.edits) == 1


def test_sequential_needs_to_know_the_edits(make, words):
    with pytest.raises(EditError, match=r"NullSpace: sequential=True .* EditMetrics"):
        attach(make("llama"), words, NullSpace(TEXTS, sequential=True), ParameterScope(1, modules=SCOPE["llama"]))


def test_sequential_runs_read_the_texts_and_every_edit_once(make, words, monkeypatch):
    read: list[int] = []
    module = importlib.import_module("kedit_train.callbacks.null_space")
    compute = module.factors_of_texts

    def count(run: Any, layers: Any, sequences: Any, **options: Any) -> Any:
        read.append(len(sequences))
        return compute(run, layers, sequences, **options)

    monkeypatch.setattr(module, "factors_of_texts", count)
    model = make("llama")
    null_space = NullSpace(TEXTS, sequential=True, preserve=["w33 w34"])
    for i in range(4):
        attach(model, words, null_space, ScopeOfEdits([Edit(f"w4{i}", "w50"), Edit(f"w3{i}", "w51")]))
    # The first run reads the four texts, and then the text in preserve. Each later run reads the two edits of the run
    # before it.
    assert read == [4, 1, 2, 2, 2]


def test_sequential_preserves_the_inputs_of_all_previous_edits_by_their_joint_energy(make, words):
    """The directions in the third run are those of the texts and of a joint second moment of two edits."""
    model, energy = make("llama"), 0.7
    null_space = NullSpace(TEXTS, energy=energy, sequential=True)
    of_texts = principal(inputs_of(model, words, NAME), energy)
    inputs = []
    for edits in ([Edit("w40 w41", "w42")], [Edit("w50 w51", "w52")], [Edit("w30 w31", "w32")]):
        before = model.get_parameter(NAME).detach().clone()
        ids = torch.tensor([words(f"{edits[0].prompt} {edits[0].target}")["input_ids"]])
        with editing(model, [null_space, ScopeOfEdits(edits)], tokenizer=words, log_every_n_steps=5) as edit:
            train(model, edit, ids, adamw(edit.parameters()), 5)
        inputs.append(inputs_of(model, words, NAME, [f"{edits[0].prompt} {edits[0].target} </s>"]))
    of_edits = principal(torch.cat(inputs[:2], dim=1), energy)
    change = model.get_parameter(NAME).detach().double() - before.double()
    both = torch.linalg.matrix_rank(torch.cat([of_texts, of_edits], dim=1))
    assert edit.history[-1]["edit/drift/null_space_rank"] == both
    assert share_of(change, of_texts) < 1e-5
    assert share_of(change, of_edits) < 1e-5


def test_sequential_leaves_an_edit_free_that_is_edited_again(make, words):
    model = make("llama")
    null_space = NullSpace(TEXTS, energy=0.999, sequential=True)
    inputs, ranks = {}, []
    for prompt, target in (("w40 w41", "w42"), ("w50 w51", "w52"), ("w40 w41", "w43"), ("w30", "w31")):
        before = model.get_parameter(NAME).detach().clone()
        ids = torch.tensor([words(f"{prompt} {target}")["input_ids"]])
        scope = ScopeOfEdits([Edit(prompt, target)])
        with editing(model, [null_space, scope], tokenizer=words, log_every_n_steps=5) as edit:
            train(model, edit, ids, adamw(edit.parameters()), 5)
        change = model.get_parameter(NAME).detach().double() - before.double()
        inputs[prompt] = inputs_of(model, words, NAME, [f"{prompt} {target} </s>"])
        ranks.append(edit.history[-1]["edit/drift/null_space_rank"])
        if target == "w43":
            assert share_of(change, principal(inputs["w40 w41"], 0.999)) > 0.1
            assert share_of(change, principal(inputs["w50 w51"], 0.999)) < 1e-5
    # The third run preserves only the second edit. The fourth run also preserves the edit that replaced the first edit.
    assert [(edit.prompt, edit.target) for edit in null_space._previous.edits] == [
        ("w50 w51", "w52"),
        ("w40 w41", "w43"),
        ("w30", "w31"),
    ]
    assert ranks[2] < ranks[3]


def test_sequential_needs_the_same_scope_in_every_run(make, words):
    model, null_space = make("llama"), NullSpace(TEXTS, sequential=True)
    attach(model, words, null_space, ScopeOfEdits([Edit("w40 w41", "w42")]))
    other = ScopeOfEdits([Edit("w50 w51", "w52")])
    other.layers = 0
    with pytest.raises(EditError, match="NullSpace: sequential=True needs the same scope in every run"):
        attach(model, words, null_space, other)


def test_a_checkpoint_restores_the_directions_of_previous_edits(make, words, tmp_path):
    """A new process does not know the previous edits."""
    model = make("llama")
    null_space = NullSpace(TEXTS, sequential=True)
    attach(model, words, null_space, ScopeOfEdits([Edit("w40 w41", "w42")]))
    scope = ScopeOfEdits([Edit("w50 w51", "w52")])
    with editing(model, [null_space, scope], tokenizer=words) as edit:
        edit.before_step()
        save_state(tmp_path, null_space.state())
        weights, reference = {NAME: torch.randn(16, 32)}, dict(edit.run.reference)
        expected = null_space.constrain(weights, reference)[NAME]
    resumed = NullSpace(TEXTS, sequential=True)
    with editing(model, [resumed, scope], tokenizer=words) as edit:
        edit.before_step()
        assert not torch.equal(resumed.constrain(weights, reference)[NAME], expected)
        resumed.load_state(load_state(tmp_path) or {})
        assert torch.equal(resumed.constrain(weights, reference)[NAME], expected)
        assert [edit.prompt for edit in resumed._previous.edits] == ["w40 w41"]
        with pytest.raises(EditError, match="checkpoint was written with another scope"):
            resumed.load_state({"subspaces": {}, "previous_edits": []})


def test_a_resumed_run_keeps_all_previous_edits_for_the_run_after_it(make, words, tmp_path):
    model = make("llama")
    null_space = NullSpace(TEXTS, energy=0.999, sequential=True)
    attach(model, words, null_space, ScopeOfEdits([Edit("w40 w41", "w42")]))
    second = ScopeOfEdits([Edit("w50 w51", "w52")])
    with editing(model, [null_space, second], tokenizer=words) as edit:
        edit.before_step()
        save_state(tmp_path, null_space.state())
    resumed = NullSpace(TEXTS, energy=0.999, sequential=True)
    with editing(model, [resumed, second], tokenizer=words) as edit:
        edit.before_step()
        resumed.load_state(load_state(tmp_path) or {})
    assert [edit.prompt for edit in resumed._previous.edits] == ["w40 w41", "w50 w51"]
    third = ScopeOfEdits([Edit("w30 w31", "w32")])
    before = model.get_parameter(NAME).detach().clone()
    ids = torch.tensor([words("w30 w31 w32")["input_ids"]])
    with editing(model, [resumed, third], tokenizer=words) as edit:
        train(model, edit, ids, adamw(edit.parameters()), 5)
    change = model.get_parameter(NAME).detach().double() - before.double()
    earlier = inputs_of(model, words, NAME, ["w40 w41 w42 </s>", "w50 w51 w52 </s>"])
    assert share_of(change, principal(earlier, 0.999)) < 1e-5


def test_a_text_with_an_evaluation_prompt_of_a_later_edit_is_no_longer_preserved(make, words):
    """The directions of the second run are those of the other texts, as if the first run had not read the text."""
    model = make("llama")
    leak = "w40 w41 w42 w43"
    edits = [Edit("w50 w51", "w52", locality={"other": (Probe("w40 w41", ("w42",)),)})]
    null_space = NullSpace([*TEXTS, leak], energy=0.99, sequential=True)
    attach(model, words, null_space, ScopeOfEdits([Edit("w30 w31", "w32")]))
    before = model.get_parameter(NAME).detach().clone()
    ids = torch.tensor([words("w50 w51 w52")["input_ids"]])
    with (
        pytest.warns(UserWarning, match="1 of 5 texts contain an evaluation prompt of the edits"),
        editing(model, [null_space, ScopeOfEdits(edits)], tokenizer=words, log_every_n_steps=5) as edit,
    ):
        train(model, edit, ids, adamw(edit.parameters()), 5)
    change = model.get_parameter(NAME).detach().double() - before.double()
    assert share_of(change, principal(inputs_of(model, words, NAME), 0.99)) < 1e-4
    assert share_of(change, principal(inputs_of(model, words, NAME, [leak]), 0.99)) > 0.1


def test_an_edit_that_is_made_again_does_not_leave_old_inputs_in_the_other_layers(make, words):
    """With two layers, inputs of the upper layer change from run to run, so the kept edits are measured again."""
    model = make("llama")
    names = [NAME.replace("1", "0", 1), NAME]
    null_space = NullSpace(TEXTS, energy=0.9, sequential=True)

    def run(edits: list[Edit], steps: int) -> None:
        scope = ScopeOfEdits(edits)
        scope.layers = None
        batch = [torch.tensor([words(f"{edit.prompt} {edit.target}")["input_ids"]]) for edit in edits]
        with editing(model, [null_space, scope], tokenizer=words) as edit:
            for ids in batch:
                train(model, edit, ids, adamw(edit.parameters()), steps)

    run([Edit("w40 w41", "w42"), Edit("w50 w51", "w52")], 5)
    run([Edit("w30 w31", "w32")], 5)
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    kept = {name: inputs_of(model, words, name, ["w50 w51 w52 </s>", "w30 w31 w32 </s>"]) for name in names}
    run([Edit("w40 w41", "w43")], 5)
    for name in names:
        change = model.get_parameter(name).detach().double() - before[name].double()
        assert share_of(change, principal(kept[name], 0.9)) < 1e-5
