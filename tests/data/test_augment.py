"""Pseudo-paraphrases and the guard against leaks, each against a brute force."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from kedit_train import world
from kedit_train.augmentation import read_prompts
from kedit_train.data import Edit, Probe
from kedit_train.data.leaks import LeakGuard, scored_prompts, with_prefixes
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


def test_every_edit_behind_its_prefixes() -> None:
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
    # An edit's prefixes do not hang on its neighbours: a sequence gives each edit what the batch gives it.
    assert with_prefixes([TOKYO], prefixes, 3, seed=1) == rows[3:]
    assert with_prefixes([ANN], prefixes, 0) == []
    with pytest.raises(EditError, match="per_edit=3 of 2 different prefixes"):
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
def test_what_the_guard_refuses(text: str, scored: bool, edited: bool) -> None:
    guard = LeakGuard([ANN, TOKYO])
    assert (guard.scored(text), guard.edited(text)) == (scored, edited)
    assert guard.refuses(Edit(text, "")) == (scored or edited)


def test_a_probe_over_the_border_of_prompt_and_answer_is_a_leak() -> None:
    guard = LeakGuard([ANN])
    assert guard.refuses(Edit("Bob lives", "in Oslo"))
    assert not guard.refuses(Edit("Bob is", "in Oslo"))
    # That an answer names an edited subject tells nothing about it.
    assert not guard.refuses(Edit("Bob loves", "Ann"))


def test_the_guard_against_the_plainest_search() -> None:
    edits = world.edits(40)
    guard, rng = LeakGuard(edits), random.Random(0)

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
        assert guard.scored(text) == scored
        assert guard.edited(text) == (any(prompt in plain(text) for prompt in own) or any(words))
        found[scored] += 1
    assert min(found.values()) > 100


@pytest.mark.parametrize("name", ["nofile", "none.txt", "none.jsonl"])
def test_prompts_that_are_not_there(name: str) -> None:
    with pytest.raises(EditError, match=rf"replay: there is no file '{name}'.*\.txt with one a line or .*\.jsonl"):
        read_prompts(name, [])


def test_prompts_of_an_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "prompts.md").write_text("The capital of Fenesh is")
    with pytest.raises(EditError, match=r"prompts\.md is of no known kind.*\.txt"):
        read_prompts(tmp_path / "prompts.md", [])
