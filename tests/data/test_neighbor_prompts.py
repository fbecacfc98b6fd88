"""Prompts with other words in place of the subject."""

from __future__ import annotations

from kedit_train.data import Edit
from kedit_train.data.conversations import RenderedConversation
from kedit_train.data.neighbor_prompts import neighbor_prompts
from kedit_train.edit import Probe

TEXTS = ["Paris is the capital of France.", "Bob Dylan was born in Duluth, Minnesota.", "Water"]
ANN = Edit("Ann Lee was born in", "Oslo", subject="Ann Lee")


def test_as_many_consecutive_words_of_one_text_replace_the_subject():
    prompts = neighbor_prompts([ANN], TEXTS, 200)
    words = [text.rstrip(".").replace(",", "").split() for text in TEXTS]
    pairs = {" ".join(text[i : i + 2]) for text in words for i in range(len(text) - 1)}
    found = {prompt.removesuffix(" was born in").replace(",", "") for prompt in prompts}
    assert found == pairs
    assert all(prompt.endswith(" was born in") for prompt in prompts)


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
    assert neighbor_prompts([ANN], ["Bob Dylan"], 9) == ["Bob Dylan was born in"]
    assert neighbor_prompts([edit], ["Bob Dylan"], 9) == []
    assert neighbor_prompts([ANN, Edit("Bob Dylan was born in", "Rome")], ["Bob Dylan"], 9) == []


def test_edits_without_a_subject_in_their_prompt_have_no_prompts():
    assert neighbor_prompts([Edit("Ann was born in", "Oslo")], TEXTS, 4) == []
    assert neighbor_prompts([Edit("She was born in", "Oslo", subject="Ann")], TEXTS, 4) == []
    assert neighbor_prompts([ANN], ["Water"], 4) == [], "no text has two words"


def test_characters_are_drawn_in_scripts_without_spaces():
    edit = Edit("東京の首都は", "大阪", subject="東京")
    prompts = neighbor_prompts([edit], ["水は透明な液体です"], 50)
    spans = {prompt.removesuffix("の首都は") for prompt in prompts}
    assert spans <= {"水は透明な液体です"[i : i + 2] for i in range(8)}
    assert len(spans) > 5


def test_special_tokens_of_conversations_are_not_drawn():
    text = RenderedConversation("<|user|> Hello there <|assistant|>", "Hello there")
    assert neighbor_prompts([ANN], [text], 9) == ["Hello there was born in"]
