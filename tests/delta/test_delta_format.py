"""docs/delta_format.md is enough to read a delta: this reader uses only the page, json and hashlib."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from kedit_train import EditDelta

DTYPES = {"F32": "float32", "BF16": "bfloat16", "I32": "int32"}


def test_a_reader_written_from_the_page_verifies_every_hash(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = {"a.weight": torch.randn(4, 6), "b": torch.randn(5, 3).bfloat16(), "c": torch.randn(30)}
    edited = {name: value.clone() for name, value in base.items()}
    edited["a.weight"][:, 2] += 1
    edited["b"] += 1
    content = EditDelta.between(base, edited).save(tmp_path / "edit.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8:start])
    metadata = header.pop("__metadata__")
    text = metadata["kedit_train.delta"]
    digest = hashlib.sha256(text.encode())
    values = {}
    for name in sorted(header):
        first, last = header[name]["data_offsets"]
        values[name] = content[start + first : start + last]
        digest.update(f"\n{name} {DTYPES[header[name]['dtype']]} {header[name]['shape']} ".encode() + values[name])
    assert digest.hexdigest() == metadata["kedit_train.delta.sha256"]
    meta = json.loads(text)
    assert meta["format"] == 1
    assert {name: entry["layout"] for name, entry in meta["tensors"].items()} == {"a.weight": "columns", "b": "dense"}
    whole = hashlib.sha256(b"bfloat16 [5, 3]\n" + values["before/b"]).hexdigest()
    assert meta["tensors"]["b"]["base"] == whole
    hashes = {whole, meta["tensors"]["a.weight"]["base"]}
    hashes.add(hashlib.sha256(b"float32 [30]\n" + base["c"].numpy().tobytes()).hexdigest())
    assert meta["base"]["fingerprint"] == hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest()
