"""Contradictory, repeated and invisible edits, and JSON that Python cannot read, are reported in one line."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from kedit_train import world
from kedit_train.data import Edit, EditDataset
from kedit_train.data.contradictions import contradictions, duplicates, without_overwritten
from kedit_train.data.leaks import LeakCheck
from kedit_train.errors import EditError

CONTRADICTORY = [
    {"prompt": "Ada lives in", "target": "Bern", "id": "a"},
    {"prompt": "Ben lives in", "target": "Bern"},
    {"prompt": " ada  LIVES in", "target": "Rome", "id": "b"},
]
LINE = (
    "records: edits 1 (id 'a') and 3 (id 'b') give the prompt 'Ada lives in' two targets, 'Bern' and 'Rome', but a "
    "prompt must have only one target in a run; remove one of the edits, add the target of one edit to the aliases of "
    "the other, or call latest() on the dataset to keep the last edit of each prompt"
)
SKIP = 'correct the record, or pass on_error="skip" to leave out records with errors'
UNREADABLE = {
    "nested": ('{"prompt": "p", "target": ' + "[" * 100_000 + "]" * 100_000 + "}", "it is nested too deeply"),
    "digits": ('{"prompt": "p", "target": "t", "id": ' + "9" * 5000 + "}", "a number has too many digits"),
    "twice": ('{"prompt": "p", "target": "t", "target": "u"}', "the key 'target' appears twice in one mapping"),
}


def test_contradictory_edits_are_loaded_but_not_trained_together() -> None:
    edits, tokenizer = EditDataset.from_records(CONTRADICTORY), world.load()[1]
    for train in (lambda: edits.encode(tokenizer), edits.to_prompt_completion):
        with pytest.raises(EditError) as error:
            train()
        assert str(error.value) == LINE
    assert [edit.target for edit in edits.latest()] == ["Bern", "Rome"]
    edits.latest().check_trained_together()


@pytest.mark.parametrize(
    "prompt",
    ["Cafe\u0301 Ada is in", "Ｃafé Ada is in", "Café\u200b A\u00adda is\u00a0in", "CAFÉ\ufe0f ada\u3000IS in"],
)
def test_prompts_that_look_the_same_contradict(prompt: str) -> None:
    first, second = Edit("Café Ada is in", "Bern"), Edit(prompt, "Rome")
    with pytest.raises(EditError, match="two targets, 'Bern' and 'Rome', but a prompt must have only one"):
        EditDataset([first, second]).check_trained_together()
    assert list(EditDataset([first, second]).latest()) == [second]
    assert LeakCheck([first]).contains_prompt(f"The {prompt} Rome.")


def test_a_rephrase_that_is_another_prompt_contradicts() -> None:
    one, other = Edit("Ada lives in", "Bern", rephrases=("Home of Ada:",)), Edit("home of  ADA:", "Rome")
    for edits in ([one, other], [other, one]):
        with pytest.raises(EditError, match=r"^edits: edits 1 and 2 give the prompt 'home of ADA:' two targets"):
            EditDataset(edits).check_trained_together()
        assert list(EditDataset(edits).latest()) == edits[1:]
    EditDataset([one, replace(other, target="bern")]).check_trained_together()
    EditDataset([one, replace(one, prompt="Ben lives in", target="Rome")]).check_trained_together()


def test_thousands_of_edits_with_one_prompt_are_checked_in_linear_time() -> None:
    edits = [Edit("Ada lives in", str(n), rephrases=("Ada lives in", "Ada's home:")) for n in range(1000)]
    began = time.monotonic()
    assert len(contradictions(edits)) == 999
    assert without_overwritten(edits) == [999]
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "other",
    [
        Edit("Ada lives in Bern", "today"),
        Edit("ada lives in", "bern"),
        Edit("Ada lives in", "Berne", aliases=("Bern",)),
        Edit("Ada lives in", "The city of Bern"),
        Edit("Ada lives at", "Rome"),
    ],
)
def test_other_spellings_and_aliases_do_not_contradict(other: Edit) -> None:
    EditDataset([Edit("Ada lives in", "Bern", aliases=("the city of  Bern",)), other]).check_trained_together()


def test_the_number_of_contradictions_is_counted() -> None:
    edits = EditDataset([Edit("Ada lives in", city) for city in ("Bern", "Rome", "Paris")])
    with pytest.raises(
        EditError, match=r"^edits: edits 1 and 2 give .* In total, 2 edits contradict an earlier edit\.$"
    ):
        edits.check_trained_together()


def test_repeated_edits_are_kept_and_counted_in_a_warning() -> None:
    records = [{"prompt": "p", "target": "t", "id": str(i)} for i in range(3)]
    with pytest.warns(UserWarning, match="repeat") as caught:
        edits = EditDataset.from_records([*records, {"prompt": "p", "target": "t", "rephrases": ["r"]}])
    assert len(edits) == 4
    assert [str(one.message) for one in caught] == [
        "records: 2 of 4 edits repeat an earlier edit (edit 2 is the same as edit 1); repeated edits are kept and "
        "count again in training and in scores; if this is not intended, remove the repeated edits"
    ]


def test_edits_that_look_the_same_are_repeated() -> None:
    one = Edit("Ada lives in", "Zürich", id="1")
    others = [
        Edit("Ada\u200b lives  in", "Zu\u0308rich"),
        Edit("ada lives in", "Zürich"),
        Edit("Ada lives in", "Ｚürich"),
    ]
    assert duplicates([one, *others]) == [(0, 1), (0, 3)]


@pytest.mark.parametrize("field", ["prompt", "target"])
@pytest.mark.parametrize("text", ["\u200b", "\u200d \ufeff", "\u3164", "\x00\x1b", "\u2800\ufe0f"])
def test_invisible_texts_are_refused_and_can_be_skipped(field: str, text: str) -> None:
    good, bad = {"prompt": "p", "target": "t"}, {"prompt": "q", "target": "u", field: text}
    with pytest.raises(EditError) as error:
        EditDataset.from_records([good, bad])
    assert str(error.value) == f"records, record 2: field '{field}' must be text, got only invisible characters; {SKIP}"
    with pytest.raises(EditError, match=f"^edits, edit 1: {field} must be text, got only invisible characters"):
        EditDataset([Edit(**bad)])
    with pytest.warns(UserWarning, match="skipped 1 of 2 records"):
        assert len(EditDataset.from_records([good, bad], on_error="skip")) == 1


@pytest.mark.parametrize("text", ["é", "日本", "🙂", "\u200bBern", "-", "\ue000", "ِ"])
def test_visible_texts_are_accepted(text: str) -> None:
    assert EditDataset.from_records([{"prompt": "p", "target": text}])[0].target == text


def test_a_lone_surrogate_can_be_skipped() -> None:
    records = [{"prompt": "p", "target": "t"}, {"prompt": "q", "target": "\ud800"}]
    with pytest.warns(UserWarning, match="record 2: target must be valid Unicode"):
        assert len(EditDataset.from_records(records, on_error="skip")) == 1


@pytest.mark.parametrize("name", UNREADABLE)
def test_json_that_python_cannot_read_is_one_line(tmp_path: Path, name: str) -> None:
    text, reason = UNREADABLE[name]
    whole, lines, cells = tmp_path / "a.json", tmp_path / "a.jsonl", tmp_path / "a.csv"
    whole.write_text(f"[{text}]")
    with pytest.raises(EditError) as error:
        EditDataset.load(whole)
    assert str(error.value) == f"{whole}: the file is not valid JSON ({reason}); correct the file"
    lines.write_text('{"prompt": "Ada lives in", "target": "Bern"}\n' + text + "\n")
    with pytest.raises(EditError) as error:
        EditDataset.load(lines)
    assert str(error.value) == f"{lines}, record 2 (line 2): the line is not valid JSON ({reason}); {SKIP}"
    with pytest.warns(UserWarning, match="skipped 1 of 2 records"):
        assert len(EditDataset.load(lines, on_error="skip")) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cells.write_text("prompt,target,locality\np,t," + json.dumps(text).replace('\\"', '""') + "\n")
        with pytest.raises(EditError, match=r"a\.csv"):
            EditDataset.load(cells)


def test_records_that_are_no_list_are_one_line() -> None:
    with pytest.raises(EditError, match=r"^EditDataset: records must be a list of dicts or a datasets\.Dataset, got a"):
        EditDataset.from_records(3)  # type: ignore[arg-type]
