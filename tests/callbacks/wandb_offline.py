"""Read an offline W&B run back from its file. The format is private to wandb, so this stays in the tests.

A 7-byte file header, then 32 KiB blocks of records as in LevelDB's log: checksum (4 bytes), length (2), type (1: whole,
2: first, 3: middle, 4: last), data. Each joined record is one protobuf message.
"""

from __future__ import annotations

import base64
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER, BLOCK = 7, 32 * 1024


def records(path: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), HEADER, b""
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if at + 7 + length > len(data):
            # The file is still being written.
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


class OfflineRun:
    """The run in a folder: history, summary, metric definitions, configuration, artifacts (type -> files).

    ``checksums`` has the MD5 checksum of each file in an artifact.
    """

    def __init__(self, folder: Path) -> None:
        path, written = _complete(folder)
        self.folder = path.parent
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.steps: dict[str, str] = {}
        self.config: dict[str, Any] = {}
        self.artifacts: dict[str, list[str]] = {}
        self.checksums: dict[str, bytes] = {}
        for record in written:
            kind = record.WhichOneof("record_type")
            if kind == "history":
                self.rows.append(_items(record.history.item))
            elif kind == "summary":
                self.summary.update(_items(record.summary.update))
            elif kind == "metric":
                name = record.metric.glob_name or record.metric.name
                self.steps[name] = record.metric.step_metric
            elif kind == "config":
                self.config.update(_items(record.config.update))
            elif kind == "artifact" and record.artifact.type != "run_table":
                entries = record.artifact.manifest.contents
                self.artifacts[record.artifact.type] = [entry.path for entry in entries]
                self.checksums |= {entry.path: base64.b64decode(entry.digest) for entry in entries}

    def media(self, key: str) -> str:
        """Return the text of the file that was logged under ``key``."""
        (path,) = [row[f"{key}/path"] for row in self.rows if f"{key}/path" in row]
        return (self.folder / "files" / path).read_text(encoding="utf-8")

    def table(self, key: str) -> dict[str, Any]:
        """Return the columns and the data of the table that was logged under ``key``."""
        return json.loads(self.media(key))

    def series(self, key: str, step: str) -> list[tuple[int, float]]:
        """Return (step, value) of every row with ``key``."""
        return [(row[step], row[key]) for row in self.rows if key in row]


def _complete(folder: Path) -> tuple[Path, list[Any]]:
    # When wandb.finish() returns, the service process may still be writing. The exit record is among the last.
    for _ in range(600):
        for path in folder.rglob("run-*.wandb"):
            found = list(records(path))
            if any(record.WhichOneof("record_type") == "exit" for record in found):
                return path, found
        time.sleep(0.1)
    raise AssertionError(f"no W&B run below {folder} was ever completed")


def _items(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
