"""KLLocality over runs that follow one another: held to the model before the first, and to the edits since."""

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
    """One run of a sequence: its penalty once something has moved."""
    with editing(model, [kl, ParameterScope(1)], tokenizer=words, edits=edits) as edit:
        for callback in edit.run.callbacks:
            edit.run.attach(callback)
        shake(model)
        penalty = kl.penalty(edit.run)
        assert penalty is not None
        return penalty.item()


def tokens(before: Any, now: Any, words: Any, texts: list[str]) -> torch.Tensor:
    """Divergence at every token of the texts."""
    found = []
    for text in texts:
        ids = torch.tensor([words(text)["input_ids"]])
        with torch.no_grad():
            found.append(divergence(before(input_ids=ids).logits[0], now(input_ids=ids).logits[0], "forward"))
    return torch.cat(found)


def test_texts_are_held_to_the_model_before_the_first_run_and_edits_to_the_model_after_theirs(make, words):
    model = make().eval()
    at_first = copy.deepcopy(model)
    kl = KLLocality(TEXTS, weight=1.0, batch_size=5, sequential=True)
    # Each run draws whole rounds: 5 texts; then 5 texts and 1 edit; then 5 texts and 2 edits.
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


def test_without_it_every_run_is_held_to_the_model_that_it_found(make, words):
    model, kl = make().eval(), KLLocality(TEXTS, weight=1.0, batch_size=5)
    run(model, words, kl, [FIRST])
    before = copy.deepcopy(model)
    got = run(model, words, kl, [SECOND])
    assert got == pytest.approx(by_hand(before, model, words, TEXTS).item(), rel=1e-4)


def test_edits_take_half_of_a_batch_at_most(make, words):
    model, kl = make(), KLLocality(TEXTS, batch_size=4, sequential=True)
    for number in range(5):
        run(model, words, kl, [Edit(f"w{31 + number}", "w16")])
    drawn = []
    kl._batches.replay_buffer.draw = lambda n, shuffler: (drawn.append(n), [])[1]  # type: ignore[method-assign]
    run(model, words, kl, [FIRST])
    assert (drawn, len(kl._batches.replay_buffer.entries)) == ([2], 5)


def test_an_edit_supersedes_an_earlier_one_of_the_same_prompt(make, words):
    model, kl = make(), KLLocality(TEXTS, sequential=True)
    for edits in ([FIRST], [SECOND], [THIRD], [Edit("w14", "w16")]):
        run(model, words, kl, edits)
    assert [entry.edit for entry in kl._batches.replay_buffer.entries] == [SECOND, THIRD]


@pytest.mark.filterwarnings("ignore:KLLocality. 1 of 5 texts")
def test_texts_that_hold_what_a_run_is_scored_on_are_left_out_from_then_on(make, words):
    model, kl = make(), KLLocality(TEXTS, sequential=True)
    run(model, words, kl, [FIRST])
    assert set(kl._batches.texts.draw(50)) == {0, 1, 2, 3, 4}
    run(model, words, kl, [Edit("w20 w21", "w5")])
    assert set(kl._batches.texts.draw(50)) == {0, 1, 3, 4}
    run(model, words, kl, [Edit("x", "y", rephrases=("w7 w7",))])
    assert set(kl._batches.texts.draw(50)) == {0, 1, 4}


def test_another_model_begins_another_sequence(make, words):
    kl = KLLocality(TEXTS, weight=1.0, batch_size=5, sequential=True)
    run(make(), words, kl, [FIRST])
    model = make().eval()
    before = copy.deepcopy(model)
    with pytest.warns(
        UserWarning, match="KLLocality: sequential=True, but this run trains another model object than the run before"
    ):
        got = run(model, words, kl, [SECOND])
    assert got == pytest.approx(by_hand(before, model, words, TEXTS).item(), rel=1e-4)
    assert kl._batches.replay_buffer.entries == []


def test_train_loop_says_what_each_of_its_rounds_edits(make, words):
    model, kl = make(), KLLocality(TEXTS, sequential=True)
    train = TrainLoop(words, callbacks=[kl, ParameterScope(1)], epochs=1)
    for edit in (FIRST, SECOND, Edit("w14", "w16")):
        train(model, [edit])
    assert [entry.edit.prompt for entry in kl._batches.replay_buffer.entries] == ["w40 w41", "w17"]


def test_what_cannot_be_kept_is_refused(make, words):
    with pytest.raises(EditError, match=r"KLLocality: sequential=True keeps .*, so teacher must be None"):
        KLLocality(TEXTS, teacher="some", sequential=True)
    with (
        pytest.raises(
            EditError, match=r"KLLocality: sequential=True keeps this run's edits .*; add EditMetrics\(edits\)"
        ),
        editing(make(), [KLLocality(TEXTS, sequential=True)], tokenizer=words) as edit,
    ):
        edit.before_step()
    with (
        pytest.raises(EditError, match=r"leave the head .* out of the scope"),
        editing(
            make(), [KLLocality(TEXTS, sequential=True), ParameterScope(None)], tokenizer=words, edits=[FIRST]
        ) as edit,
    ):
        edit.before_step()


def test_a_head_that_is_not_that_of_the_first_run_is_refused(make, words):
    """The hidden states that are kept mean what they mean through one head only."""
    for scope in (ParameterScope(None), ParameterScope(modules="lm_head")):
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
    with pytest.raises(EditError, match="batch_size must be >= 2, got 1"):
        KLLocality(TEXTS, batch_size=1, sequential=True)


@pytest.mark.parametrize("before", [False, True], ids=["nothing before", "another run before"])
@pytest.mark.parametrize("later", [SECOND, THIRD], ids=["another", "superseding"])
def test_a_checkpoint_of_a_later_run_is_refused_in_a_new_process(make, words, later, before):
    """Also where no earlier edit is held, because the later one is of the same prompt."""
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
        with pytest.raises(
            EditError, match=r"a later run with sequential=True.* start that run again, with the model before the first"
        ):
            fresh.load_state(saved)


def test_a_later_run_resumed_in_the_same_process_draws_what_it_would_have_drawn(make, words):
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
            edit.run.close()  # as a run that was cut off
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


def test_a_run_that_failed_has_forgotten_nothing(make, words):
    model, kl = make(), KLLocality(TEXTS, batch_size=6, sequential=True)
    run(model, words, kl, [FIRST])
    run(model, words, kl, [SECOND])
    with editing(model, [kl, ParameterScope(1)], tokenizer=words, edits=[THIRD]) as edit:
        edit.before_step()
        assert [entry.edit.prompt for entry in kl._batches.replay_buffer.active] == [SECOND.prompt]
        edit.run.close()  # as an exception does
    run(model, words, kl, [Edit("w14", "w16")])
    assert [entry.edit for entry in kl._batches.replay_buffer.active] == [FIRST, SECOND]


def test_edits_are_held_to_the_model_before_a_run_also_where_that_run_is_resumed(make, words, tmp_path):
    """A trainer that resumes puts a checkpoint's weights in place before the callbacks begin."""
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


def test_the_worlds_texts_stay_but_for_those_about_later_edits():
    from kedit_train import world

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
