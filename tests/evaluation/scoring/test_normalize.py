"""Comparison of answers after normalization."""

from __future__ import annotations

import random
import re
import string

import pytest

from kedit_train.evaluation import exact_match, normalize


def squad(text: str) -> str:
    """Normalize as the SQuAD paper does: lower case, no punctuation, no articles, single spaces."""
    bare = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(word for word in bare.split() if word not in ("a", "an", "the"))


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("St. Louis", "st louis"),
        ("St. Louis.", "St. Louis"),
        ("J. K. Rowling.", "J. K. Rowling"),
        ("3.5.", "3.5"),
        ("1,000", "1000"),
        ("1,234,567.5", "1234567.5"),
        ("the Beatles", "Beatles"),
        ("  The\tBEATLES ! ", "beatles"),
        ("“Guernica”", "Guernica"),
        ("The", "the."),
        ("An apple a day", "apple day"),
        ("−5", "-5"),
        ("ﬁnland", "Finland"),
        ("STRASSE", "straße"),
        ("C++.", "c++"),
    ],
)
def test_answers_that_are_equal(answer: str, accepted: str) -> None:
    assert exact_match(answer, [accepted])
    assert exact_match(accepted, ["something else", answer])


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("3.5", "35"),
        ("3.5", "3 5"),
        (".5", "5"),
        ("-5", "5"),
        ("3,5", "35"),
        ("1,2345", "12345"),
        ("St", "St. Louis"),
        ("St. Louis", "St"),
        ("Vitamin A", "Vitamin"),
        ("C++", "C"),
        ("C#", "C"),
        ("C#", "C++"),
        ("Paris", "The"),
        ("a", "the"),
        ("!", "?"),
        ("Paris, France", "Paris"),
    ],
)
def test_answers_that_differ(answer: str, accepted: str) -> None:
    assert not exact_match(answer, [accepted])
    assert not exact_match(accepted, [answer])


@pytest.mark.parametrize("empty", ["", " ", "\n\t"])
def test_an_empty_answer_is_always_wrong(empty: str) -> None:
    assert not exact_match(empty, ["Paris", "", "The", "..."])
    assert not exact_match("Paris", [empty])
    assert not exact_match("Paris", [])


def test_one_string_instead_of_a_list_is_refused() -> None:
    with pytest.raises(TypeError, match="got one string"):
        exact_match("a", "abc")


def test_a_visible_text_never_becomes_empty() -> None:
    draw = random.Random(0)
    alphabet = "aAn the.,-+#!?'\"“”–−5 0\u00a0çé"
    for _ in range(5_000):
        text = "".join(draw.choice(alphabet) for _ in range(draw.randint(0, 12)))
        assert bool(normalize(text)) == bool(text.strip())
        assert normalize(text + " ") == normalize("\t" + text)


def test_agrees_with_squad_on_ordinary_words() -> None:
    draw = random.Random(1)
    words = ["the", "a", "an", "Paris,", "(New)", "York!", "it's", "well-known", "U.S.", "theatre", "Ann:"]
    for _ in range(2_000):
        text = " ".join(draw.choice(words) for _ in range(draw.randint(1, 6))) + " end"
        assert re.sub(r"\s+", " ", normalize(text)) == squad(text)
