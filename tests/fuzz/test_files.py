"""A mutated delta, mask, K-FAC file or state raises a one-line error, or is read as usable values.

Each kind of file is fuzzed for about one second. For longer runs by hand, set ``KEDIT_FUZZ_SECONDS=600``.
A failure prints the seed of the mutated file; ``KEDIT_FUZZ_SEED`` starts with that seed.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz.mutations import mutated

from kedit_train import EditDelta, EditError
from kedit_train.cli.kedit.show import describe
from kedit_train.core.drift.kfac import KFACFactors
from kedit_train.core.drift.kfac_file import load_factors, save_factors
from kedit_train.core.drift.second_moments import SecondMoment
from kedit_train.core.scope.mask_file import load_masks, save_masks
from kedit_train.core.state_file import load_state, save_state

SECONDS = float(os.environ.get("KEDIT_FUZZ_SECONDS", "4")) / 4
SEED = int(os.environ.get("KEDIT_FUZZ_SEED", "0"))
# The maximum time in seconds to read one file, because a small file must not take long to read.
LIMIT = 5.0
WEIGHTS = {"w": torch.zeros(2, 3), "v": torch.zeros(4, 2)}
FACTORS: dict[str, Any] = {"model": "a fingerprint", "sequences": [[1, 2], [3]], "seed": 0}


def base_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (4, 6), "b": (5, 3), "c": (9,), "d": (6, 4)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return weights | {"b": weights["b"].bfloat16()}


def write_delta(path: Path) -> None:
    base = base_weights()
    edited = {name: value.clone() for name, value in base.items()}
    edited["a.weight"][:, 2] += 1
    edited["b"] += 1
    edited["c"][4] += 1
    edited["d"][[1, 5]] += 1
    parents = {"parents": [{"hash": None, "count": 1, "parents": []}]}
    delta = EditDelta.between(base, edited, scores={"edit/reliability": 0.5}, configuration={"step": 1})
    delta.meta["edits"] |= parents
    delta.save(path)


def read_delta(path: Path) -> Any:
    delta = EditDelta.load(path)
    # Do everything that the commands do with a delta. Each of these uses may raise an EditError.
    for use in (delta.verify, lambda weights: delta.verify(weights, full=True), delta.apply):
        use_or_refuse(lambda use=use: use(base_weights()))
    use_or_refuse(lambda: (0.5 * delta).delta() if small(delta) else None)
    rows = [describe(name, change) for name, change in delta.changes.items() if change.nbytes < 1 << 20]
    delta.save(path.with_name("again.safetensors"))
    return [rows, delta.meta, repr(delta)]


def small(delta: EditDelta) -> bool:
    return all(torch.Size(change.shape).numel() < 1 << 20 for change in delta.changes.values())


def use_or_refuse(use: Callable[[], Any]) -> None:
    try:
        use()
    except EditError as error:
        check_message(error)


def write_masks(path: Path) -> None:
    masks = {name: torch.arange(weight.numel()).reshape(weight.shape) % 2 == 0 for name, weight in WEIGHTS.items()}
    save_masks(path, masks, "a fingerprint")


def read_masks(path: Path) -> Any:
    masks = load_masks(path, {name: weight.shape for name, weight in WEIGHTS.items()}, lambda masks: "a fingerprint")
    return {name: mask.tolist() for name, mask in masks.items()}


def write_factors(path: Path) -> None:
    inputs = {name: SecondMoment(torch.eye(weight.shape[1]) * 3, 5) for name, weight in WEIGHTS.items()}
    gradients = {name: SecondMoment(torch.eye(weight.shape[0]), 4) for name, weight in WEIGHTS.items()}
    save_factors(path, KFACFactors(inputs, gradients), **FACTORS)


def read_factors(path: Path) -> Any:
    factors = load_factors(path, WEIGHTS, **FACTORS)
    assert factors is not None
    return [[m.mean.tolist() for m in moments.values()] for moments in (factors.inputs, factors.gradients)]


def write_state(path: Path) -> None:
    state = {"format": 2, "step": 3, "reference": {"w": torch.ones(2)}, "callbacks": {"NormBall.0": {"radius": 0.5}}}
    save_state(path.parent, state)


def read_state(path: Path) -> Any:
    return load_state(path.parent)


FILES: dict[str, tuple[str, Callable[[Path], None], Callable[[Path], Any]]] = {
    "delta": ("edit.safetensors", write_delta, read_delta),
    "mask": ("mask.safetensors", write_masks, read_masks),
    "kfac_factors": ("factors.safetensors", write_factors, read_factors),
    "state": ("kedit_state.safetensors", write_state, read_state),
}


def check_message(error: EditError) -> None:
    message = str(error)
    assert "\n" not in message, f"more than one line: {message!r}"
    assert len(message) < 3000, f"{len(message)} characters: {message[:300]!r}"


@pytest.mark.filterwarnings("ignore:.*was made for another model:UserWarning")
@pytest.mark.parametrize("kind", FILES)
def test_mutated_files_are_refused_in_one_line_or_can_be_used(tmp_path: Path, kind: str) -> None:
    name, write, read = FILES[kind]
    path = tmp_path / name
    write(path)
    content, expected = path.read_bytes(), repr(read(path))
    end, seed, refused, equal = time.monotonic() + SECONDS, SEED, 0, 0
    while time.monotonic() < end or seed < SEED + 20:
        # A state with a valid checksum is trusted: it is in a checkpoint folder, next to pickles of the trainer.
        reseal = kind != "state"
        path.write_bytes(mutated(content, f"kedit_train.{kind}", random.Random(seed), reseal=reseal))
        began = time.monotonic()
        try:
            equal += repr(read(path)) == expected
        except EditError as error:
            check_message(error)
            refused += 1
        except BaseException as error:
            raise AssertionError(f"KEDIT_FUZZ_SEED={seed} raised {type(error).__name__}: {error}") from error
        assert time.monotonic() - began < LIMIT, f"KEDIT_FUZZ_SEED={seed} took more than {LIMIT} seconds"
        seed += 1
    files = seed - SEED
    assert refused > 0.4 * files
    assert refused + equal > 0.5 * files
