"""The cache of KLLocality is read by a later run, but never if anything differs."""

from __future__ import annotations

import copy
import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.kl_locality_inputs import TEXTS, TOKENS, value
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kedit_train import owners
from kedit_train.callbacks import KLLocality, ParameterScope, ReferenceCache, editing
from kedit_train.core.locality.hidden_state_file import write_states
from kedit_train.errors import EditError


def test_a_second_run_needs_no_forward_pass_for_its_reference(make, words, tmp_path):
    model = make()
    plain, passes, metrics = value(copy.deepcopy(model), words)
    assert passes == 1
    assert metrics["edit/locality/store_bytes"] == TOKENS * 16 * 4
    first = value(copy.deepcopy(model), words, cache=tmp_path / "kept")
    again = value(copy.deepcopy(model), words, cache=tmp_path / "kept")
    assert (first[0], again[0]) == (plain, plain)
    assert (first[1], again[1]) == (1, 0)
    assert (first[2]["edit/locality/store_hits"], again[2]["edit/locality/store_hits"]) == (0.0, 1.0)
    (path,) = (tmp_path / "kept").iterdir()
    assert [tensor.shape for tensor in load_file(path).values()] == [(TOKENS, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_with_another_scope_reads_the_file_too(make, words, tmp_path, dtype):
    model = make(dtype=dtype)
    value(copy.deepcopy(model), words, scope=1, cache=tmp_path)
    assert value(copy.deepcopy(model), words, scope=0, cache=tmp_path)[1] == 0


def test_above_the_memory_limit_the_file_is_mapped(make, words, tmp_path):
    model = make()
    want = value(copy.deepcopy(model), words)[0]
    for passes in (1, 0):
        cache = ReferenceCache(tmp_path, memory_limit=TOKENS * 16 * 4 - 1)
        assert value(copy.deepcopy(model), words, cache=cache)[:2] == (want, passes)
    instance = KLLocality(TEXTS, cache=ReferenceCache(tmp_path, memory_limit="1KB"))
    with editing(copy.deepcopy(model), [instance, ParameterScope(1)], tokenizer=words) as edit:
        edit.before_step()
        assert instance._batches.texts.states.memory_mapped
    with pytest.raises(
        EditError, match="reference hidden states take 1536 bytes, but memory_limit is 1000 bytes; set cache_dir"
    ):
        value(copy.deepcopy(model), words, cache=ReferenceCache(memory_limit="1KB"))


@pytest.mark.parametrize("what", ["weight", "buffer", "config", "texts", "order", "dtype", "precision"])
def test_a_file_is_not_used_if_anything_differs(make, words, tmp_path, what):
    model = make()
    value(copy.deepcopy(model), words, cache=tmp_path)
    texts, options = list(TEXTS), {}
    if what == "weight":
        with torch.no_grad():
            model.model.norm.weight[3] += 1e-6
    elif what == "buffer":
        model.model.rotary_emb.inv_freq[1] *= 2
    elif what == "config":
        model.config.rms_norm_eps *= 2
    elif what == "texts":
        texts[1] = "w8"
    elif what == "order":
        texts = texts[::-1]
    elif what == "dtype":
        options["cache"] = ReferenceCache(tmp_path, dtype="float32")
    else:
        torch.set_float32_matmul_precision("high")
    try:
        assert value(model, words, texts=texts, **{"cache": tmp_path, **options})[1] == 1
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(list(tmp_path.iterdir())) == 2


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[:-10])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a bit":
        content[-5] ^= 1
        path.write_bytes(content)
    elif how == "foreign":
        save_file({"0": torch.zeros(TOKENS, 16)}, path)
    elif how in ("scalar", "nothing"):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        save_file({"0": torch.tensor(1.0)} if how == "scalar" else {}, path, metadata=metadata)
    else:
        path.write_bytes(b"no tensors at all " * 9)


@pytest.mark.parametrize("how", ["truncated", "empty", "a bit", "foreign", "scalar", "nothing", "text"])
def test_a_damaged_or_foreign_file_is_replaced(make, words, tmp_path, how):
    model = make()
    want = value(copy.deepcopy(model), words, cache=tmp_path)[0]
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    damage(path, how)
    with pytest.warns(UserWarning, match=r"KLLocality: .* The reference hidden states are computed again"):
        assert value(copy.deepcopy(model), words, cache=tmp_path)[:2] == (want, 1)
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_no_file(make, words, tmp_path):
    model = make()
    model.model.register_forward_pre_hook(lambda m, a: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        value(model, words, cache=tmp_path / "kept")
    assert not (tmp_path / "kept").exists() or list((tmp_path / "kept").iterdir()) == []


@pytest.mark.parametrize("allocates", [True, False])
def test_the_file_is_allocated_before_anything_is_written(tmp_path, monkeypatch, allocates):
    """A mapped file with holes ends the process (SIGBUS) when the disk is full."""
    if not allocates:
        monkeypatch.delattr(os, "posix_fallocate")
    tokens, found = 1 << 16, []

    def batches():
        for row in range(2):
            found.extend(entry.stat().st_blocks * 512 for entry in tmp_path.rglob("*") if entry.is_file())
            yield [row], [torch.full((tokens, 4), float(row))]

    write_states(batches(), [tokens, tokens], tmp_path / "a.safetensors", key="")
    assert found[0] >= 2 * tokens * 4 * 4
    (tensor,) = load_file(tmp_path / "a.safetensors").values()
    assert tensor.sum().item() == tokens * 4


@pytest.mark.parametrize("when", ["posix_fallocate", "replace"])
def test_a_full_disk_is_an_error_and_leaves_no_file(make, words, tmp_path, monkeypatch, when):
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, when, full)
    with pytest.raises(EditError, match=rf"KLLocality: .* take \d{{4}} bytes .*'{tmp_path}' \(No space left") as caught:
        value(make(), words, cache=tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_process_are_removed(make, words, tmp_path):
    model = make()
    value(copy.deepcopy(model), words, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host, old = owners._place(), time.time() - 2 * 86400

    def left(key: str, at: str, process: int, old_one: bool) -> Path:
        file = tmp_path / f".{key}.safetensors.{at}.{process}.0.unfinished"
        file.write_bytes(b"half")
        if old_one:
            os.utime(file, (old, old))
        return file

    removed = [left(path.stem, host, gone.pid, False), left("b", host, gone.pid, True), left("c", "far.away", 1, True)]
    kept = [
        left("b2", host, gone.pid, False),
        left(path.stem, host, os.getppid(), True),
        left(path.stem, "far.away", gone.pid, False),
        path,
    ]
    assert value(copy.deepcopy(model), words, cache=tmp_path)[1] == 0
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    assert not any(file.exists() for file in removed)


@pytest.mark.parametrize("where", ["a file", "below a file", "not creatable", "a folder in its place", "read only"])
def test_an_unusable_cache_dir_is_an_error_before_any_forward_pass(make, words, tmp_path, monkeypatch, where):
    model, store = make(), tmp_path / "kept"
    message = r"is not a directory and cannot be created \(.*\); set another"
    if where == "a folder in its place":
        value(copy.deepcopy(model), words, cache=store)
        (path,) = store.iterdir()
        path.unlink()
        path.mkdir()
        message = f"{path} must be a file, but is a directory"
    elif where == "read only":
        # Root may write everywhere.
        monkeypatch.setattr(os, "access", lambda *_: False)
        message = "is not writable"
    elif where == "not creatable":
        store = Path("/proc/nothing")
    else:
        store.write_text("mine")
        store = store / "below" if where == "below a file" else store
    monkeypatch.setattr(
        "kedit_train.core.locality.reference_states.hidden_states", lambda *_: pytest.fail("it was computed")
    )
    with pytest.raises(EditError, match=rf"^KLLocality: .*{message}"):
        value(model, words, cache=store)


def test_a_narrower_dtype_reports_its_rounding_error(make, words, tmp_path):
    model = make()
    want = value(copy.deepcopy(model), words)[0]
    with pytest.warns(
        UserWarning, match=r"KLLocality: .* computed in torch.float32 but stored in torch.bfloat16. On the first texts"
    ):
        got, _, metrics = value(copy.deepcopy(model), words, cache=ReferenceCache(dtype="bfloat16"))
    assert metrics["edit/locality/store_bytes"] == TOKENS * 16 * 2
    assert got != want
    assert got == pytest.approx(want, rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, 'ReferenceCache: dtype must be "float32", "bfloat16" or "float16", or None, got \'int8\'.'),
        ({"memory_limit": "much"}, "ReferenceCache: memory_limit must be a number of bytes above 0"),
        (
            {"cache_dir": ""},
            "ReferenceCache: cache_dir must be a non-empty path without NUL characters, or None, got ''.",
        ),
        ({"directory": "a"}, "ReferenceCache: unknown argument 'directory'; use only cache_dir, dtype, memory_limit."),
    ],
)
def test_bounds_of_the_cache(options, message):
    with pytest.raises(EditError) as error:
        KLLocality(TEXTS, cache=options)
    assert str(error.value).startswith(message)
