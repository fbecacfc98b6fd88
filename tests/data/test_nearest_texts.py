"""nearest_texts equals an order that is written by hand."""

from __future__ import annotations

import random

from kedit_train import world
from kedit_train.data import Edit
from kedit_train.data.nearest_texts import nearest_texts

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


def test_several_edits_return_the_union_in_the_given_order():
    other = Edit("Ice is", "dry", subject="Ice", old_target="wet")
    texts = ORDER[::-1]
    assert nearest_texts(texts, [EDIT, other], 1) == ["Water is wet", "Bo Roe was born in ROME"]
    assert nearest_texts(texts, [EDIT, other], 100) == texts
    assert nearest_texts([], [EDIT], 3) == []


def test_without_old_answer_and_subject_words_decide():
    texts = ["a tall nice dog", "The capital of Spain is Madrid", "x y z a f p c t i s", "Spain is far"]
    for subject in (None, "", "France"):
        edit = Edit("The capital of France is", "Rome", subject=subject)
        assert nearest_texts(texts, [edit], 1) == texts[1:2]
        assert nearest_texts(texts, [edit], 2) == [texts[1], texts[3]]


def test_a_text_that_an_edit_changes_is_never_returned():
    texts = ["France's  capital city is PARIS", "Bob was born in Rome", "Lyon is in France", "Paris has a river"]
    edit = Edit("The capital of France is", "Rome", subject="France", old_target="Paris.")
    other = Edit("Where is Paris? In", "Rome", subject="Paris", old_target="France")
    for edits in ([edit], [edit, other], [other]):
        assert nearest_texts(texts, edits, 10) == texts[1:]


def test_old_answers_are_whole_words_and_copies_count_once():
    texts = ["The price is right", "Born at sea", "Born at sea", "There is ice", "Born on land"]
    assert nearest_texts(texts, [Edit("Water, born as", "fire", old_target="ice")], 1) == ["There is ice"]
    assert nearest_texts(texts, [Edit("born at", "x")], 2) == ["Born at sea", "Born on land"]


def test_scripts_without_spaces_are_compared_by_pairs_of_characters():
    texts = ["猫は動物です", "東京の首都は日本", "ロンドンの市長はサディク", "ベルリンの市長はカイ"]
    assert nearest_texts(texts, [Edit("パリの市長は", "ボブ", subject="パリ")], 2) == texts[2:]
    assert nearest_texts(texts, [Edit("パリは", "ボブ", old_target="日本")], 1) == texts[1:2]


def test_the_nearest_texts_of_the_world_contain_the_old_answer():
    (edit,) = world.edits(1, seed=5)
    texts = world.locality_texts([edit], None)
    assert len(set(texts)) == len(texts) > 5_000
    old = (edit.old_target or "").rstrip(".")
    holding = [text for text in texts if old.casefold() in text.casefold()]
    near = nearest_texts(texts, [edit], 10)
    assert len(holding) >= 10
    assert set(near) <= set(holding)
    assert not [text for text in near if (edit.subject or "") in text]
