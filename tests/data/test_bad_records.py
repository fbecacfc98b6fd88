"""What is malformed gets one line: file, record, field, what was expected, what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kedit_train.data import Edit, EditDataset, Probe
from kedit_train.errors import EditError

REST = ': mend the record, or pass on_error="skip" to leave such records out'
GOOD = {
    "edits": {"prompt": "p", "target": "t"},
    "counterfact": {"prompt": "p", "target_new": "t", "ground_truth": "o"},
    "zsre": {"src": "p", "alt": "t"},
    "knowedit": {"prompt": "p", "target_new": "t", "locality": {"k": [{"prompt": "q", "ground_truth": "a"}]}},
    "qaedit": {"prompt": "p", "target": "t", "rephrase": "r", "locality": [{"loc": "q", "loc_ans": "a"}]},
    "wikibigedit": {"update": "p", "ans": "t"},
    "counterfact_nested": {
        "requested_rewrite": {"prompt": "{} is", "subject": "S", "target_new": {"str": "t"}},
        "paraphrase_prompts": ["r"],
    },
    "mquake": {
        "requested_rewrite": [{"prompt": "{} is", "subject": "S", "target_new": {"str": "t"}}],
        "questions": ["q"],
        "new_answer": "a",
    },
}


def changed(name: str, change: dict[str, Any]) -> dict[str, Any]:
    """A deep copy of the good record with values at dotted paths replaced; ``...`` removes."""
    record = json.loads(json.dumps(GOOD[name]))
    for path, value in change.items():
        *parents, key = [int(part) if part.isdigit() else part for part in path.split(".")]
        inside = record
        for parent in parents:
            inside = inside[parent]
        if value is ...:
            del inside[key]
        else:
            inside[key] = value
    return record


CASES: list[tuple[str, dict[str, Any], str]] = [
    ("edits", {"target": ...}, "field 'target' is missing (expected text)"),
    ("edits", {"target": None}, "field 'target' is null (expected text)"),
    ("edits", {"target": " \n"}, "field 'target' is empty (expected text)"),
    ("edits", {"target": 1984}, "field 'target' is a number (expected text)"),
    ("edits", {"target": ["t"]}, "field 'target' is a list (expected text)"),
    ("edits", {"prompt": ""}, "field 'prompt' is empty (expected text)"),
    ("edits", {"subject": 3}, "field 'subject' is a number (expected text)"),
    ("edits", {"aliases": [1]}, "field 'aliases[0]' is a number (expected text)"),
    ("edits", {"rephrases": ["r", ""]}, "field 'rephrases[1]' is empty (expected text)"),
    ("edits", {"rephrases": {"a": 1}}, "field 'rephrases' is a mapping (expected text or a list of texts)"),
    ("edits", {"id": 1.5}, "field 'id' is a number (expected text or a whole number)"),
    (
        "edits",
        {"locality": {"near": [3]}},
        'field \'locality.near[0]\' is a number (expected text or {"prompt": ..., "answers": [...]})',
    ),
    ("edits", {"locality": [{"answers": ["a"]}]}, "field 'locality[0].prompt' is missing (expected text)"),
    (
        "edits",
        {"portability": 5},
        "field 'portability' is a number (expected a list of questions, or a mapping of kinds to such lists)",
    ),
    ("counterfact", {"target_new": ...}, "field 'target_new' is missing (expected text)"),
    ("counterfact", {"ground_truth": 5}, "field 'ground_truth' is a number (expected text or a list of texts)"),
    ("counterfact", {"rephrase_prompt": True}, "field 'rephrase_prompt' is a boolean (expected text or a list of texts)"),  # noqa: E501
    ("counterfact", {"locality_ground_truth": "a"}, "field 'locality_prompt' is missing (expected text)"),
    ("zsre", {"alt": ""}, "field 'alt' is empty (expected text)"),
    ("zsre", {"src": ...}, "field 'src' is missing (expected text)"),
    ("zsre", {"answers": ["a", None]}, "field 'answers[1]' is null (expected text)"),
    ("knowedit", {"target_new": float("nan")}, "field 'target_new' is a number (expected text)"),
    ("knowedit", {"locality": []}, "field 'locality' is a list (expected a mapping)"),
    ("knowedit", {"locality.k": "q"}, "field 'locality.k' is text (expected a list of mappings)"),
    ("knowedit", {"locality.k.0": "q"}, "field 'locality.k[0]' is text (expected a mapping)"),
    ("knowedit", {"locality.k.0.prompt": ...}, "field 'locality.k[0].prompt' is missing (expected text)"),
    (
        "knowedit",
        {"locality.k.0.ground_truth": [["a"], ["b", 4]]},
        "field 'locality.k[0].ground_truth[1][1]' is a number (expected text)",
    ),
    ("qaedit", {"locality.0.loc": None}, "field 'locality[0].loc' is null (expected text)"),
    ("qaedit", {"locality": "x"}, "field 'locality' is text (expected a list of mappings)"),
    ("wikibigedit", {"ans": ..., "mhop": "q"}, "field 'target_new' (or 'ans') is missing (expected text)"),
    ("wikibigedit", {"mhop_ans": "a"}, "field 'mhop' is missing (expected text)"),
    (
        "counterfact_nested",
        {"requested_rewrite.prompt": "It is"},
        "field 'requested_rewrite.prompt' has no {} for the subject "
        '(expected text such as "The mother tongue of {} is")',
    ),
    ("counterfact_nested", {"requested_rewrite.subject": ...}, "field 'requested_rewrite.subject' is missing (expected text)"),  # noqa: E501
    (
        "counterfact_nested",
        {"requested_rewrite.target_new": "t"},
        "field 'requested_rewrite.target_new' is text (expected a mapping)",
    ),
    (
        "counterfact_nested",
        {"requested_rewrite.target_new": {"id": "Q1"}},
        "field 'requested_rewrite.target_new.str' is missing (expected text)",
    ),
    ("mquake", {"requested_rewrite": []}, "field 'requested_rewrite' is an empty list (expected a list of mappings)"),
    ("mquake", {"requested_rewrite": ...}, "field 'requested_rewrite' is missing (expected a list of mappings)"),
    ("mquake", {"requested_rewrite.0.target_new": ...}, "field 'requested_rewrite[0].target_new' is missing (expected a mapping)"),  # noqa: E501
    ("mquake", {"new_answer": ...}, "field 'new_answer' is missing (expected text)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), CASES)
def test_a_bad_record_gets_one_line(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([GOOD[name], changed(name, change), GOOD[name]]))
    expected = f"{path}, record 2: {message}{REST}"
    with pytest.raises(EditError) as caught:
        EditDataset.load(path)
    assert str(caught.value) == expected
    assert "\n" not in expected
    with pytest.warns(UserWarning, match="skipped") as warned:
        edits = EditDataset.load(path, on_error="skip")
    assert [str(one.message) for one in warned] == [f"{path}: skipped 1 of 3 records; first: {expected}"]
    assert Path(warned[0].filename) == Path(__file__)
    assert (edits.skipped, len(edits), edits.format) == ((expected,), 2, name)


def raised(path: Path, **options: Any) -> str:
    with pytest.raises(EditError) as caught:
        EditDataset.load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_field_that_nothing_reads_is_an_error_in_our_own_format(tmp_path: Path) -> None:
    path = write(tmp_path / "f.json", json.dumps([GOOD["edits"], {**GOOD["edits"], "rephrasing": ["r"]}]))
    assert raised(path) == (
        f"{path}, record 2: nothing reads the field 'rephrasing' (known: aliases, id, locality, old_target, "
        "portability, prompt, rephrases, subject, target): rename or remove it; mend the record, or pass "
        'on_error="skip" to leave such records out'
    )


def test_a_field_that_nothing_reads_is_a_warning_in_a_public_format() -> None:
    with pytest.warns(UserWarning, match=r"^set: format counterfact does not read the fields 'notes' \(2 records\)$"):
        EditDataset.from_records([{**GOOD["counterfact"], "notes": 1}] * 2, name="set")


def test_a_record_of_another_format_is_an_error_not_a_loss(tmp_path: Path) -> None:
    stray = GOOD["knowedit"]
    path = write(tmp_path / "f.json", json.dumps([GOOD["counterfact"]] * 2 + [stray]))
    assert raised(path) == (
        f"{path}, record 3: field 'locality' belongs to knowedit, the records here are counterfact (expected one "
        f'format in a file){REST}, or pass format="counterfact"'
    )


def test_unknown_and_ambiguous_fields_list_formats_and_keys(tmp_path: Path) -> None:
    formats = "edits, counterfact, counterfact_nested, zsre, knowedit, wikibigedit, qaedit, mquake"
    path = write(tmp_path / "f.json", '[{"question": "q", "reply": "a"}]')
    assert raised(path) == (
        f"{path}: the fields 'question', 'reply' fit none of the formats {formats}: rename them to prompt and target, "
        "or pass format=..."
    )
    path = write(tmp_path / "g.json", '[{"prompt": "q", "target": "a", "target_new": "b"}]')
    assert raised(path) == (
        f"{path}: the fields 'prompt', 'target', 'target_new' fit several formats equally well (edits, counterfact): "
        'pass format="edits" or another of them, or split the file'
    )
    path = write(tmp_path / "h.json", json.dumps([GOOD["zsre"], GOOD["edits"]]))
    assert "fit several formats equally well (zsre, edits)" in raised(path)


def test_arguments(tmp_path: Path) -> None:
    path = write(tmp_path / "f.json", json.dumps([GOOD["edits"]]))
    assert raised(path, format="zrse").startswith("format='zrse' is not known: use one of edits, counterfact,")
    assert raised(path, on_error="ignore") == "on_error='ignore' is not known: use 'raise' or 'skip'"
    assert raised(path, limit=0) == "limit=0 leaves no edits: use 1 or more, or None for all"
    for wrong in ("p", {"prompt": "p", "target": "t"}):
        with pytest.raises(EditError, match=r"wants a list of records, not one (str|dict): use load"):
            EditDataset.from_records(wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(EditError, match=r"^records: there are no records: an edit needs"):
        EditDataset.from_records([])
    with pytest.raises(EditError, match=r"^records, record 1: the record is a number \(expected a mapping of fields\)"):
        EditDataset.from_records([1, 2])  # pyright: ignore[reportArgumentType]


def test_files(tmp_path: Path) -> None:
    missing = tmp_path / "none.json"
    assert raised(missing) == f"{missing}: there is no such file: check the path (working directory: {Path.cwd()})"
    for name, text in [("a.json", ""), ("a.jsonl", " \n\n"), ("a.csv", "")]:
        path = write(tmp_path / name, text)
        assert raised(path) == f"{path}: the file is empty: an edit needs at least a prompt and a target"
    for name, text in [("b.json", "[]"), ("b2.json", '{"data": []}'), ("b.csv", "prompt,target\n")]:
        path = write(tmp_path / name, text)
        assert raised(path) == f"{path}: the file holds no records: an edit needs at least a prompt and a target"
    path = write(tmp_path / "c.yaml", "a: 1")
    assert raised(path) == f"{path}: files of edits end in .json, .jsonl, .csv: rename or convert it"
    path = write(tmp_path / "d.json", '{"prompt": "p", "target": "t"}')
    assert raised(path) == (
        f"{path}: expected a list of records, or a mapping with that list under data, records, edits; found a dict "
        "with the keys 'prompt', 'target': put the records into a list"
    )
    path = write(tmp_path / "e.json", '[{"prompt": "p",\n "target": }]')
    assert raised(path) == f"{path}, line 2: not JSON (Expecting value): mend the file"
    path = write(tmp_path / "f.json", '{"prompt": "p"}\n{"prompt": "q"}\n')
    assert raised(path) == (
        f"{path}, line 2: not JSON (Extra data): mend the file; one object a line belongs into a .jsonl file"
    )
    path = tmp_path / "g.json"
    path.write_bytes('[{"prompt": "é", "target": "t"}]'.encode("latin-1"))
    assert raised(path) == f"{path}: not UTF-8 text (byte 13): save it as UTF-8"


def test_a_broken_line_of_jsonl_is_one_bad_record(tmp_path: Path) -> None:
    good = json.dumps(GOOD["edits"])
    path = write(tmp_path / "f.jsonl", f'{good}\n\n{{"prompt": \n{good}\n')
    message = f"{path}, record 2 (line 3): not JSON (Expecting value at column 12){REST}"
    assert raised(path) == message
    with pytest.warns(UserWarning, match="skipped 1 of 3 records"):
        edits = EditDataset.load(path, on_error="skip")
    assert (len(edits), edits.skipped) == (2, (message,))


def test_csv_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "f.csv", "prompt,target\np,t\nAda, the poet,Bern\n")
    assert raised(path) == f"{path}, record 2 (line 3): 3 cells under 2 column names (a comma without quotes?){REST}"
    path = write(tmp_path / "g.csv", "prompt,prompt\na,b\n")
    assert raised(path) == f"{path}: the column 'prompt' is there twice: rename one of them"
    path = write(tmp_path / "h.csv", 'prompt,target,aliases\np,t,"[""a"", "\n')
    assert raised(path) == (
        f"{path}, record 1: field 'aliases' is not JSON (Expecting value) (expected a JSON list or mapping, or texts "
        f"with | between them){REST}"
    )
    path = write(tmp_path / "i.csv", 'prompt,target\np,"t\n')
    assert raised(path) == f"{path}, line 2: not CSV (unexpected end of data): mend the file"


def test_skipping_counts_warns_once_and_never_ends_empty(tmp_path: Path) -> None:
    records = [GOOD["edits"] if i % 2 else {"prompt": "p", "target": i} for i in range(10)]
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
        f"{path}: none of the 3 records can be read; first: {path}, record 1"
    )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("text", "it is text (expected an Edit): use from_records for dicts"),
        (Edit("", "t"), "prompt is empty (expected text): give it a value"),
        (Edit("p", " "), "target is empty (expected text): give it a value"),
        (Edit("p", 3), "target is a number (expected text): give it a value"),  # pyright: ignore[reportArgumentType]
        (Edit("p", "t", ""), "subject is empty (expected text): give it a value"),
        (Edit("p", "t", aliases=["a"]), "aliases is a list (expected a tuple of texts): wrap it in tuple(...)"),  # pyright: ignore[reportArgumentType]
        (Edit("p", "t", rephrases="abc"), "rephrases is text (expected a tuple of texts): wrap it in tuple(...)"),  # pyright: ignore[reportArgumentType]
        (Edit("p", "t", locality=()), "locality is a list (expected a mapping): use {kind: (Probe, ...)}"),  # pyright: ignore[reportArgumentType]
        (Edit("p", "t", locality={"k": ("q",)}), "locality['k'] is no tuple of Probe: use {kind: (Probe, ...)}"),  # pyright: ignore[reportArgumentType]
        (Edit("p", "t", portability={"k": (Probe(""),)}), "portability['k'][0].prompt is empty (expected text): give it a value"),  # noqa: E501
        (Edit("p", "t", id=4), "id is a number (expected text): give it a value"),  # pyright: ignore[reportArgumentType]
        (Edit("p", "\ud800"), "target has a lone surrogate at 0: mend its encoding"),
    ],
)  # fmt: skip
def test_edits_made_by_hand_are_validated_too(edit: Any, message: str) -> None:
    with pytest.raises(EditError) as caught:
        EditDataset([Edit("p", "t"), edit], name="mine")
    assert str(caught.value) == f"mine, edit 1: {message}"


def test_no_edits() -> None:
    with pytest.raises(EditError, match=r"^mine: there are no edits: give at least one prompt with its target$"):
        EditDataset([], name="mine")
