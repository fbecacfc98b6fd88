"""Prompts with other words in place of the subject."""

from __future__ import annotations

from kedit_train.data import Edit
from kedit_train.data.conversations import RenderedConversation
from kedit_train.data.neighbor_prompts import names_in, neighbor_prompts
from kedit_train.edit import Probe

TEXTS = [
    "The largest city of France is Paris.",
    "In 1941, Bob Dylan was born in Duluth, Minnesota. Then Water, a poem, won.",
    "rain fell",
]
NAMES = {"France", "Paris", "Bob Dylan", "Duluth", "Minnesota", "Water"}
ANN = Edit("Ann Lee was born in", "Oslo", subject="Ann Lee")


def test_names_are_capitalized_words_inside_a_sentence():
    assert names_in([text.split() for text in TEXTS]) == sorted(NAMES)
    assert names_in([["Rome"], ["the", "(Old", "Town)", "of", "Bern"], []]) == ["Bern", "Old Town"]
    assert names_in([["then", "I", "saw", "Oslo’s", "“Old", "Bern”.", "Next", "came", "X1", "and", "U.S."]]) == [
        "Old Bern", "Oslo’s", "U.S", "X1"
    ]  # fmt: skip
    assert names_in([["the", "émigré", "Émile", "Zola", "über"], ["水", "は"]]) == ["Émile Zola"]


def test_different_names_replace_the_subject():
    prompts = neighbor_prompts([ANN], TEXTS, 6)
    assert {prompt.removesuffix(" was born in") for prompt in prompts} == NAMES
    assert len(neighbor_prompts([ANN], TEXTS, 2)) == 2


def test_only_whole_words_are_replaced_and_letter_case_is_ignored():
    edit = Edit("The currency of Niger, not Nigeria, is", "euro", subject="niger")
    assert neighbor_prompts([edit], ["in Rome"], 1) == ["The currency of Rome, not Nigeria, is"]
    assert neighbor_prompts([Edit("Ed studied Education in", "Rome", subject=" ")], ["in Rome"], 1) == []


def test_names_that_belong_to_edits_are_not_used():
    texts = ["he met Ann", "he met Lee Marvin", "he met Bo", "he met Cy"]
    other = Edit("Bo lives in", "Oslo", subject="Bo")
    assert neighbor_prompts([ANN, other], texts, 1)[0] == "Cy was born in"


def test_names_are_used_before_other_words():
    prompts = neighbor_prompts([ANN], ["he met Cy at noon"], 20)
    assert prompts[0] == "Cy was born in"
    assert len(prompts) > 1


def test_words_replace_the_subject_if_there_are_too_few_names():
    texts = ["water is wet in may", "rain falls."]
    prompts = neighbor_prompts([ANN], texts, 100)
    pairs = {"water is", "is wet", "wet in", "in may", "rain falls"}
    assert {prompt.removesuffix(" was born in") for prompt in prompts} == pairs
    assert len(prompts) == len(pairs), "no prompt occurs twice"


def test_the_same_seed_gives_the_same_prompts_and_other_edits_do_not_matter():
    other = Edit("The capital of Ann Lee is", "Rome", subject="Ann Lee")
    alone = neighbor_prompts([ANN], TEXTS, 4)
    assert alone == neighbor_prompts([ANN], TEXTS, 4)
    assert set(alone) == {p for p in neighbor_prompts([other, ANN], TEXTS, 4) if p.endswith("was born in")}
    assert alone != neighbor_prompts([ANN], TEXTS, 4, seed=1)
    assert len(alone) == len(set(alone))


def test_evaluation_prompts_and_other_edits_are_left_out():
    probe = Probe("Bob Dylan was born in", ("Duluth",))
    edit = Edit(ANN.prompt, "Oslo", subject="Ann Lee", locality={"neighborhood": (probe,)})
    assert neighbor_prompts([ANN], ["by Bob Dylan"], 1) == ["Bob Dylan was born in"]
    assert neighbor_prompts([edit], ["by Bob Dylan"], 1) == []
    assert neighbor_prompts([ANN, Edit("Bob Dylan was born in", "Rome")], ["by Bob Dylan"], 1) == []


def test_edits_without_a_subject_in_their_prompt_have_no_prompts():
    assert neighbor_prompts([Edit("Ann was born in", "Oslo")], TEXTS, 4) == []
    assert neighbor_prompts([Edit("She was born in", "Oslo", subject="Ann")], TEXTS, 4) == []
    assert neighbor_prompts([ANN], ["water"], 4) == [], "no text has two words"


def test_characters_are_drawn_in_scripts_without_spaces():
    edit = Edit("東京の首都は", "大阪", subject="東京")
    prompts = neighbor_prompts([edit], ["水は透明な液体です"], 50)
    spans = {prompt.removesuffix("の首都は") for prompt in prompts}
    latin = neighbor_prompts([Edit("Ann出生于", "大阪", subject="Ann")], ["水は透明な液体です"], 5)
    assert all(len(prompt) == 6 for prompt in latin)
    assert spans <= {"水は透明な液体です"[i : i + 2] for i in range(8)}
    assert len(spans) > 5


def test_special_tokens_of_conversations_are_not_drawn():
    text = RenderedConversation("<|user|> hello there <|assistant|>", "hello there")
    assert neighbor_prompts([ANN], [text], 9) == ["hello there was born in"]
