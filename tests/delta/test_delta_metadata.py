"""What a delta records about edits and library versions."""

from __future__ import annotations

import torch

from kedit_train.data import Edit, EditDataset
from kedit_train.delta.metadata import describe_edits, library_versions


def test_edits_are_described_by_hash_and_count() -> None:
    edits = [Edit("The capital of Ruritania is", "Strelsau"), Edit("The river of Ruritania is", "Rura")]
    assert describe_edits(edits) == describe_edits(EditDataset(edits))
    assert describe_edits(edits)["count"] == 2
    assert describe_edits(edits) != describe_edits(edits[:1] * 2)


def test_versions_name_the_libraries() -> None:
    assert library_versions()["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
