"""Which texts are nearest to an edit, against an order written out by hand."""

from __future__ import annotations

import random

from kedit_train import world
from kedit_train.data import Edit
from kedit_train.data.nearest import nearest_texts

EDIT = Edit("Ann Lee was born in", "Oslo", subject="Ann Lee", old_target="Rome.")
# From the nearest: old answer and all three words; old answer and one word; old answer alone; three words; one; none,
# the earlier first.
ORDER = [
    "Bo Roe was born in ROME",
    "The Pope lives in Rome",
    "Rome burns",
    "Cy Doe was Born in Bern",
    "Bern is in the hills",
    "Ann Lee sings",
    "Water is wet",
]


def test_the_old_answer_comes_first_then_words_of_the_prompt_but_not_of_its_subject():
    for seed in range(10):
        texts = random.Random(seed).sample(ORDER[:5], 5) + ORDER[5:]
        for n in range(1, 8):
            assert sorted(nearest_texts(texts, [EDIT], n)) == sorted(ORDER[:n])


def test_several_edits_give_the_union_in_the_order_given():
    other = Edit("Water is", "dry", subject="Water", old_target="wet")
    texts = ORDER[::-1]
    assert nearest_texts(texts, [EDIT, other], 1) == ["Water is wet", "Bo Roe was born in ROME"]
    assert nearest_texts(texts, [EDIT, other], 100) == texts
    assert nearest_texts([], [EDIT], 3) == []


def test_without_old_answer_and_subject_words_decide():
    assert nearest_texts(["a b", "c d", "a c"], [Edit("c d e", "f")], 2) == ["c d", "a c"]


def test_of_the_world_they_are_about_others_with_the_old_object():
    (edit,) = world.edits(1, seed=5)
    texts = world.locality_texts([edit], None)
    assert len(set(texts)) == len(texts) > 5_000
    old = (edit.old_target or "").rstrip(".")
    holding = [text for text in texts if old.casefold() in text.casefold()]
    near = nearest_texts(texts, [edit], 10)
    assert len(holding) >= 10
    assert set(near) <= set(holding)
    assert not [text for text in near if (edit.subject or "") in text]
