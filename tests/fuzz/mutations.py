"""Mutate safetensors files: bytes, lengths and headers, and also contents with a new, valid checksum."""

from __future__ import annotations

import json
import random
from typing import Any

import torch
from safetensors.torch import load, save

from kedit_train.safetensors_file import checksum

DEEP = "[" * 390 + "]" * 390
NUMBERS = [0, -1, 1, 2**31, 2**63, 10**30, 10**99, -(10**30), 0.5, 1e308, True]
VALUES: list[Any] = [
    None,
    "",
    "x",
    "\ud800",
    "a\nb",
    "\x1b[31m",
    [],
    {},
    [[]],
    {"a": {}},
    "9" * 64,
    json.loads(DEEP),
    *NUMBERS,
]
SHAPES: list[Any] = [[], [0], [-1], [2**62, 4], [1.5], "x", [True], None, [1] * 65, [10**30], [0, 2**40, 2**40], 3]
OFFSETS: list[Any] = [[0, 2**62], [8, 0], [0], None, [-8, 0], [0, 10**99], ["0", "8"], [0.0, 8.0], {}]
TEXTS = ["", "{}", "[" * 100_000, DEEP, "null", "3", '{"a": ' + "9" * 5000 + "}", "{" * 9, '"\\ud800"', "NaN", "\x00"]


def mutated(content: bytes, kind: str, draw: random.Random, *, reseal: bool = True) -> bytes:
    """Return a mutation of a safetensors file of ``kind``.

    If ``reseal`` is true, about a third of the mutated files have a valid checksum, computed after the mutation.
    """
    act = draw.randrange(6)
    if act < 2 and reseal:
        return _resealed(content, kind, draw)
    if act < 4:
        return _with_header(content, draw)
    return _with_bytes(content, draw)


def _with_bytes(content: bytes, draw: random.Random) -> bytes:
    data, header = bytearray(content), 8 + int.from_bytes(content[:8], "little")
    for _ in range(draw.choice([1, 1, 1, 4])):
        place = draw.randrange(max(1, min(len(data), header if draw.random() < 0.7 else len(data))))
        act = draw.randrange(6)
        if act == 0 and data:
            data[place] ^= 1 << draw.randrange(8)
        elif act == 1 and data:
            data[place] = draw.choice(b'0123456789-"[]{},:\\ abcef')
        elif act == 2:
            del data[place:]
        elif act == 3:
            del data[place : place + draw.randrange(1, 9)]
        elif act == 4:
            data[place:place] = draw.randbytes(draw.randrange(1, 9))
        else:
            data[:8] = draw.choice([0, 2**63, header, len(data), 99_999_999, draw.randrange(2**40)]).to_bytes(
                8, "little"
            )
    return bytes(data)


def _with_header(content: bytes, draw: random.Random) -> bytes:
    """Replace a value of the header by another valid or invalid JSON value."""
    header = 8 + int.from_bytes(content[:8], "little")
    parsed = json.loads(content[8:header])
    name = draw.choice([key for key in parsed if key != "__metadata__"])
    entry, text, act = parsed[name], parsed["__metadata__"], draw.randrange(6)
    if act == 0:
        entry["shape"] = draw.choice([*SHAPES, entry["shape"][::-1]])
    elif act == 1:
        entry["data_offsets"] = draw.choice(OFFSETS)
    elif act == 2:
        entry["dtype"] = draw.choice(["F64", "F16", "I32", "I64", "C64", "F4", 7, None, "BOOL", [], {}])
    elif act == 3:
        parsed[draw.choice(["../../x", "after/b", "index/zz", "\ud800", "__metadata__"])] = parsed.pop(name)
    elif act == 4:
        text[draw.choice(list(text))] = draw.choice([*TEXTS, *VALUES])
    else:
        parsed[draw.choice([name, "__metadata__"])] = draw.choice(VALUES)
    made = json.dumps(parsed).encode()
    if draw.random() < 0.1:
        made = made.replace(b"[", b"[" * 2000, 1)
    return len(made).to_bytes(8, "little") + made + content[header:]


def _resealed(content: bytes, kind: str, draw: random.Random) -> bytes:
    """Change values of the metadata or tensors, and then compute the checksum again. Anyone can do this."""
    header = 8 + int.from_bytes(content[:8], "little")
    written = json.loads(content[8:header])["__metadata__"][kind]
    tensors = load(content)
    for _ in range(draw.choice([1, 1, 2])):
        if draw.random() < 0.3 and tensors:
            _change_tensor(tensors, draw)
        elif draw.random() < 0.1:
            written = draw.choice(TEXTS)
        else:
            written = _change_json(written, draw)
    metadata = {kind: written, f"{kind}.sha256": checksum(written, tensors)}
    return save(tensors, metadata=metadata)


def _change_tensor(tensors: dict[str, torch.Tensor], draw: random.Random) -> None:
    name = draw.choice(list(tensors))
    tensor = tensors[name]
    act = draw.randrange(5)
    if act == 0:
        del tensors[name]
    elif act == 1:
        tensors[draw.choice(["x", "before/zz", "inputs/w", "a\nb"])] = tensors.pop(name)
    elif act == 2:
        tensors[name] = tensor.to(draw.choice([torch.int64, torch.int32, torch.float16, torch.bool, torch.float64]))
    elif act == 3:
        tensors[name] = tensor.reshape(-1)[: draw.randrange(tensor.numel() + 1)].clone()
    else:
        tensors[name] = (
            torch.full_like(tensor, draw.choice([0, 1, -1, 100, float("nan"), float("inf")]))
            if tensor.dtype.is_floating_point
            else torch.full_like(tensor, draw.choice([0, 1, 100]))
        )


def _change_json(written: str, draw: random.Random) -> str:
    """Replace, remove or add one value at a random place of the JSON."""
    try:
        value = json.loads(written)
    except (ValueError, RecursionError):
        return written
    places: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        part = stack.pop()
        for key in list(part) if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ():
            places.append((part, key))
            stack.append(part[key])
    if not places:
        return draw.choice(TEXTS)
    part, key = draw.choice(places)
    act = draw.randrange(6)
    if act == 0:
        del part[key]
    elif act == 1:
        part[key] = draw.choice(SHAPES)
    elif act == 2 and isinstance(part, dict):
        part[draw.choice(["x", "a\nb", "__tensor__", "parents", "licence"])] = part.pop(key)
    else:
        part[key] = draw.choice(VALUES)
    return json.dumps(value)
