"""The file of K-FAC factors: what it returns, and for which models, texts and labels it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kedit_train.core.drift.kfac import KFACFactors
from kedit_train.core.drift.kfac_file import load_factors, save_factors
from kedit_train.core.drift.second_moments import SecondMoment
from kedit_train.errors import EditError
from kedit_train.safetensors_file import save_tensors
from kedit_train.safetensors_header import read_header

WEIGHTS = {"w": torch.zeros(2, 3)}
OPTIONS: dict[str, Any] = {"model": "a fingerprint", "sequences": [[1, 2], [3]], "seed": 0}


def factors(inputs: torch.Tensor | None = None) -> KFACFactors:
    first = torch.arange(9.0).reshape(3, 3) if inputs is None else inputs
    return KFACFactors({"w": SecondMoment(first, 5)}, {"w": SecondMoment(torch.eye(2), 4)})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "factors.safetensors"
    save_factors(path, factors(), **OPTIONS)
    return path


def test_factors_are_read_as_they_were_written(path):
    loaded = load_factors(path, WEIGHTS, **OPTIONS)
    assert loaded is not None
    assert torch.equal(loaded.inputs["w"].sum, factors().inputs["w"].sum)
    assert torch.equal(loaded.gradients["w"].sum, torch.eye(2))
    assert (loaded.inputs["w"].count, loaded.gradients["w"].count) == (5, 4)
    assert [file.name for file in path.parent.iterdir()] == ["factors.safetensors"]


def test_a_missing_file_is_none(tmp_path):
    assert load_factors(tmp_path / "factors.safetensors", WEIGHTS, **OPTIONS) is None


@pytest.mark.parametrize(
    ("change", "subject"),
    [({"model": "another"}, "weights"), ({"sequences": [[1, 2]]}, "texts"), ({"seed": 1}, "texts")],
)
def test_another_model_other_texts_and_another_seed_are_refused(path, change, subject):
    with pytest.raises(EditError, match=f"does not fit this run: .* with other {subject}.* use another path"):
        load_factors(path, WEIGHTS, **{**OPTIONS, **change})


@pytest.mark.parametrize(
    "weights", [{"w": torch.zeros(2, 4)}, {"other": torch.zeros(2, 3)}], ids=["another size", "a missing weight"]
)
def test_factors_that_do_not_fit_the_weights_are_refused(path, weights):
    unfit = r"has no valid factor 'inputs/.*delete the file to compute the factors again"
    other_scope = (
        r"has no statistics of the parameter 'other', because it was written for another scope; use another path"
    )
    with pytest.raises(EditError, match=other_scope if "other" in weights else unfit):
        load_factors(path, weights, **OPTIONS)


def test_factors_that_are_not_finite_are_refused(path):
    save_factors(path, factors(torch.full((3, 3), float("nan"))), **OPTIONS)
    with pytest.raises(EditError, match="has no valid factor 'inputs/w'"):
        load_factors(path, WEIGHTS, **OPTIONS)


def test_a_truncated_file_is_refused(path):
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(EditError, match=r"factors_path=.* cannot be used: .*; use another path, or delete the file"):
        load_factors(path, WEIGHTS, **OPTIONS)


def test_a_file_without_a_checksum_as_older_versions_wrote_is_refused(path):
    save_file({"inputs/w": torch.eye(3)}, path, metadata={"weights": "a", "texts": "b", "tokens": "{}"})
    with pytest.raises(EditError, match=r"factors_path=.* cannot be used: .*; use another path, or delete the file"):
        load_factors(path, WEIGHTS, **OPTIONS)


@pytest.mark.parametrize("metadata", [None, [], {}, {"tokens": 3}, {"tokens": {}}, {"tokens": {"inputs/w": "5"}}])
def test_metadata_of_the_wrong_type_is_refused(path, metadata):
    tensors = {"inputs/w": torch.eye(3), "gradients/w": torch.eye(2)}
    fingerprints = json.loads(read_header(path)[1]["kedit_train.kfac_factors"])
    if isinstance(metadata, dict):
        metadata = {**fingerprints, "tokens": None, **metadata}
    save_tensors(path, tensors, metadata, kind="kedit_train.kfac_factors")
    with pytest.raises(EditError, match=r"factors_path=.*; (use another path, or )?delete the file") as error:
        load_factors(path, WEIGHTS, **OPTIONS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", [-1, -40, 200])
def test_a_changed_byte_is_noticed(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(EditError, match=r"factors_path=.* cannot be used: .*; use another path, or delete the file"):
        load_factors(path, WEIGHTS, **OPTIONS)
