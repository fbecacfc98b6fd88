"""Fluency scores against computations by hand."""

from __future__ import annotations

import math

import pytest

from kedit_train.evaluation.scoring.fluency import ngram_entropy, repetition, split_words


def test_words_and_punctuation_marks_are_split():
    assert split_words("It's late, Ann.") == ["It", "'", "s", "late", ",", "Ann", "."]


def test_entropy_of_distinct_ngrams():
    # Three bigrams and two trigrams, all of them different.
    assert ngram_entropy("one two three four") == pytest.approx((2 / 3 * math.log2(3) + 4 / 3 * math.log2(2)) / 2)


def test_a_repeated_word_has_no_entropy_and_full_repetition():
    assert ngram_entropy("la la la la la") == 0.0
    assert repetition("la la la la la") == pytest.approx(1 / 2)


def test_a_text_without_ngrams_has_no_score():
    assert ngram_entropy("one two") is None
    assert repetition("one two three") is None
