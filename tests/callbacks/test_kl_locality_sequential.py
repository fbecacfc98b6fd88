"""KLLocality over consecutive runs: the reference is the model before the first run, and previous edits are kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from callbacks.test_kl_locality import TEXTS, by_hand, divergence, shake

from kedit_train.callbacks import EditMetrics, KLLocality, ParameterScope, editing
from kedit_train.data import Edit, EditDataset
from kedit_train.errors import EditError
from kedit_train.modes import TrainLoop

FIRST, SECOND, THIRD = Edit("w40 w41", "w42"), Edit("w17", "w51 w52"), Edit("w40 w41", "w43")


def run(model: Any, words: Any, kl: KLLocality, edits: list[Edit]) -> float:
    """Return the penalty of one run after the parameters have changed."""
    with editing(model, [kl, ParameterScope(1)], tokenizer=words, edits=edits) as edit:
        for callback in edit.run.callbacks:
            edit.run.attach(callback)
        shake(model)
        penalty = kl.penalty(edit.run)
        assert penalty is not None
        return penalty.item()


def tokens(before: Any, now: Any, words: Any, texts: list[str]) -> torch.Tensor:
    """Return the divergence at every token of the texts."""
    found = []
    for text in texts:
        ids = torch.tensor([words(text)["input_ids"]])
        with torch.no_grad():
            found.append(divergence(before(input_ids=ids).logits[0], now(input_ids=ids).logits[0], "forward"))
    return torch.cat(found)


def test_the_reference_of_texts_is_the_first_model_and_that_of_edits_the_model_after_their_run(make, words):
    model = make().eval()
    at_first = copy.deepcopy(model)
    kl = KLLocality(TEXTS, weight=1.0, batch_size=5, sequential=True)
    # Each batch holds everything: 5 texts; then 5 texts and 1 edit; then 5 texts and 2 edits.
    got = run(model, words, kl, [FIRST])
    assert got == pytest.approx(by_hand(at_first, model, words, TEXTS).item(), rel=1e-4)
    after_first = copy.deepcopy(model)
    kl.batch_size = 6
    got = run(model, words, kl, [SECOND])
    texts, edit = tokens(at_first, model, words, TEXTS), tokens(after_first, model, words, ["w40 w41 w42 </s>"])
    assert got == pytest.approx(torch.cat([texts, edit]).mean().item(), rel=1e-4)
    after_second = copy.deepcopy(model)
    kl.batch_size = 7
    got = run(model, words, kl, [Edit("w14", "w16")])
    texts, first = tokens(at_first, model, words, TEXTS), tokens(after_first, model, words, ["w40 w41 w42 </s>"])
    second = tokens(after_second, model, words, ["w17 w51 w52 </s>"])
    assert got == pytest.approx(torch.cat([texts, first, second]).mean().item(), rel=1e-4)


def test_without_sequential_each_run_has_its_own_reference(make, words):
    model, kl = make().eval(), KLLocality(TEXTS, weight=1.0, batch_size=5)
    run(model, words, kl, [FIRST])
    before = copy.deepcopy(model)
    got = run(model, words, kl, [SECOND])
    assert got == pytest.approx(by_hand(before, model, words, TEXTS).item(), rel=1e-4)


def test_previous_edits_take_half_of_a_batch_at_most(make, words):
    model, kl = make(), KLLocality(TEXTS, batch_size=4, sequential=True)
    for number in range(5):
        run(model, words, kl, [Edit(f"w{31 + number}", "w16")])
    drawn = []
    kl._batches.replay_buffer.draw = lambda n, shuffler: (drawn.append(n), [])[1]  # type: ignore[method-assign]
    run(model, words, kl, [FIRST])
    assert (drawn, len(kl._batches.replay_buffer.entries)) == ([2], 5)


def test_an_edit_replaces_a_previous_one_with_the_same_prompt(make, words):
    model, kl = make(), KLLocality(TEXTS, sequential=True)
    for edits in ([FIRST], [SECOND], [THIRD], [Edit("w14", "w16")]):
        run(model, words, kl, edits)
    assert [entry.edit for entry in kl._batches.replay_buffer.entries] == [SECOND, THIRD]


@pytest.mark.filterwarnings("ignore:KLLocality. 1 of 5 texts")
def test_texts_with_a_scored_prompt_are_left_out_from_that_run_on(make, words):
    model, kl = make(), KLLocality(TEXTS, sequential=True)
    run(model, words, kl, [FIRST])
    assert set(kl._batches.texts.draw(50)) == {0, 1, 2, 3, 4}
    run(model, words, kl, [Edit("w20 w21", "w5")])
    assert set(kl._batches.texts.draw(50)) == {0, 1, 3, 4}
    run(model, words, kl, [Edit("x", "y", rephrases=("w7 w7",))])
    assert set(kl._batches.texts.draw(50)) == {0, 1, 4}


def test_another_model_starts_over(make, words):
    kl = KLLocality(TEXTS, weight=1.0, batch_size=5, sequential=True)
    run(make(), words, kl, [FIRST])
    model = make().eval()
    before = copy.deepcopy(model)
    with pytest.warns(
        UserWarning, match="KLLocality: sequential=True needs .* but this run trains another model object"
    ):
        got = run(model, words, kl, [SECOND])
    assert got == pytest.approx(by_hand(before, model, words, TEXTS).item(), rel=1e-4)
    assert kl._batches.replay_buffer.entries == []


def test_train_loop_names_the_edits_of_each_run(make, words):
    model, kl = make(), KLLocality(TEXTS, sequential=True)
    train = TrainLoop(words, callbacks=[kl, ParameterScope(1)], epochs=1)
    for edit in (FIRST, SECOND, Edit("w14", "w16")):
        train(model, [edit])
    assert [entry.edit.prompt for entry in kl._batches.replay_buffer.entries] == ["w40 w41", "w17"]


def test_arguments_that_exclude_sequential_are_errors(make, words):
    with pytest.raises(EditError, match=r"KLLocality: sequential=True cannot be combined .*; remove teacher="):
        KLLocality(TEXTS, teacher="some", sequential=True)
    with (
        pytest.raises(
            EditError, match=r"KLLocality: sequential=True preserves the edits .*; pass them .* EditMetrics\(edits\)"
        ),
        editing(make(), [KLLocality(TEXTS, sequential=True)], tokenizer=words) as edit,
    ):
        edit.before_step()
    with (
        pytest.raises(EditError, match=r"leave the head .* out of the scope"),
        editing(
            make(), [KLLocality(TEXTS, sequential=True), ParameterScope(modules="*")], tokenizer=words, edits=[FIRST]
        ) as edit,
    ):
        edit.before_step()


def test_a_changed_output_head_is_an_error(make, words):
    """Stored hidden states have a meaning only together with the head that they were computed for."""
    for scope in (ParameterScope(modules="*"), ParameterScope(modules="lm_head")):
        model, kl = make(), KLLocality(TEXTS, sequential=True)
        run(model, words, kl, [FIRST])
        with (
            pytest.raises(EditError, match=r"leave the head .* out of the scope"),
            editing(model, [kl, scope], tokenizer=words, edits=[SECOND]) as edit,
        ):
            edit.before_step()
    model, kl = make(), KLLocality(TEXTS, sequential=True)
    run(model, words, kl, [FIRST])
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.1)
    with (
        pytest.raises(EditError, match="the output head has changed since the first run"),
        editing(model, [kl, ParameterScope(1)], tokenizer=words, edits=[SECOND]) as edit,
    ):
        edit.before_step()
    with pytest.raises(EditError, match="sequential=True cannot be combined with batch_size=1"):
        KLLocality(TEXTS, batch_size=1, sequential=True)


@pytest.mark.parametrize("before", [False, True], ids=["nothing before", "another run before"])
@pytest.mark.parametrize("later", [SECOND, THIRD], ids=["another", "superseding"])
def test_a_checkpoint_of_a_later_run_is_an_error_in_a_new_process(make, words, later, before):
    """It is also an error if the later edit has the prompt of the first edit, so that there is no previous edit."""
    model, kl = make(), KLLocality(TEXTS, sequential=True)
    run(model, words, kl, [FIRST])
    with editing(model, [kl, ParameterScope(1)], tokenizer=words, edits=[later]) as edit:
        edit.run.attach(kl)
        saved = kl.state()
    fresh = KLLocality(TEXTS, sequential=True)
    if before:
        run(model, words, fresh, [Edit("w14", "w16")])
    with editing(model, [fresh, ParameterScope(1)], tokenizer=words, edits=[later]) as edit:
        edit.run.attach(fresh)
        with pytest.raises(EditError, match=r"does not contain these states; start this run again .* before the first"):
            fresh.load_state(saved)


def test_a_later_run_that_is_resumed_continues_its_draws(make, words):
    def penalties(kl: KLLocality, model: Any, saved: dict[str, Any] | None, n: int) -> tuple[list[float], Any]:
        with editing(model, [kl, ParameterScope(1)], tokenizer=words, edits=[THIRD]) as edit:
            for callback in edit.run.callbacks:
                edit.run.attach(callback)
            if saved is not None:
                kl.load_state(saved)
            torch.manual_seed(1)
            shake(model)
            found = [kl.penalty(edit.run).item() for _ in range(n)]
            state = kl.state()
            edit.run.close()  # as in a run that was interrupted
        return found, state

    runs = []
    for cut in (False, True):
        torch.manual_seed(0)
        model, kl = make().eval(), KLLocality(TEXTS, batch_size=4, sequential=True)
        for edits in ([FIRST], [SECOND], [Edit("w14", "w16")]):
            run(model, words, kl, edits)
        start = copy.deepcopy(model.state_dict())
        if not cut:
            runs.append(penalties(kl, model, None, 7)[0])
            continue
        found, saved = penalties(kl, model, None, 3)
        model.load_state_dict(start)
        runs.append(found + penalties(kl, model, saved, 4)[0])
    assert len(set(runs[0])) > 4
    assert runs[0] == runs[1]


def test_a_failed_run_loses_no_previous_edit(make, words):
    model, kl = make(), KLLocality(TEXTS, batch_size=6, sequential=True)
    run(model, words, kl, [FIRST])
    run(model, words, kl, [SECOND])
    with editing(model, [kl, ParameterScope(1)], tokenizer=words, edits=[THIRD]) as edit:
        edit.before_step()
        assert [entry.edit.prompt for entry in kl._batches.replay_buffer.active] == [SECOND.prompt]
        edit.run.close()  # as after an exception
    run(model, words, kl, [Edit("w14", "w16")])
    assert [entry.edit for entry in kl._batches.replay_buffer.active] == [FIRST, SECOND]


# The model has random weights, so it does not end its answers.
@pytest.mark.filterwarnings("ignore:EditMetrics. the training examples end with end-of-text")
def test_a_resumed_run_has_the_same_reference_for_previous_edits(make, words, tmp_path):
    """A trainer that resumes loads the weights of the checkpoint before the callbacks attach."""
    from conformance.hosts import HOSTS

    edits, states = [EditDataset([FIRST]), EditDataset([SECOND])], []
    saving = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    for resume in (False, f"{tmp_path}/checkpoint-2"):
        torch.manual_seed(0)
        model, kl = make().eval(), KLLocality(TEXTS, batch_size=4, sequential=True)
        run(model, words, kl, [FIRST])
        callbacks = [kl, ParameterScope(1), EditMetrics(edits[1], every_n_steps=0, show=False)]
        HOSTS["Trainer"](model, words, edits[1], callbacks, 4, **saving, resume=resume)
        states.append(kl._batches.replay_buffer.entries[0].hidden_states)
    assert torch.equal(*states)


def test_texts_of_the_world_that_later_edits_affect_are_left_out(monkeypatch: pytest.MonkeyPatch):
    from kedit_train import world

    # Fewer texts than usual, because their reference hidden states take seconds.
    monkeypatch.setattr(world.locality_texts, "__defaults__", (1024, 0))
    edits = world.edits(12, seed=1)
    model, tokenizer = world.load()
    kl = KLLocality("world", batch_size=4, sequential=True)
    held = []
    for edit in edits[:3]:
        run(model, tokenizer, kl, [edit])
        held.append({tokenizer.decode(kl._batches.texts.sequences[i]) for i in kl._batches.texts.allowed})
    allowed = set(world.unaffected(world.locality_texts(exclude=edits[:1]), edits[:3]))
    assert len(held[0]) > 1000
    assert held[0] > held[1] > held[2]
    assert len(held[2]) > 900
    assert {text.removeprefix("<s>").strip() for text in held[2]} <= {text.strip() for text in allowed}
