"""The generated world is always the same, and its names and prompts are unambiguous."""

from __future__ import annotations

import hashlib
import itertools
import json

import pytest

from kedit_train import world
from kedit_train.errors import EditError
from kedit_train.world import facts, grammar
from kedit_train.world.templates import BY_NAME, RELATIONS, TWO_HOP


@pytest.fixture(scope="module")
def known() -> facts.World:
    return facts.build()


def test_the_world_is_the_one_that_the_checkpoint_was_trained_on(known):
    documents = json.dumps(facts.training_documents(known)).encode()
    assert hashlib.sha256(documents).hexdigest()[:16] == "13eb9d9ee5e8f7ca"
    assert facts.build() == known
    assert facts.build(seed=1).pools["person"] != known.pools["person"]


def test_the_world_has_enough_names_and_wordings(known):
    assert sum(len(known.pools[kind]) for kind in ("person", "company", "city", "country")) >= 250
    assert len(RELATIONS) >= 5
    assert all(len(r.statements) >= 5 and len(r.questions) >= 4 and len(r.held_out) >= 2 for r in RELATIONS)
    words = {len(fact.object.split()) for fact in known.facts.values()}
    assert {1, 2} <= words


def test_no_name_is_the_start_of_another(known):
    names = [name for pool in known.pools.values() for name in pool]
    assert len(set(names)) == len(names)
    # Sorting puts a name directly before the first name that it is the start of.
    assert not [(a, b) for a, b in itertools.pairwise(sorted(names)) if b.startswith(a)]
    parts = [part for person in known.pools["person"] for part in person.split()]
    assert not [(a, b) for a, b in itertools.pairwise(sorted(parts)) if b.startswith(a)]


def test_no_prompt_is_the_start_of_another_so_each_has_one_answer():
    for kind in ("person", "company", "city"):
        prompts = [w.format(s="X") for r in RELATIONS + TWO_HOP if r.subject == kind for w in (*r.trained, *r.held_out)]
        assert len(set(prompts)) == len(prompts)
        assert not [(a, b) for a in prompts for b in prompts if b.startswith(a + " ")]


def test_held_out_wordings_and_people_are_in_no_training_document(known):
    documents = [text for texts in facts.training_documents(known) for text in texts]
    together = "\n".join(documents)
    for relation in RELATIONS + TWO_HOP:
        for wording in relation.held_out:
            before, after = wording.split("{s}")
            assert not [text for text in documents if text.startswith(before) and f"{after} " in text and before]
            assert all(wording.format(s=s) not in together for s in known.pools[relation.subject])
    for fact in known.untrained_two_hop:
        assert all(w.format(s=fact.subject) not in together for w in BY_NAME[fact.relation].trained)
    assert len(known.held_out) == len(known.pools["person"]) // facts.HELD_OUT_ONE_IN > 0


def test_a_two_hop_fact_is_the_composition_of_its_facts(known):
    for key, (first, second) in known.hops.items():
        assert known.facts[first].object == second[0]
        assert known.two_hop[key].object == known.facts[second].object


def test_every_document_ends_with_its_answer_and_no_full_stop(known):
    for fact, texts in zip(facts.training_facts(known), facts.training_documents(known), strict=True):
        assert all(text.endswith(f" {fact.object}") and not text.endswith(".") for text in texts)


def test_parts_of_the_prose_do_not_overlap_and_contain_no_name(known):
    trained, held_out = grammar.paragraphs(3000, held_out=False), world.prose(500)
    assert len(set(trained)) == 3000
    assert not set(trained) & set(held_out)
    assert world.prose(500) == held_out != world.prose(500, seed=1)
    text = " ".join(trained + held_out)
    assert not [name for kind in ("person", "company", "city", "country") for name in known.pools[kind] if name in text]


def test_a_world_that_is_too_large_for_its_names_is_an_error():
    with pytest.raises(EditError, match=r"only \d+ of 3 different names could be invented"):
        facts._Inventor(facts.Random(0)).names(3, lambda: "Same")
