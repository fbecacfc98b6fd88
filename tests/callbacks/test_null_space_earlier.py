"""NullSpace over several edits: what is preserved, by how many directions, and what a checkpoint takes along."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from callbacks.inputs import SCOPE, TEXTS, WEIGHT, adamw, keys, preserved, train

from kedit_train.callbacks import NullSpace, ParameterScope, editing
from kedit_train.core.state_file import load_state, save_state
from kedit_train.data import Edit
from kedit_train.errors import EditError


def test_rank_samples_and_earlier_edits(make, words, ids):
    name = WEIGHT["llama"]
    model = make("llama")
    earlier = [Edit("w40 w41", "w42"), Edit("w50", "w51 w52")]
    k = keys(model, words, name.removesuffix(".weight"), ["w40 w41 w42 </s>", "w50 w51 w52 </s>"])
    before = model.get_parameter(name).detach().clone()
    callbacks = [NullSpace(TEXTS, rank=3, preserve=earlier), ParameterScope(1, SCOPE["llama"])]
    with editing(model, callbacks, tokenizer=words, log_every_n_steps=50) as edit:
        train(model, edit, ids, adamw(edit.parameters()))
    # Three directions of the texts and three of the edits.
    assert edit.history[-1]["edit/drift/null_space_rank"] == 6
    u = torch.linalg.svd(k, full_matrices=False)[0][:, :3]
    delta = model.get_parameter(name).detach().double() - before.double()
    assert float((delta @ u).norm() / delta.norm()) < 1e-5

    def directions(**options: Any) -> float:
        fresh = make("llama")
        callbacks = [NullSpace(TEXTS, keep_energy=1.0, **options), ParameterScope(1, SCOPE["llama"])]
        with editing(fresh, callbacks, tokenizer=words, log_every_n_steps=1) as edit:
            train(fresh, edit, ids, adamw(edit.parameters()), 1)
        return edit.history[-1]["edit/drift/null_space_rank"]

    # 13 tokens, of which w7 three times over is read alike in the second layer.
    assert directions() == 11
    assert directions(samples=2, seed=0) < 11
    assert directions(preserve=["w33 w34"]) == 13


class Knows(ParameterScope):
    """Says what the run edits, as EditMetrics and data modules do."""

    def __init__(self, edits: list[Edit]) -> None:
        super().__init__(1, SCOPE["llama"])
        self.edits = edits

    def prepare(self, run: Any) -> None:
        super().prepare(run)
        run.edits = self.edits


def test_sequential_edits_leave_the_inputs_of_earlier_ones_alone(make, words):
    first, second = [Edit("w40 w41", "w42")], [Edit("w50 w51", "w52")]
    name = WEIGHT["llama"]
    for sequential in (True, False):
        torch.manual_seed(0)
        model = make("llama")
        space = NullSpace(TEXTS, keep_energy=0.999, sequential=sequential)
        ranks, leaks = [], []
        for edits in (first, second):
            k = keys(model, words, name.removesuffix(".weight"), ["w40 w41 w42 </s>"])
            before = model.get_parameter(name).detach().clone()
            ids = torch.tensor([words(f"{edits[0].prompt} {edits[0].target}")["input_ids"]])
            with editing(model, [space, Knows(edits)], tokenizer=words, log_every_n_steps=5) as edit:
                train(model, edit, ids, adamw(edit.parameters()), 5)
            ranks.append(edit.history[-1]["edit/drift/null_space_rank"])
            delta = model.get_parameter(name).detach().double() - before.double()
            leaks.append(float((delta @ preserved(k, 0.999)).norm() / delta.norm()))
        assert leaks[0] > 0.1
        assert (leaks[1] < 1e-5) == sequential
        assert ranks[1] > ranks[0] if sequential else ranks[1] <= ranks[0] + 1
    other = make("llama")
    with editing(other, [space, Knows(first)], tokenizer=words):
        assert space._earlier == []
    with (
        pytest.raises(EditError, match=r"sequential=True .* nothing says what they are; add EditMetrics"),
        editing(other, [NullSpace(TEXTS, sequential=True), ParameterScope(1, SCOPE["llama"])], tokenizer=words) as edit,
    ):
        edit.before_step()


def test_a_checkpoint_takes_the_directions_along(make, words, tmp_path):
    """Also those of earlier runs' edits, which a new process does not know."""
    model, name = make("llama"), WEIGHT["llama"]
    space, scope = NullSpace(TEXTS, sequential=True), [Knows([Edit("w40 w41", "w42")])]
    with editing(model, [space, *scope], tokenizer=words) as edit:
        edit.before_step()
    scope = [Knows([Edit("w50 w51", "w52")])]
    with editing(model, [space, *scope], tokenizer=words) as edit:
        edit.before_step()
        save_state(tmp_path, space.state())
        weights, reference = {name: torch.randn(16, 32)}, dict(edit.run.reference)
        wanted = space.constrain(weights, reference)[name]
    resumed = NullSpace(TEXTS, sequential=True)
    with editing(model, [resumed, *scope], tokenizer=words) as edit:
        edit.before_step()
        assert not torch.equal(resumed.constrain(weights, reference)[name], wanted)
        resumed.load_state(load_state(tmp_path) or {})
        assert torch.equal(resumed.constrain(weights, reference)[name], wanted)
        assert [edit.prompt for edit in resumed._earlier] == ["w40 w41"]
        with pytest.raises(EditError, match="checkpoint is of another scope"):
            resumed.load_state({"spaces": {}, "earlier": []})
