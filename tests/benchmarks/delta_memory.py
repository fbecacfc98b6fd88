"""Peak memory of applying a delta to a sharded checkpoint of random weights, and whether it is exact.

    python tests/benchmarks/delta_memory.py /tmp/there --gigabytes 15 --shard-gigabytes 5 --tensor-megabytes 117

makes a checkpoint of that size in bf16 there (a model of 7 B parameters is 15 GB; a copy of it is written twice), edits
one tensor of each shard, applies, reverts, and prints the peak of anonymous memory above that before the first apply.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kedit_train import EditDelta
from kedit_train.delta.bits import tensor_hash
from kedit_train.delta.change import change_between


class Peak:
    """Samples anonymous memory (pages of mapped files are the system's to take back) every millisecond."""

    def __init__(self) -> None:
        self.highest, self._on = 0, True
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Peak:
        self._start = self._anonymous()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._on = False
        self._thread.join()

    @property
    def megabytes(self) -> float:
        return (self.highest - self._start) / 1000

    def _sample(self) -> None:
        while self._on:
            self.highest = max(self.highest, self._anonymous())
            time.sleep(0.001)

    @staticmethod
    def _anonymous() -> int:
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])


def make(folder: Path, total: float, shard: float, tensor: float) -> tuple[EditDelta, int]:
    """Write the checkpoint shard by shard; return a delta of one tensor in each."""
    folder.mkdir(parents=True)
    shards, each = round(total / shard), round(shard * 1000 / tensor)
    rows = round(tensor * 1e6 / 2 / 4096)
    where, changes = {}, {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {f"layers.{i}.{j}.weight": torch.randn(rows, 4096).bfloat16() for j in range(each)}
        where |= dict.fromkeys(tensors, file)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        name = f"layers.{i}.{each // 2}.weight"
        base = tensors[name]
        change = change_between(base, base + 0.01 * torch.randn(rows, 4096).bfloat16(), tensor_hash(base))
        assert change is not None
        changes[name] = change
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return EditDelta(changes, {"base": {"fingerprint": "", "names": sorted(where)}}), shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=15.0)
    parser.add_argument("--shard-gigabytes", type=float, default=5.0)
    parser.add_argument("--tensor-megabytes", type=float, default=117.0)
    given = parser.parse_args()
    base, out, back = (given.folder / name for name in ("base", "edited", "back"))
    made, shards = make(base, given.gigabytes, given.shard_gigabytes, given.tensor_megabytes)
    path = made.save(given.folder / "edit.safetensors")
    del made
    delta = EditDelta.load(path)
    with Peak() as peak:
        delta.apply_to_checkpoint(base, out)
        delta.revert_checkpoint(out, back)
    files = sorted(file.name for file in base.iterdir())
    apply_equal = all(
        torch.equal(
            tensor.view(torch.int16),
            (delta.changes[name].after if name in delta.changes else old[name]).view(torch.int16),
        )
        for file in files
        if file.endswith(".safetensors")
        for old in [load_file(base / file)]
        for name, tensor in load_file(out / file).items()
    )
    revert_equal = all((back / file).read_bytes() == (base / file).read_bytes() for file in files)
    found = {"shards": shards, "tensors": len(delta), "apply_equal": apply_equal, "revert_equal": revert_equal}
    print(json.dumps({**found, "peak_above_start_mb": round(peak.megabytes, 1)}))


if __name__ == "__main__":
    main()
