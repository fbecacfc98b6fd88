"""Find keys that a YAML file sets twice. PyYAML and jsonargparse would silently keep only one of the values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

from kedit_train.arguments import cut

# The merge key of YAML. A mapping may contain this key several times, because a merge replaces no keys.
MERGE = "<<"
# Maximum number of parts of a key, such as 2 in "model.name". No setting has more parts. Without this limit, the check
# of a key with thousands of dots would take a long time.
MAX_PARTS = 10


class RepeatedKey(yaml.YAMLError):
    """One mapping sets a key twice. The message is one line with the key and both line numbers."""


class _Mapping:
    """The keys that have been read so far in one mapping.

    Args:
        top: True for the outermost mapping. Only there, jsonargparse reads "model.name" as the key "name" of "model".
    """

    def __init__(self, top: bool) -> None:
        self.top, self.at_key = top, True
        # Key -> the key as it is written, and its line. The second dict contains the beginnings of keys with dots: "a"
        # and "a.b" for the key "a.b.c".
        self.keys: dict[str, tuple[str, int]] = {}
        self.beginnings: dict[str, tuple[str, int]] = {}

    def add(self, key: str, line: int) -> None:
        name = key.removesuffix("+")  # jsonargparse appends the value of "callbacks+" to the list "callbacks".
        parts = name.split(".", MAX_PARTS) if self.top else [name]
        beginnings = [".".join(parts[:i]) for i in range(1, len(parts))]
        same = self.keys.get(name) or self.beginnings.get(name)
        same = same or next((self.keys[start] for start in beginnings if start in self.keys), None)
        if same is not None:
            written, first = same
            lines = f"at line {first} and at line {line}; keep only one of them"
            if written == key:
                raise RepeatedKey(f"the key {cut(repr(key), 60)} is given twice, {lines}")
            raise RepeatedKey(f"the keys {cut(repr(written), 60)} and {cut(repr(key), 60)} set the same value, {lines}")
        self.keys[name] = key, line
        for start in beginnings:
            self.beginnings.setdefault(start, (key, line))


def check_keys(events: Iterable[Any]) -> None:
    """Raise an error if a mapping sets a key twice, at any depth.

    A mapping may repeat the merge key (``<<``), and may override keys that it merges from another mapping.

    Args:
        events: the events of ``yaml.parse``.

    Raises:
        RepeatedKey: a mapping sets a key twice.
    """
    levels: list[_Mapping | None] = []
    # Anchors of scalars -> their texts, because an alias can also be a key.
    scalars: dict[str, str] = {}
    for event in events:
        if isinstance(event, yaml.CollectionEndEvent):
            levels.pop()
            continue
        if not isinstance(event, yaml.NodeEvent):
            continue
        parent = levels[-1] if levels else None
        is_key = parent is not None and parent.at_key
        if parent is not None:
            parent.at_key = not parent.at_key
        if isinstance(event, yaml.CollectionStartEvent):
            levels.append(_Mapping(not levels) if isinstance(event, yaml.MappingStartEvent) else None)
            continue
        text = event.value if isinstance(event, yaml.ScalarEvent) else scalars.get(event.anchor)
        if isinstance(event, yaml.ScalarEvent) and event.anchor is not None:
            scalars[event.anchor] = event.value
        if parent is not None and is_key and text is not None and text != MERGE:
            parent.add(text, event.start_mark.line + 1)
