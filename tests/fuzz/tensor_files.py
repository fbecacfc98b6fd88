"""Fuzzers of safetensors files: deltas, masks, K-FAC factors and states."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from fuzz.harness import Fuzzer, use_or_refuse
from fuzz.mutations import mutated
from safetensors.torch import load
from torch import Tensor

from kedit_train import EditDelta
from kedit_train.cli.kedit.show import describe
from kedit_train.core.drift.kfac import KFACFactors
from kedit_train.core.drift.kfac_file import load_factors, save_factors
from kedit_train.core.drift.second_moments import SecondMoment
from kedit_train.core.scope.mask_file import load_masks, save_masks
from kedit_train.core.state_file import load_state, save_state
from kedit_train.delta.bitwise import same_bits

WEIGHTS = {"w": torch.zeros(2, 3), "v": torch.zeros(4, 2)}
FACTORS: dict[str, Any] = {"model": "a fingerprint", "sequences": [[1, 2], [3]], "seed": 0}


def base_weights() -> dict[str, Tensor]:
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
    """Do everything that the commands do with a delta. Each of these uses may raise an EditError."""
    delta = EditDelta.load(path)
    stored = load(path.read_bytes())
    for name, change in delta.changes.items():
        for kind in ("before", "after"):
            assert same_bits(getattr(change, kind), stored[f"{kind}/{name}"]), f"{kind}/{name} is not that of the file"
    base = base_weights()
    for use in (delta.verify, lambda weights: delta.verify(weights, full=True), delta.apply, delta.revert):
        use_or_refuse(lambda use=use: use(base))
    for name, value in base_weights().items():
        assert same_bits(base[name], value), f"apply and revert changed {name}"
    use_or_refuse(lambda: (0.5 * delta).delta() if small(delta) else None)
    rows = [describe(name, change) for name, change in delta.changes.items() if change.nbytes < 1 << 20]
    delta.save(path.with_name("again.safetensors"))
    return [rows, delta.meta, repr(delta), {name: value.tolist() for name, value in sorted(stored.items())}]


def small(delta: EditDelta) -> bool:
    return all(torch.Size(change.shape).numel() < 1 << 20 for change in delta.changes.values())


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
    state = load_state(path.parent)
    assert isinstance(state, dict)
    return state


def checksum_of(path: Path, kind: str) -> Any:
    """Return the checksum in the header of a file, or None if the file cannot be read."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header.get("__metadata__", {}).get(f"kedit_train.{kind}.sha256")


def fuzzer_of_tensors(kind: str, file: str, write: Callable[[Path], None], read: Callable[[Path], Any]) -> Fuzzer:
    """Return the fuzzer of one kind of safetensors file."""

    @cache
    def original() -> tuple[bytes, str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / file
            write(path)
            return path.read_bytes(), repr(read(path)), checksum_of(path, kind)

    def use(path: Path) -> bool:
        found, (_, expected, checksum) = repr(read(path)), original()
        assert found == expected or checksum_of(path, kind) != checksum, "the checksum is right, but not the content"
        return found == expected

    def make(draw: random.Random) -> bytes:
        return mutated(original()[0], f"kedit_train.{kind}", draw)

    return Fuzzer(kind, file, make, use, refused=0.4)


FILES: tuple[tuple[str, str, Callable[[Path], None], Callable[[Path], Any]], ...] = (
    ("delta", "edit.safetensors", write_delta, read_delta),
    ("mask", "mask.safetensors", write_masks, read_masks),
    ("kfac_factors", "factors.safetensors", write_factors, read_factors),
    ("state", "kedit_state.safetensors", write_state, read_state),
)
TENSORS = {kind: fuzzer_of_tensors(kind, file, write, read) for kind, file, write, read in FILES}
