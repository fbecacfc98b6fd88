"""Peak memory of applying a delta to a sharded checkpoint with random weights, and exactness of the result.

    python tests/benchmarks/delta_memory.py /tmp/there --gigabytes 15 --shard-gigabytes 5 --tensor-megabytes 117

writes a bf16 checkpoint of that size into the folder (a model with 7 B parameters has 15 GB; two copies are written),
edits one tensor of each shard, applies and reverts the delta, and records the peak increase of anonymous memory.
"""

from __future__ import annotations

import filecmp
import json
import threading
import time
from pathlib import Path

import torch
from paired import arguments, record, table
from safetensors.torch import load_file, save_file

from kedit_train import EditDelta
from kedit_train.delta.bitwise import tensor_hash
from kedit_train.delta.tensor_change import change_between


class Peak:
    """Samples anonymous memory every millisecond. The system can free pages of mapped files, so they do not count."""

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
    """Write the checkpoint shard by shard, and return a delta of one tensor per shard."""
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
    return EditDelta(changes, meta={"base": {"fingerprint": "", "names": sorted(where)}}), shards


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(dtype="bfloat16")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=15.0)
    parser.add_argument("--shard-gigabytes", type=float, default=5.0)
    parser.add_argument("--tensor-megabytes", type=float, default=117.0)
    given = parser.parse_args()
    if given.quick:
        given.gigabytes, given.shard_gigabytes, given.tensor_megabytes = 0.06, 0.02, 5.0
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
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
    revert_equal = all(filecmp.cmp(back / file, base / file, shallow=False) for file in files)
    shard = max((base / file).stat().st_size for file in files)
    total = sum((base / file).stat().st_size for file in files)
    yes = {True: "yes", False: "NO"}
    head = ["checkpoint", "shards", "largest shard", "tensors changed", "delta", "peak", "applied exact", "reverted"]
    cells = [f"{total / 1e9:.2f} GB", str(shards), f"{shard / 1e9:.2f} GB", str(len(delta))]
    cells += [f"{delta.nbytes / 1e6:.0f} MB", f"{peak.megabytes:.0f} MB", yes[apply_equal], yes[revert_equal]]
    body = f"""{table(head, [cells])}

Peak: anonymous memory of the process above that before the first of both, every millisecond; it includes no shard.
After applying, every tensor is compared bit for bit. After reverting, every file is compared byte for byte."""
    title = "Memory of applying a delta to a sharded checkpoint" + (", tiny" if given.quick else "")
    record(title, body, given)


if __name__ == "__main__":
    main()
