"""Pseudo-paraphrases and leak checks, compared with brute force."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from kedit_train import world
from kedit_train.augmentation import read_prompts
from kedit_train.data import Edit, Probe
from kedit_train.data.leaks import LeakCheck, with_prefixes
from kedit_train.edit import scored_prompts
from kedit_train.errors import EditError

ANN = Edit(
    "Ann lives in",
    "Rome",
    subject="Ann",
    rephrases=("The home of  Ann is",),
    locality={"near": (Probe("Bob lives in", ("Oslo",)),)},
    portability={"hop": (Probe("Q?", ("x",)),)},
)
TOKYO = Edit("日本の首都は", "大阪", subject="日本", rephrases=("日本で首都は",))


def test_each_edit_gets_its_own_prefixes() -> None:
    prefixes = [f"Text {i}." for i in range(5)] + ["また。"]
    rows = with_prefixes([ANN, TOKYO], prefixes, 3, seed=1)
    assert [row.target for row in rows] == ["Rome"] * 3 + ["大阪"] * 3
    for edit, own in ((ANN, rows[:3]), (TOKYO, rows[3:])):
        heads = [row.prompt.removesuffix(edit.prompt).rstrip() for row in own]
        assert set(heads) <= set(prefixes)
        assert len(set(heads)) == 3
        assert all(row.prompt.endswith(f". {edit.prompt}") or "。" in row.prompt or edit is TOKYO for row in own)
        assert not any(row.rephrases or row.locality or row.portability for row in own)
    assert rows == with_prefixes([ANN, TOKYO], prefixes, 3, seed=1) != with_prefixes([ANN, TOKYO], prefixes, 3, seed=2)
    # The prefixes of an edit do not depend on the other edits, so each edit gets the same prefixes in every mode.
    assert with_prefixes([TOKYO], prefixes, 3, seed=1) == rows[3:]
    assert with_prefixes([ANN], prefixes, 0) == []
    with pytest.raises(EditError, match=r"with_prefixes: per_edit must be an integer from 0 to 2 .* got 3"):
        with_prefixes([ANN], ["a", "b", "b"], 3)


@pytest.mark.parametrize(
    ("text", "scored", "edited"),
    [
        ("Ann lives in", False, True),
        ("Hm. ann  LIVES\nin", False, True),
        ("the home of Ann is", True, True),
        ("So: Bob lives in a house", True, False),
        ("Annabel works for", False, False),
        ("Joann works for", False, False),
        ("Who is Ann?", False, True),
        ("Who is Ann", False, True),
        ("Is this a q?", True, False),
        ("Bob lives", False, False),
        ("", False, False),
        ("今日は日本の首都は", False, True),
        ("日本語", False, True),
        ("首都", False, False),
    ],
)
def test_leaks_are_found(text: str, scored: bool, edited: bool) -> None:
    check = LeakCheck([ANN, TOKYO])
    assert (check.contains_scored_prompt(text), check.mentions_edit(text)) == (scored, edited)
    assert check.is_leak(Edit(text, "")) == (scored or edited)


def test_a_probe_that_spans_prompt_and_answer_is_a_leak() -> None:
    check = LeakCheck([ANN])
    assert check.is_leak(Edit("Bob lives", "in Oslo"))
    assert not check.is_leak(Edit("Bob is", "in Oslo"))
    # An answer may name an edited subject without stating a fact about it.
    assert not check.is_leak(Edit("Bob loves", "Ann"))


def test_the_check_equals_a_plain_search() -> None:
    edits = world.edits(40)
    check, rng = LeakCheck(edits), random.Random(0)

    def plain(text: str) -> str:
        return " ".join(text.lower().split())

    held = [plain(prompt) for edit in edits for prompt in scored_prompts(edit)]
    own = [plain(edit.prompt) for edit in edits]
    subjects = [plain(edit.subject or "") for edit in edits]
    pieces = [*held, *own, *subjects, *(p for e in world.edits(40, seed=3) for p in (e.prompt, *e.rephrases))]
    found = {True: 0, False: 0}
    for _ in range(600):
        text = f"{rng.choice(pieces)}{rng.choice(['', ' ', 'x', '. '])}{rng.choice(pieces)[: rng.randrange(40)]}"
        text = text[rng.randrange(3) :].title()
        words = [re.search(rf"(?<![^\W_]){re.escape(s)}(?![^\W_])", plain(text)) for s in subjects]
        scored = any(prompt in plain(text) for prompt in held)
        assert check.contains_scored_prompt(text) == scored
        assert check.mentions_edit(text) == (any(prompt in plain(text) for prompt in own) or any(words))
        found[scored] += 1
    assert min(found.values()) > 100


@pytest.mark.parametrize("name", ["nofile", "none.txt", "none.jsonl"])
def test_a_missing_file_of_prompts_is_an_error(name: str) -> None:
    with pytest.raises(
        EditError, match=rf"replay: file '{name}' does not exist.*\.txt file with one prompt per line, .*\.jsonl"
    ):
        read_prompts(name, [])


def test_a_file_of_an_unknown_kind_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "prompts.md").write_text("The capital of Fenesh is")
    with pytest.raises(EditError, match=r"prompts\.md must be a \.txt file"):
        read_prompts(tmp_path / "prompts.md", [])
