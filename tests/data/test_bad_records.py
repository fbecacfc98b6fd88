"""A malformed record is reported in one line: file, record, field, what was expected, what was read, what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data.records import GOOD, REST, raised, write

from kedit_train.data import Edit, EditDataset
from kedit_train.errors import EditError

# The good records of these files are the same record.
pytestmark = pytest.mark.filterwarnings("ignore:.*repeat an earlier edit:UserWarning")


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
    ("edits", {"target": " \n"}, "field 'target' must be text, got only white space"),
    ("edits", {"target": 1984}, "field 'target' must be text, got a number"),
    ("edits", {"target": ["t"]}, "field 'target' must be text, got a list"),
    ("edits", {"prompt": ""}, "field 'prompt' must be text, got an empty string"),
    ("edits", {"subject": 3}, "field 'subject' must be text, got a number"),
    ("edits", {"aliases": [1]}, "field 'aliases[0]' must be text, got a number"),
    ("edits", {"rephrases": ["r", ""]}, "field 'rephrases[1]' must be text, got an empty string"),
    ("edits", {"rephrases": {"a": 1}}, "field 'rephrases' must be text or a list of texts, got a mapping"),
    ("edits", {"id": 1.5}, "field 'id' must be text or a whole number, got a decimal number"),
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
    ("zsre", {"alt": ""}, "field 'alt' must be text, got an empty string"),
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
    ("documents", {"text": " "}, "field 'text' must be text, got only white space"),
    ("documents", {"questions.0.prompt": ...}, "field 'questions[0].prompt' must be text, but is missing"),
    ("unkebench", {"answer": ...}, "field 'answer' must be text, but is missing"),
    ("unkebench", {"sub_answer": []}, "field 'sub_answer' must be a list as long as the list sub_question (length 1), got a list of length 0"),  # noqa: E501
    ("akew", {"requested_rewrite.fact_new_uns": ""}, "field 'requested_rewrite.fact_new_uns' must be text, got an empty string"),  # noqa: E501
    (
        "akew",
        {"requested_rewrite.unsfact_triplets_GPT.0.target": None},
        "field 'requested_rewrite.unsfact_triplets_GPT[0].target' must be text, got null",
    ),
    ("leme", {"dependancies.subject_entity": "S"}, "field 'dependancies.subject_entity' must be a mapping, got text"),
    (
        "rippleedits",
        {"edit.prompt": "S became t."},
        'field \'edit.prompt\' must be a sentence with the target after "is", "are" or "follows", got \'S became t\'',
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


def test_an_unknown_field_is_an_error_in_the_format_of_this_package(tmp_path: Path) -> None:
    path = write(tmp_path / "f.json", json.dumps([GOOD["edits"], {**GOOD["edits"], "rephrasing": ["r"]}]))
    assert raised(path) == (
        f"{path}, record 2: unknown field 'rephrasing', did you mean 'rephrases'? (known fields: aliases, id, "
        "locality, old_target, portability, prompt, rephrases, subject, target); rename or remove the field, or pass "
        'on_error="skip" to leave out records with errors'
    )


def test_an_unknown_field_is_a_warning_in_a_public_format() -> None:
    with pytest.warns(UserWarning, match=r"^set: the format counterfact does not read .* 'notes' \(2 records\)$"):
        EditDataset.from_records([{**GOOD["counterfact"], "notes": 1}] * 2, name="set")
