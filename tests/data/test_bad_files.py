"""Broken files, files of another format and wrong arguments are reported in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data.records import GOOD, REST, raised, write

from kedit_train.data import EditDataset
from kedit_train.errors import EditError

# The good records of these files are the same record.
pytestmark = pytest.mark.filterwarnings("ignore:.*repeat an earlier edit:UserWarning")


def test_a_record_of_another_format_is_an_error(tmp_path: Path) -> None:
    stray = GOOD["knowedit"]
    path = write(tmp_path / "f.json", json.dumps([GOOD["counterfact"]] * 2 + [stray]))
    assert raised(path) == (
        f"{path}, record 3: field 'locality' belongs to the format knowedit, but most records have the format "
        f'counterfact{REST}, or pass format="counterfact" to read all records as '
        "counterfact"
    )


def test_unknown_and_ambiguous_fields_are_listed_with_the_formats(tmp_path: Path) -> None:
    formats = "edits, counterfact, counterfact_nested, zsre, knowedit, wikibigedit, qaedit, mquake"
    formats += ", documents, unkebench, akew, leme, rippleedits, uniedit, hallueditbench"
    path = write(tmp_path / "f.json", '[{"question": "q", "reply": "a"}]')
    assert raised(path) == (
        f"{path}: the fields 'question', 'reply' match none of the formats {formats}; rename the fields to prompt "
        "and target, or pass format=..."
    )
    path = write(tmp_path / "g.json", '[{"prompt": "q", "target": "a", "target_new": "b"}]')
    assert raised(path) == (
        f"{path}: the fields 'prompt', 'target', 'target_new' fit more than one format (edits, counterfact); pass the "
        'format of the records, for example format="edits", or use one file per format'
    )
    path = write(tmp_path / "h.json", json.dumps([GOOD["zsre"], GOOD["edits"]]))
    assert "fit more than one format (zsre, edits)" in raised(path)


def test_wrong_arguments_are_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "f.json", json.dumps([GOOD["edits"]]))
    assert raised(path, format="zrse").startswith('EditDataset: format must be "edits", "counterfact", ')
    assert raised(path, on_error="ignore") == 'EditDataset: on_error must be "raise" or "skip", got \'ignore\'.'
    assert raised(path, limit=0) == "EditDataset: limit must be an integer >= 1, or None, got 0."
    for wrong in ("p", {"prompt": "p", "target": "t"}):
        with pytest.raises(EditError, match=r"^EditDataset: records must be a list of dicts .* got (text|a mapping)"):
            EditDataset.from_records(wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(EditError, match=r"^records: there are no records; give at least one"):
        EditDataset.from_records([])
    with pytest.raises(EditError, match=r"^records, record 1: the record must be a mapping of fields, got a number;"):
        EditDataset.from_records([1, 2])  # pyright: ignore[reportArgumentType]


def test_unreadable_files_are_reported(tmp_path: Path) -> None:
    missing = tmp_path / "none.json"
    assert raised(missing) == f"{missing}: the file does not exist; check the path (working directory: {Path.cwd()})"
    for name, text in [("a.json", ""), ("a.jsonl", " \n\n"), ("a.csv", "")]:
        path = write(tmp_path / name, text)
        assert raised(path) == f"{path}: the file is empty; add at least one record with a prompt and a target"
    for name, text in [("b.json", "[]"), ("b2.json", '{"data": []}'), ("b.csv", "prompt,target\n")]:
        path = write(tmp_path / name, text)
        assert raised(path) == f"{path}: the file has no records; add at least one record with a prompt and a target"
    path = write(tmp_path / "c.yaml", "a: 1")
    assert raised(path) == f"{path}: the file name must end in one of .json, .jsonl, .csv; rename or convert the file"
    path = write(tmp_path / "d.json", '{"prompt": "p", "target": "t"}')
    assert raised(path) == (
        f"{path}: the file must contain a list of records, or a mapping with such a list under one of the keys data, "
        "records, edits, got a mapping with the keys 'prompt', 'target'; put the records into a list"
    )
    path = write(tmp_path / "e.json", '[{"prompt": "p",\n "target": }]')
    assert raised(path) == f"{path}, line 2: the file is not valid JSON (Expecting value); correct the file"
    path = write(tmp_path / "f.json", '{"prompt": "p"}\n{"prompt": "q"}\n')
    assert raised(path) == (
        f"{path}, line 2: the file is not valid JSON (Extra data); correct the file; a file with one record per line "
        "must end in .jsonl"
    )
    path = tmp_path / "g.json"
    path.write_bytes('[{"prompt": "é", "target": "t"}]'.encode("latin-1"))
    assert (
        raised(path)
        == f"{path}: the file must be UTF-8 text, got an invalid byte at position 13; save the file as UTF-8"
    )


def test_a_broken_jsonl_line_is_one_bad_record(tmp_path: Path) -> None:
    good = json.dumps(GOOD["edits"])
    path = write(tmp_path / "f.jsonl", f'{good}\n\n{{"prompt": \n{good}\n')
    message = f"{path}, record 2 (line 3): the line is not valid JSON (Expecting value at column 12){REST}"
    assert raised(path) == message
    with pytest.warns(UserWarning, match="skipped 1 of 3 records"):
        edits = EditDataset.load(path, on_error="skip")
    assert (len(edits), edits.skipped) == (2, (message,))


def test_broken_csv_files_are_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "f.csv", "prompt,target\np,t\nAda, the poet,Bern\n")
    assert (
        raised(path)
        == f"{path}, record 2 (line 3): the row must have 2 cells, got 3 (a text with a comma must be in quotes){REST}"
    )
    path = write(tmp_path / "g.csv", "prompt,prompt\na,b\n")
    assert raised(path) == f"{path}: the column 'prompt' appears twice; rename one of the two columns"
    path = write(tmp_path / "h.csv", 'prompt,target,aliases\np,t,"[""a"", "\n')
    assert raised(path) == (
        f"{path}, record 1: field 'aliases' must be a JSON list or mapping, or texts separated by |, got invalid "
        f"JSON (Expecting value){REST}"
    )
    path = write(tmp_path / "i.csv", 'prompt,target\np,"t\n')
    assert raised(path) == f"{path}, line 2: the file is not valid CSV (unexpected end of data); correct the file"


def test_skipping_warns_once_and_never_returns_an_empty_dataset(tmp_path: Path) -> None:
    records = [{"prompt": f"p{i}", "target": "t" if i % 2 else i} for i in range(10)]
    path = write(tmp_path / "f.json", json.dumps(records))
    with pytest.warns(UserWarning, match="skipped") as warned:
        edits = EditDataset.load(path, on_error="skip")
    assert len(warned) == 1
    assert (len(edits), len(edits.skipped)) == (5, 5)
    assert [reason.split(":")[0].split()[-1] for reason in edits.skipped] == ["1", "3", "5", "7", "9"]
    assert "5 skipped" in repr(edits)
    with pytest.warns(UserWarning, match="skipped 2 of 4 records"):
        assert len(EditDataset.load(path, on_error="skip", limit=2)) == 2
    path = write(tmp_path / "g.json", json.dumps([{"prompt": "p", "target": 1}] * 3))
    assert raised(path, on_error="skip").startswith(
        f"{path}: none of the 3 records can be read; the first reason: {path}, record 1"
    )
