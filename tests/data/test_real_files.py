"""The published files are read completely."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kedit_train.data import EditDataset
from kedit_train.errors import EditError


def test_counterfact_is_read_completely(shared: Path) -> None:
    path = shared / "data/counterfact/counterfact_10k.json"
    edits = EditDataset.load(path)
    assert (len(edits), edits.format, edits.skipped) == (10_000, "counterfact", ())
    assert [edit.id for edit in edits] == [str(i) for i in range(10_000)]
    assert all(edit.rephrases and edit.old_target and edit.subject for edit in edits)
    assert all(len(edit.locality["neighborhood"]) == 1 for edit in edits)
    assert EditDataset.load(path, limit=7).hash == edits[:7].hash


def test_zsre_has_two_records_without_a_target(shared: Path) -> None:
    path = shared / "data/zsre_mend_1k.json"
    advice = 'correct the record, or pass on_error="skip" to leave out records with errors'
    reason = f"must be text, got an empty string; {advice}"
    with pytest.raises(EditError) as caught:
        EditDataset.load(path)
    assert str(caught.value) == f"{path}, record 535: field 'alt' {reason}"
    with pytest.warns(UserWarning, match="skipped 2 of 1000 records; the first reason: .*record 535: "):
        edits = EditDataset.load(path, on_error="skip")
    assert (len(edits), edits.format) == (998, "zsre")
    assert edits.skipped == tuple(f"{path}, record {n}: field 'alt' {reason}" for n in (535, 724))
    questions = [edit.locality["natural_questions"][0].prompt for edit in edits]
    assert all(text.endswith("?") and not text.startswith("nq ") for text in questions)
    raw = [record for record in json.loads(path.read_text()) if record["alt"].strip()]
    assert [edit.target for edit in edits] == [record["alt"].strip() for record in raw]
    assert [edit.old_target for edit in edits] == [record["answers"][0] for record in raw]


@pytest.mark.parametrize(
    ("file", "count", "kinds"),
    [
        ("zsre_test_all.json", 1304, {"Reasoning": 771, "Logical_Generalization": 269, "Subject_Aliasing": 264}),
        ("wiki_recent_train.json", 570, {"Reasoning": 476, "Logical_Generalization": 223, "Subject_Aliasing": 52}),
    ],
)
def test_knowedit_is_read_completely(shared: Path, file: str, count: int, kinds: dict[str, int]) -> None:
    edits = EditDataset.load(shared / "data/knowedit" / file)
    assert (len(edits), edits.format, edits.skipped) == (count, "knowedit", ())
    found = {kind: sum(len(edit.portability.get(kind, ())) for edit in edits) for kind in kinds}
    assert found == kinds
    raw = json.loads((shared / "data/knowedit" / file).read_text())
    for record, edit in zip(raw, edits, strict=True):
        questions = [item["prompt"] for items in record["locality"].values() for item in items]
        assert [probe.prompt for probes in edit.locality.values() for probe in probes] == questions


def test_the_records_of_factlm_are_read_completely(factlm: Path) -> None:
    edits = EditDataset.load(factlm / "records.json")
    assert (len(edits), edits.format, edits.skipped) == (1600, "counterfact", ())
    raw = json.loads((factlm / "records.json").read_text())
    assert [list(edit.rephrases) for edit in edits] == [record["rephrase_prompts"] for record in raw]
