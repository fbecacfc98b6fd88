"""A malformed record is reported in one line: file, record, field, what was expected, what was read, what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kedit_train.data import Edit, EditDataset
from kedit_train.errors import EditError

# The good records of these files are the same record.
pytestmark = pytest.mark.filterwarnings("ignore:.*repeat an earlier edit:UserWarning")
REST = '; correct the record, or pass on_error="skip" to leave out records with errors'
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
    "documents": {"title": "p", "text": "t", "questions": [{"prompt": "q", "answers": ["a"]}]},
    "unkebench": {"question": "p", "answer": "t", "sub_question": ["q"], "sub_answer": ["a"]},
    "akew": {
        "requested_rewrite": {
            "prompt": "{} is", "subject": "S", "target_new": {"str": "t"}, "question": "p", "fact_new_uns": "text",
            "unsfact_triplets_GPT": [{"subject": "S", "prompt": "{} has", "target": "a"}],
        },
    },
    "leme": {
        "requested_rewrite": {"prompt": "{} is", "subject": "S", "target_new": {"str": "t"}},
        "dependancies": {"subject_entity": {"dependant_prompt": "essay"}, "coupled_entities": []},
    },
    "rippleedits": {
        "edit": {"prompt": "The gender of S is t."},
        "Forgetfulness": [{"test_queries": [{"prompt": "q", "answers": [{"value": "a", "aliases": []}]}]}],
    },
    "uniedit": {"edit": {"prompt": "p", "target": "t"}, "locality": {"a": {"loc_type": "none", "prompt": "q", "target": "a"}}},  # noqa: E501
    "hallueditbench": {"question": "p", "object": "t", "question_2hop": "q", "answer_2hop": "a"},
}  # fmt: skip


def changed(name: str, change: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the good record with the values at dotted paths replaced. The value ``...`` removes a field."""
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
    ("edits", {"target": ...}, "field 'target' must be text, but is missing"),
    ("edits", {"target": None}, "field 'target' must be text, got null"),
    ("edits", {"target": " \n"}, "field 'target' must be text, got empty text"),
    ("edits", {"target": 1984}, "field 'target' must be text, got a number"),
    ("edits", {"target": ["t"]}, "field 'target' must be text, got a list"),
    ("edits", {"prompt": ""}, "field 'prompt' must be text, got empty text"),
    ("edits", {"subject": 3}, "field 'subject' must be text, got a number"),
    ("edits", {"aliases": [1]}, "field 'aliases[0]' must be text, got a number"),
    ("edits", {"rephrases": ["r", ""]}, "field 'rephrases[1]' must be text, got empty text"),
    ("edits", {"rephrases": {"a": 1}}, "field 'rephrases' must be text or a list of texts, got a mapping"),
    ("edits", {"id": 1.5}, "field 'id' must be text or a whole number, got a number"),
    (
        "edits",
        {"locality": {"near": [3]}},
        'field \'locality.near[0]\' must be text or {"prompt": ..., "answers": [...]}, got a number',
    ),
    ("edits", {"locality": [{"answers": ["a"]}]}, "field 'locality[0].prompt' must be text, but is missing"),
    (
        "edits",
        {"portability": 5},
        "field 'portability' must be a list of questions, or a mapping from kinds to such lists, got a number",
    ),
    ("counterfact", {"target_new": ...}, "field 'target_new' must be text, but is missing"),
    ("counterfact", {"ground_truth": 5}, "field 'ground_truth' must be text or a list of texts, got a number"),
    ("counterfact", {"rephrase_prompt": True}, "field 'rephrase_prompt' must be text or a list of texts, got a boolean"),  # noqa: E501
    ("counterfact", {"locality_ground_truth": "a"}, "field 'locality_prompt' must be text, but is missing"),
    ("zsre", {"alt": ""}, "field 'alt' must be text, got empty text"),
    ("zsre", {"src": ...}, "field 'src' must be text, but is missing"),
    ("zsre", {"answers": ["a", None]}, "field 'answers[1]' must be text, got null"),
    ("knowedit", {"target_new": float("nan")}, "field 'target_new' must be text, got a number"),
    ("knowedit", {"locality": []}, "field 'locality' must be a mapping, got an empty list"),
    ("knowedit", {"locality.k": "q"}, "field 'locality.k' must be a list of mappings, got text"),
    ("knowedit", {"locality.k.0": "q"}, "field 'locality.k[0]' must be a mapping, got text"),
    ("knowedit", {"locality.k.0.prompt": ...}, "field 'locality.k[0].prompt' must be text, but is missing"),
    (
        "knowedit",
        {"locality.k.0.ground_truth": [["a"], ["b", 4]]},
        "field 'locality.k[0].ground_truth[1][1]' must be text, got a number",
    ),
    ("qaedit", {"locality.0.loc": None}, "field 'locality[0].loc' must be text, got null"),
    ("qaedit", {"locality": "x"}, "field 'locality' must be a list of mappings, got text"),
    ("wikibigedit", {"ans": ..., "mhop": "q"}, "field 'target_new' or 'ans' must be text, but is missing"),
    ("wikibigedit", {"mhop_ans": "a"}, "field 'mhop' must be text, but is missing"),
    (
        "counterfact_nested",
        {"requested_rewrite.prompt": "It is"},
        "field 'requested_rewrite.prompt' must be text with {} in the place of the subject, "
        'such as "The mother tongue of {} is", got "It is"',
    ),
    ("counterfact_nested", {"requested_rewrite.subject": ...}, "field 'requested_rewrite.subject' must be text, but is missing"),  # noqa: E501
    (
        "counterfact_nested",
        {"requested_rewrite.target_new": "t"},
        "field 'requested_rewrite.target_new' must be a mapping, got text",
    ),
    (
        "counterfact_nested",
        {"requested_rewrite.target_new": {"id": "Q1"}},
        "field 'requested_rewrite.target_new.str' must be text, but is missing",
    ),
    ("mquake", {"requested_rewrite": []}, "field 'requested_rewrite' must be a list of mappings, got an empty list"),
    ("mquake", {"requested_rewrite": ...}, "field 'requested_rewrite' must be a list of mappings, but is missing"),
    ("mquake", {"requested_rewrite.0.target_new": ...}, "field 'requested_rewrite[0].target_new' must be a mapping, but is missing"),  # noqa: E501
    ("mquake", {"new_answer": ...}, "field 'new_answer' must be text, but is missing"),
    ("documents", {"text": " "}, "field 'text' must be text, got empty text"),
    ("documents", {"questions.0.prompt": ...}, "field 'questions[0].prompt' must be text, but is missing"),
    ("unkebench", {"answer": ...}, "field 'answer' must be text, but is missing"),
    ("unkebench", {"sub_answer": []}, "field 'sub_answer' must be 1 answers, one for each sub_question, got 0"),
    ("akew", {"requested_rewrite.fact_new_uns": ""}, "field 'requested_rewrite.fact_new_uns' must be text, got empty text"),  # noqa: E501
    (
        "akew",
        {"requested_rewrite.unsfact_triplets_GPT.0.target": None},
        "field 'requested_rewrite.unsfact_triplets_GPT[0].target' must be text, got null",
    ),
    ("leme", {"dependancies.subject_entity": "S"}, "field 'dependancies.subject_entity' must be a mapping, got text"),
    (
        "rippleedits",
        {"edit.prompt": "S became t."},
        'field \'edit.prompt\' must be a sentence with the target after "is", "are" or "follows", got S became t',
    ),
    ("rippleedits", {"Forgetfulness": {}}, "field 'Forgetfulness' must be a list of mappings, got a mapping"),
    ("uniedit", {"edit.target": 3}, "field 'edit.target' must be text, got a number"),
    ("uniedit", {"locality.a": "q"}, "field 'locality.a' must be a mapping, got text"),
    ("hallueditbench", {"object": 3}, "field 'object' must be text, got a number"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), CASES)
def test_a_bad_record_is_reported_in_one_line(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([GOOD[name], changed(name, change), GOOD[name]]))
    expected = f"{path}, record 2: {message}{REST}"
    with pytest.raises(EditError) as caught:
        EditDataset.load(path)
    assert str(caught.value) == expected
    assert "\n" not in expected
    with pytest.warns(UserWarning, match="skipped") as warned:
        edits = EditDataset.load(path, on_error="skip")
    # The second warning counts the repeated record.
    assert [str(warning.message) for warning in warned][:1] == [
        f"{path}: skipped 1 of 3 records; the first reason: {expected}"
    ]
    assert Path(warned[0].filename) == Path(__file__)
    assert (edits.skipped, len(edits), edits.format) == ((expected,), 2, name)


@pytest.mark.parametrize("name", ["a\nb", "x" * 5000])
def test_names_of_fields_cannot_make_a_message_long(name: str, tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    probe = {"prompt": "q", "answers": []}
    for record in ({"prompt": "p", "target": "t", name: 1}, {name: 1}, {**GOOD["edits"], "locality": {name: [3]}}):
        path.write_text(json.dumps([record, {f"{name}{i}": 1 for i in range(100)}]))
        assert len(raised(path)) < 3000
    path.write_text(json.dumps([{**GOOD["edits"], "locality": {name: [probe]}}]))
    assert list(EditDataset.load(path)[0].locality) == [name]
    path.write_text(json.dumps([{**GOOD["counterfact"], name: 1, **{f"{name}{i}": 1 for i in range(100)}}]))
    with pytest.warns(UserWarning, match="does not read the fields .* and 81 others") as warned:
        EditDataset.load(path)
    assert "\n" not in str(warned[0].message)
    assert len(str(warned[0].message)) < 3000
    path.write_text('[{"%s": 1, "%s": 2}]' % ((json.dumps(name)[1:-1],) * 2))
    assert "appears twice" in raised(path)
    edits = EditDataset([Edit("p", "t", id=name), Edit("p", "u", id=name)])
    for use in (edits.check_trained_together, edits.to_old_targets):
        with pytest.raises(EditError) as caught:
            use()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


def raised(path: Path, **options: Any) -> str:
    with pytest.raises(EditError) as caught:
        EditDataset.load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_an_unknown_field_is_an_error_in_the_format_of_this_package(tmp_path: Path) -> None:
    path = write(tmp_path / "f.json", json.dumps([GOOD["edits"], {**GOOD["edits"], "rephrasing": ["r"]}]))
    assert raised(path) == (
        f"{path}, record 2: unknown field 'rephrasing' (known fields: aliases, id, locality, old_target, portability, "
        "prompt, rephrases, subject, target); rename or remove the field, or pass "
        'on_error="skip" to leave out records with errors'
    )


def test_an_unknown_field_is_a_warning_in_a_public_format() -> None:
    with pytest.warns(UserWarning, match=r"^set: the format counterfact does not read .* 'notes' \(2 records\)$"):
        EditDataset.from_records([{**GOOD["counterfact"], "notes": 1}] * 2, name="set")


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
        raised(path) == f"{path}, record 2 (line 3): the row must have 2 cells, got 3 (quote texts with commas){REST}"
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
