"""Edits of the world have different subjects, valid probes, and texts that avoid both."""

from __future__ import annotations

import dataclasses

import pytest

from kedit_train import world
from kedit_train.data.leaks import LeakCheck
from kedit_train.edit import Edit
from kedit_train.errors import EditError
from kedit_train.world.counterfactual import _prompts
from kedit_train.world.counterfactual import world as known_world
from kedit_train.world.templates import BY_NAME


def locality(edit):
    return [probe for probes in edit.locality.values() for probe in probes]


@pytest.fixture(scope="module", params=[(32, 0), (100, 3), (150, 1)], ids=str)
def made(request) -> list[Edit]:
    return world.edits(*request.param)


def test_each_edit_gives_a_known_fact_a_new_object_of_the_same_type(made):
    known = known_world()
    assert len({edit.subject for edit in made}) == len({edit.id for edit in made}) == len(made)
    for edit in made:
        fact = known.facts[_prompts()[edit.prompt]]
        assert (edit.subject, edit.old_target) == (fact.subject, fact.object)
        assert edit.target != edit.old_target
        assert edit.target in known.pools[BY_NAME[fact.relation].object]


def test_rephrases_are_other_trained_wordings_of_the_same_fact(made):
    for edit in made:
        key = _prompts()[edit.prompt]
        trained = {w.format(s=edit.subject) for w in BY_NAME[key[1]].trained}
        assert edit.prompt in trained
        assert edit.prompt not in edit.rephrases
        assert len(set(edit.rephrases)) == 5
        assert set(edit.rephrases) <= trained
        assert any(text.endswith("Answer:") for text in edit.rephrases)
        assert all(
            _prompts()[p.prompt] == key and p.prompt not in trained for p in edit.portability["held_out_wording"]
        )


def test_locality_probes_ask_for_true_facts_that_no_edit_changes(made):
    known = known_world()
    edited = {_prompts()[edit.prompt] for edit in made}
    subjects = {edit.subject for edit in made}
    for edit in made:
        assert edit.locality["same_subject"]
        for kind, probes in edit.locality.items():
            for probe in probes:
                key = _prompts()[probe.prompt]
                assert key not in edited
                assert known.facts[key].object == probe.answers[0]
                assert key[0] == edit.subject if kind == "same_subject" else key[0] not in subjects
        for probe in edit.locality["neighbour"]:
            assert probe.answers == (edit.old_target,)


def test_portability_answers_follow_from_the_edits_and_differ_from_before(made):
    known = known_world()
    after = {_prompts()[edit.prompt]: edit.target for edit in made}

    def ask(key):
        return after.get(key, known.facts[key].object)

    asked = 0
    for edit in made:
        for kind in ("two_hop", "two_hop_last"):
            for probe in edit.portability.get(kind, ()):
                key = _prompts()[probe.prompt]
                first, (_, second) = known.hops[key]
                assert probe.answers[0] == ask((ask(first), second))
                assert probe.answers[0] != known.two_hop[key].object
                asked += 1
    assert asked >= len(made) // 4


def test_relations_are_mixed():
    relations = {edit.id.split("-")[-1] for edit in world.edits(32)}
    assert len(relations) == 9


def test_the_same_seed_gives_the_same_edits():
    assert world.edits(40, 5) == world.edits(40, 5) != world.edits(40, 6)


def test_more_edits_than_subjects_are_an_error():
    with pytest.raises(EditError, match="lower n"):
        world.edits(400)


def test_locality_texts_state_no_fact_that_is_edited_or_asked_for(made):
    known, prompts = known_world(), _prompts()
    texts = world.locality_texts(made, 128)
    # Statements that contain a prompt of the 150 edits are left out.
    assert 124 < len(set(texts)) == len(texts) <= 128
    assert texts == world.locality_texts(made, 128) != world.locality_texts(made, 128, seed=1)
    edited = {prompts[edit.prompt] for edit in made}
    asked = edited | {prompts[p.prompt] for edit in made for p in locality(edit)}
    asked |= {prompts[p.prompt] for edit in made for probes in edit.portability.values() for p in probes}
    stated = {}
    for prompt, key in prompts.items():
        true = (known.facts.get(key) or known.two_hop[key]).object
        stated[f"{prompt} {true}"] = key
    keys = [stated[text] for text in texts if text in stated]
    assert len(texts) - len(keys) == 32  # one in four is prose
    assert all(text.endswith(".") for text in texts if text not in stated)
    assert not asked.intersection(keys)
    for key in keys:
        assert not edited.intersection(known.hops.get(key, ()))


@pytest.mark.parametrize(("seed", "number"), [(0, 100), (1, 24)])
def test_locality_texts_contain_no_evaluation_prompt_inside_a_longer_sentence(seed, number):
    made = world.edits(number)
    texts, check = world.locality_texts(made, seed=seed), LeakCheck(made)
    assert not [text for text in texts if check.contains_prompt(text)]
    assert 4080 < len(texts) < 4096


def test_texts_for_other_edits_are_an_error():
    edit = dataclasses.replace(world.edits(1)[0], prompt="The mother tongue of Danielle Darrieux is", id="case 3")
    with pytest.raises(EditError, match="edit 'case 3' is not about a fact of the bundled model"):
        world.locality_texts([edit])
    with pytest.raises(EditError, match="lower n"):
        world.locality_texts(world.edits(32), 100_000)


def test_unaffected_texts_contain_no_prompt_of_further_edits() -> None:
    """Almost no other text is left out."""
    first, later = world.edits(40, seed=3)[:1], world.edits(40, seed=3)[1:4]
    texts = world.locality_texts(exclude=first)
    kept = world.unaffected(texts, later)
    asked = [p for e in later for p in (e.prompt, *e.rephrases)]
    asked += [p.prompt for e in later for kind in (*e.locality.values(), *e.portability.values()) for p in kind]
    assert not any(prompt in text for text in kept for prompt in asked)
    gone = set(texts) - set(kept)
    assert 0 < len(gone) < 100
    assert {text for text in texts if any(prompt in text for prompt in asked)} <= gone


def test_an_edit_without_a_subject_is_identified_by_its_prompt(made):
    bare = [dataclasses.replace(edit, subject=None) for edit in made]
    assert world.locality_texts(bare, 128) == world.locality_texts(made, 128)
