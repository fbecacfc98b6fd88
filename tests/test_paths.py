"""A path that no file can have is one line, before anything is computed or written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kedit_train import EditDataset, EditDelta, load_model
from kedit_train.atomic_write import check_writable, writing
from kedit_train.callbacks import (
    EditMetrics,
    GradientMask,
    LowCurvature,
    PrefixCache,
    ReferenceCache,
    SaveDelta,
    SecondOrderLocality,
    Texts,
)
from kedit_train.core.locality import hidden_state_file
from kedit_train.core.scope.mask_file import load_masks
from kedit_train.core.state_file import save_state
from kedit_train.errors import EditError
from kedit_train.modes.tuning.tuner import _work_folder
from kedit_train.modules import EditDataModule, EditModule

NUL = "a\0b"
USES: dict[str, Callable[[], Any]] = {
    "data module": lambda: EditDataModule(f"{NUL}.jsonl"),
    "dataset, read": lambda: EditDataset.load(f"{NUL}.json"),
    "dataset, written": lambda: EditDataset.load("world", limit=1).save(f"{NUL}.jsonl"),
    "delta, read": lambda: EditDelta.load(f"{NUL}.safetensors"),
    "EditMetrics": lambda: EditMetrics(report_path=NUL),
    "EditModule": lambda: EditModule(save_path=NUL),
    "folder of tune": lambda: _work_folder(NUL).__enter__(),
    "hidden states": lambda: hidden_state_file.create_folder(Path(NUL, "x")),
    "LowCurvature": lambda: LowCurvature(["a"], factors_path=f"{NUL}.safetensors"),
    "mask, read": lambda: load_masks(NUL),
    "mask_path": lambda: GradientMask(mask_path=NUL),
    "model": lambda: load_model(NUL),
    "PrefixCache": lambda: PrefixCache(cache_dir=NUL),
    "ReferenceCache": lambda: ReferenceCache(NUL),
    "SaveDelta": lambda: SaveDelta(f"{NUL}.safetensors"),
    "save_path": lambda: GradientMask(save_path=NUL),
    "SecondOrderLocality": lambda: SecondOrderLocality(["a"], factors_path=f"{NUL}.safetensors"),
    "state, written": lambda: save_state(NUL, {"step": 1}),
    "texts": lambda: Texts(f"{NUL}.txt").check(),
    "writing": lambda: writing(NUL).__enter__(),
    "written later": lambda: check_writable(NUL),
}


@pytest.mark.parametrize("use", USES)
def test_a_path_with_a_nul_character_is_one_line(use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EditError) as error:
        USES[use]()
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        (".", "is a folder; give the path of a file"),
        ("/dev/null", "is not a regular file; give the path of a file"),
        ("nothing.safetensors", "does not exist; check the path"),
    ],
)
def test_a_path_that_is_no_file_is_described(path: str, problem: str) -> None:
    with pytest.raises(EditError, match=rf"^file {path!r} {problem}\.$"):
        EditDelta.load(path)
