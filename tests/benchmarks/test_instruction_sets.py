"""The instruction sets: the answers are right, and the test has no name and no city of the training."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
SENTENCE = re.compile(r"(?P<who>\w+) went from (?P<start>\w+) to (?P<end>\w+) by (?P<vehicle>\w+) on (?P<day>\w+)\.")


@pytest.fixture
def sets(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module("instruction_sets")


@pytest.mark.parametrize("name", ["A", "B"])
def test_every_answer_follows_from_its_sentence(sets: Any, name: str) -> None:
    train, test = sets.instructions(name, 0)
    assert (len(train), len(test)) == (sets.TRAIN, sets.TEST)
    found: list[set[str]] = []
    for part in (train, test):
        words: set[str] = set()
        for example in part:
            sentence, question, end = example.prompt.split("\n")
            read = SENTENCE.fullmatch(sentence).groupdict()  # type: ignore[union-attr]
            assert read["start"] != read["end"]
            assert example.target == sets.SETS[name][question].format(**read)
            assert end == "Answer:"
            words |= {read["who"], read["start"], read["end"]}
        found.append(words)
        assert {e.prompt.split("\n")[1] for e in part} == set(sets.SETS[name])
    assert not found[0] & found[1]


def test_the_sets_depend_on_the_seed_only(sets: Any) -> None:
    assert sets.instructions("A", 3) == sets.instructions("A", 3)
    assert sets.instructions("A", 3) != sets.instructions("A", 4)
    assert not set(sets.SETS["A"]) & set(sets.SETS["B"])


def test_the_table_shows_means_of_the_reported_seeds(sets: Any) -> None:
    row = {"method": "plain", "A before": 1.0, "A": 0.5, "B": 0.25, "KL on B": 1.0, "KL on prose": 0.01, "seconds": 9.0}
    rows = [{**row, "seed": 0}, {**row, "seed": 1, "A": 0.0}, {**row, "seed": 100, "A": 9.0}]
    *_, last = sets.table(rows)
    assert last == "| plain fine-tuning | 1.00 | 0.25 | 0.25 | 1.000 | 0.0100 | 9 |"
