"""Mutate texts: bytes, lines, and values of the JSON or YAML in them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

from fuzz.mutations import VALUES

# Texts that are special for a tokenizer, a terminal, or one of the formats.
TEXTS: list[Any] = [
    "{}", "{}{}", "{0}", "%s", "nq question: ", "nq question: ??", "\u200b", "\u202eabc", "\x00", "\r", "a\rb",
    "\u2028", "|", "a|b", "[", "{", "[1", '{"a": 1}', '["a", ["b"]]', "'", '"', ",", "  x  ", "x" * 20_000, "é" * 500,
    "ﷺ" * 200, "\U0001f600", "world", "/", "..", "~", "-", "NaN", "true", "null", "1e999", "0x" + "f" * 200,
    "9" * 5000, "&a", "*a", "!!python/name:os.system", "<|endoftext|>", "\ufeff", "\ud83d",
]  # fmt: skip
KEYS = [
    "x", "", "a\nb", "prompt", "target", "target_new", "locality", "class_path", "init_args", "callbacks", "a b",
    "a.b", ".", "\u200bx", "+",
]  # fmt: skip
BYTES = [
    b"\xff", b"\x00", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r\n", b"\n", b"\n\n", b"\t", b"\xe2\x80\xa8", b"\x85",
    b'"', b"'", b"\\", b"\\u", b"\\ud800",
]  # fmt: skip


def with_bytes(content: bytes, draw: random.Random, tokens: Sequence[bytes] = ()) -> bytes:
    """Change, remove, insert or move a few bytes or lines."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        place = draw.randrange(len(data) + 1)
        act = draw.randrange(7)
        if act == 0 and data:
            data[place % len(data)] ^= 1 << draw.randrange(8)
        elif act == 1:
            del data[place : place + draw.choice([1, 1, 4, 40, len(data)])]
        elif act == 2:
            data[place:place] = draw.choice([*BYTES, *tokens])
        elif act == 3:
            data[place:place] = draw.choice(b"[{(<&*!|>?-:,#%@`").to_bytes(1, "little") * draw.choice([1, 2, 50, 3000])
        elif act == 4:
            start = draw.randrange(len(data) + 1)
            data[place:place] = data[start : start + draw.choice([1, 8, 80, 800])]
        else:
            lines = bytes(data).split(b"\n")
            i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
            if act == 5:
                lines[i], lines[j] = lines[j], lines[i]
            else:
                lines[i] = draw.choice([b"  ", b"", b"- ", b"\t"]) + lines[j]
            data = bytearray(b"\n".join(lines))
    return bytes(data)


def with_values(value: Any, draw: random.Random, others: Sequence[Any] = ()) -> Any:
    """Return a copy of a JSON value in which one or two values or keys are replaced, removed, added or moved."""
    value = copied(value)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        places = list(_places(value))
        if not places:
            return draw.choice(VALUES)
        part, key = draw.choice(places)
        act = draw.randrange(8)
        if act == 0:
            del part[key]
        elif act == 1 and isinstance(part, dict):
            part[draw.choice(KEYS)] = part.pop(key)
        elif act == 2 and isinstance(part, dict):
            part[draw.choice(KEYS)] = draw.choice(VALUES)
        elif act == 3:
            # One level more or less.
            inner = part[key]
            part[key] = next(iter(inner), None) if isinstance(inner, list | dict) and draw.random() < 0.5 else [inner]
        elif act == 4:
            other, place = draw.choice(places)
            if place in other if isinstance(other, dict) else place < len(other):
                part[key] = copied(other[place])
        else:
            part[key] = copied(draw.choice(draw.choice([VALUES, TEXTS, others or TEXTS])))
    return value


def copied(value: Any) -> Any:
    """Return a copy of a JSON value. ``copy.deepcopy`` cannot copy deeply nested lists."""
    return json.loads(json.dumps(value))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    stack = [value]
    while stack:
        part = stack.pop()
        for key in list(part) if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ():
            yield part, key
            stack.append(part[key])
