"""The file of measured trials, after kills at any byte."""

from __future__ import annotations

import json
from pathlib import Path

from kedit_train.modes.tuning.journal import Journal, key_of


def test_a_record_is_read_back_and_the_last_one_of_a_key_counts(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    journal = Journal(path)
    journal.add("a", {"reliability": 0.5, "text": "Bâle\u2028"})
    journal.add("b", {"reliability": None})
    journal.add("a", {"reliability": 1.0, "text": "Bâle\u2028"})
    for known in (journal, Journal(path)):
        assert known.get("a") == {"key": "a", "reliability": 1.0, "text": "Bâle\u2028"}
        assert known.get("b") == {"key": "b", "reliability": None}
        assert known.get("c") is None


def test_a_file_cut_at_any_byte_loses_only_its_last_record(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    journal = Journal(whole)
    journal.add("a", {"x": "Bâle"})
    first = whole.stat().st_size
    journal.add("b", {"x": "é"})
    content = whole.read_bytes()
    for length in range(len(content) + 1):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(content[:length])
        cut = Journal(path)
        assert (cut.get("a") is not None) == (length >= first - 1)
        cut.add("c", {"x": 1})
        again = Journal(path)
        assert again.get("c") == {"key": "c", "x": 1}
        assert (again.get("a") is not None) == (length >= first - 1)


def test_lines_that_are_no_records_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('[]\n3\n{"key": 1}\n\n{"x": 2}\n' + "[" * 10_000 + '\n{"key": "a"}\n')
    assert Journal(path).get("a") == {"key": "a"}


def test_a_key_depends_on_every_part() -> None:
    parts = {"weights": "w", "setting": {"layers": 0.7}, "seed": 0}
    others = [{**parts, "seed": 1}, {**parts, "setting": {"layers": "0.7"}}, {**parts, "weights": "v"}]
    assert len({key_of(p) for p in (parts, *others)}) == 4
    assert key_of(json.loads(json.dumps(parts))) == key_of(parts)
