"""Texts: split without loss, drawn with a seed, and without those that an edit is scored on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from yaml import safe_load

from kedit_train.callbacks import EditCallback
from kedit_train.core.host import Host
from kedit_train.core.locality.texts import Texts
from kedit_train.core.locality.token_sequences import pad_sequences
from kedit_train.data import Edit, Probe
from kedit_train.errors import EditError

TEXTS = ["The sky is blue.", "Grass\u2028is green.", "Snöw: 雪"]


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<unk>", *"abcdefghij"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", model_max_length=4)


def run_with(tokenizer: Any, edits: Sequence[Edit] = ()) -> Any:
    """The parts of an ``EditRun`` that ``Texts.tokenize`` reads."""
    model, host = torch.nn.Identity(), Host(object())
    return SimpleNamespace(edits=edits, model=model, host=host, tokenizer=lambda given: given or tokenizer)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 10, 11])
def test_long_texts_are_split_without_loss(length):
    texts = ["a b c d e f g h i j", "a", "b c d"]
    whole = tokenizer()(texts)["input_ids"]
    cut = Texts(texts, max_length=length).tokenize(run_with(tokenizer()))
    assert all(0 < len(row) <= length for row in cut)
    assert [i for row in cut for i in row] == [i for row in whole for i in row]
    assert len(cut) == sum(-(-len(row) // length) for row in whole), "no sequence spans two texts"


def test_texts_without_tokens_are_an_error():
    with pytest.raises(EditError) as error:
        Texts(["? !", "."]).tokenize(run_with(lambda texts, truncation: {"input_ids": [[] for _ in texts]}))
    assert str(error.value) == "the tokenizer returns no token for any of the 2 texts; pass other texts."


def test_padding_is_on_the_right():
    ids, mask = pad_sequences([[0, 5], [7], [1, 2, 3]], pad_id=0)
    assert ids.tolist() == [[0, 5, 0], [7, 0, 0], [1, 2, 3]]
    assert mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]


EDIT = Edit(
    prompt="The capital of France is",
    target="Lyon",
    rephrases=("France's capital:",),
    locality={"neighbours": (Probe("The capital of Spain is", ("Madrid",)),)},
    portability={"hops": (Probe("The mayor of France's capital is", ("Ann",)),)},
)


def test_texts_with_a_scored_prompt_are_left_out_with_a_warning():
    kept = ["The sky is blue.", "Spain is sunny."]
    held = [
        "The capital of France is Paris.",
        "Q: France's capital: Paris",
        "The capital of Spain is Madrid",
        "Well. The mayor of France's capital is Ann.",
    ]
    message = "4 of 6 texts contain an evaluation prompt of the edits (the first: 'The capital of France is Paris.')"
    with pytest.warns(UserWarning, match=re.escape(message)):
        assert Texts([kept[0], *held, kept[1]]).load([EDIT]) == kept


@pytest.mark.filterwarnings("ignore:1 of 1:UserWarning")
def test_texts_that_are_all_leaks_are_an_error():
    with pytest.raises(EditError) as error:
        Texts(["The capital of France is Paris."]).load([EDIT])
    assert str(error.value) == (
        "every text contains an evaluation prompt of the edits, so no text is left; pass other texts."
    )


@pytest.mark.parametrize("edits", [[], [EDIT]])
def test_without_leaks_there_is_no_warning(edits):
    assert Texts(TEXTS).load(edits) == TEXTS


def test_case_and_white_space_do_not_hide_a_leak():
    texts = ["The sky is blue.", "FRANCE'S  capital: Paris"]
    with pytest.warns(UserWarning, match="1 of 2 texts contain an evaluation prompt"):
        assert Texts(texts).load([EDIT]) == texts[:1]


def test_texts_with_leaks_are_kept_on_request():
    texts = ["The capital of France is Paris."]
    assert Texts(texts).load([EDIT], keep_leaks=True) == texts


def test_an_iterator_is_read_once():
    texts = Texts(iter(TEXTS))
    assert texts.load() == texts.load() == TEXTS


def test_a_limit_draws_texts_with_the_seed():
    texts = [f"Text {n}." for n in range(50)]
    drawn = [Texts(texts, seed=seed).load(limit=10) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 10
    assert Texts(texts).load(limit=50) == texts


def test_nearest_texts_are_chosen_for_the_edits():
    texts = ["The capital of Spain is big.", "Rain falls.", "Snow falls."]
    edit = Edit(prompt="The capital of France is", target="Lyon")
    assert Texts(texts, nearest=1).load([edit]) == texts[:1]


def test_the_tokenizer_of_texts_comes_before_that_of_the_run():
    run = run_with(lambda texts, truncation: {"input_ids": [[1] for _ in texts]})
    own = Texts(["a"], tokenizer=lambda texts, truncation: {"input_ids": [[2] for _ in texts]})
    assert Texts(["a"]).tokenize(run) == [[1]]
    assert own.tokenize(run) == [[2]]


def test_a_source_becomes_texts():
    texts = Texts("keep.txt", max_length=8)
    assert Texts.of(texts) is texts
    assert Texts.of("keep.txt") == Texts("keep.txt")
    assert Texts.of({"source": "keep.txt", "max_length": 8}) == texts
    assert Texts.of("keep.txt", max_length=8) == texts
    with pytest.raises(EditError) as error:
        Texts.of({"source": "keep.txt", "length": 8})
    assert str(error.value) == (
        "Texts: unknown argument 'length'; use only source, max_length, nearest, tokenizer, seed."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "Texts: max_length must be an integer >= 1, got 0."),
        ({"nearest": 0}, "Texts: nearest must be an integer >= 1, or None, got 0."),
        ({"nearest": "24"}, "Texts: nearest must be an integer >= 1, or None, got '24'."),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(EditError) as error:
        Texts(TEXTS, **options)
    assert str(error.value) == message


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("keep.txt", Texts("keep.txt")),
        ("world", Texts("world")),
        ("[One., Two.]", Texts(["One.", "Two."])),
        ("{source: keep.txt, nearest: 24}", Texts("keep.txt", nearest=24)),
        (
            "{class_path: kedit_train.callbacks.Texts, init_args: {source: [One.], max_length: 64}}",
            Texts(["One."], max_length=64),
        ),
    ],
)
def test_yaml_gives_a_source_or_texts(yaml, expected):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=EditCallback)
    config = parser.parse_object(
        {"callback": {"class_path": "kedit_train.callbacks.KLLocality", "init_args": {"texts": safe_load(yaml)}}}
    )
    assert parser.instantiate(config).callback.texts == expected
