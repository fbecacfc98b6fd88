"""Study rows of documents that are split into parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest

from kedit_train import world
from kedit_train.augmentation import AugmentationOptions, augmentation, study_rows
from kedit_train.data import Edit
from kedit_train.errors import EditError
from kedit_train.modules import EditDataModule, EditModule

LONG = Edit("The ferry\n\n", "Orla runs the ferry since 1987. It is green.\n\nIt sails at noon.")
PARTS = [Edit(LONG.prompt, LONG.target[:44]), Edit("The ferry (part 2)\n\n", LONG.target[46:])]


@pytest.mark.parametrize(("written", "read"), [([LONG], PARTS), (PARTS, [LONG])])
def test_a_file_is_read_before_and_after_documents_are_split(
    written: list[Edit], read: list[Edit], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def one_question_each(model: Any, tokenizer: Any, documents: Any, *_: Any) -> list[Any]:
        return [(at, "question", [(f"Which color has part {at}?", "ferry")]) for at in range(len(documents))]

    monkeypatch.setattr("kedit_train.augmentation.study.write_texts", one_question_each)
    model, tokenizer = world.load()
    path = tmp_path / "study.jsonl"
    whole = study_rows(model, tokenizer, written, path, verify=lambda row, document: True)
    rows = study_rows(model, tokenizer, read, path)
    assert [row.prompt for row in rows.rows] == [row.prompt for row in whole.rows]
    assert {row.document for row in rows.rows} == {"The ferry"}
    # A row of the whole document is verified with the whole text.
    assert study_rows(model, tokenizer, read, path, verify=lambda row, document: "noon" in document.target) == rows
    for study in (path, whole):
        augment = augmentation(model, tokenizer, read, study=study)
        assert len(augment(read)) == len(whole.rows)
    changed = [*read[:-1], Edit(read[-1].prompt, f"{read[-1].target} It is old.")]
    with pytest.raises(EditError, match="was written for another version of the document 'The ferry'"):
        study_rows(model, tokenizer, changed, path)


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec", "ignore:.*does not have many workers")
def test_a_lightning_run_splits_documents_and_writes_study_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_question_each(model: Any, tokenizer: Any, documents: Any, *_: Any) -> list[Any]:
        return [(at, "question", [(f"Where is part {at}?", "In Bern.")]) for at in range(len(documents))]

    monkeypatch.setattr("kedit_train.augmentation.study.write_texts", one_question_each)
    module = EditModule("world")
    module.model.config.max_position_embeddings = 100
    (tmp_path / "news").mkdir()
    (tmp_path / "news" / "long.txt").write_text("Ada lives in Bern. " * 30)
    (tmp_path / "news" / "short.txt").write_text("Ada lives in Bern.")
    study = tmp_path / "study.jsonl"
    options = AugmentationOptions(study=str(study), study_ratio=0.5)
    data = EditDataModule(str(tmp_path / "news"), augmentation=options, append_eos=False)
    assert len(data.edits) == 2
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet)  # type: ignore[arg-type]
    counts = r"1 of 2 edits of news have more than 100 tokens and were split; there are now \d edits"
    with pytest.warns(UserWarning, match=counts):
        trainer.fit(module, data)
    assert len(data.edits) > 3
    assert data.edits[1].prompt == "long (part 2)\n\n"
    assert {row.target for row in data.added} == {"In Bern."}
    assert len(study.read_text().splitlines()) == 1 + len(data.edits)
    assert "study tokens per document token" in capsys.readouterr().out
