"""The functions for what differs between the supported versions of Python, transformers, TRL and PEFT."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from installed import CACHE
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from kedit_train import compatibility
from kedit_train.compatibility import (
    cache_argument,
    checkpoint_without_reentry,
    keeping_checkpointing,
    read_cache,
    remove_cache,
    rescaled_dare,
    sft_reads_logits,
    sha256_of_file,
)


@pytest.mark.parametrize("size", [0, 3, (1 << 20) + 1])
def test_the_checksum_of_a_file_is_that_of_its_bytes(tmp_path: Path, size: int) -> None:
    content = bytes(i % 251 for i in range(size))
    (tmp_path / "file").write_bytes(content)
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


class SFTConfig:
    def __init__(self, use_liger_kernel: bool = False) -> None:
        self.use_liger_kernel = use_liger_kernel


@pytest.fixture
def trl(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace the modules of TRL by those of a version without a fused head."""
    config, utils = ModuleType("trl.trainer.sft_config"), ModuleType("trl.trainer.utils")
    config.SFTConfig = SFTConfig  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trl.trainer.sft_config", config)
    monkeypatch.setitem(sys.modules, "trl.trainer.utils", utils)
    return utils


def test_only_sft_trainer_without_a_fused_head_reads_logits(trl: Any) -> None:
    assert sft_reads_logits(SFTConfig())
    assert not sft_reads_logits(SFTConfig(use_liger_kernel=True))
    assert not sft_reads_logits(object())
    trl.FusedCausalLMOutput = object
    assert not sft_reads_logits(SFTConfig())


def test_without_trl_no_trainer_reads_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "trl.trainer.sft_config", raising=False)
    assert not sft_reads_logits(SFTConfig())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {"use_reentrant": False}),
        ({"context_fn": print}, {"use_reentrant": False, "context_fn": print}),
        ({"use_reentrant": True}, {"use_reentrant": True}),
    ],
)
def test_only_the_default_of_checkpointing_changes(monkeypatch: pytest.MonkeyPatch, given: Any, expected: Any) -> None:
    args = SimpleNamespace(gradient_checkpointing=True, gradient_checkpointing_kwargs=given)
    monkeypatch.setattr(compatibility, "TRANSFORMERS_4", False)
    checkpoint_without_reentry(args)
    assert args.gradient_checkpointing_kwargs == given
    monkeypatch.setattr(compatibility, "TRANSFORMERS_4", True)
    checkpoint_without_reentry(args)
    assert args.gradient_checkpointing_kwargs == expected


class Checkpointed:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
        self.calls.append(gradient_checkpointing_kwargs)


def test_checkpointing_is_turned_on_again_with_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"use_reentrant": False}
    args = SimpleNamespace(gradient_checkpointing=True, gradient_checkpointing_kwargs=given)
    for older, expected in ((False, [None, "own"]), (True, [given, "own"])):
        monkeypatch.setattr(compatibility, "TRANSFORMERS_4", older)
        model = Checkpointed()
        with keeping_checkpointing(SimpleNamespace(model=model, args=args)):
            model.gradient_checkpointing_enable()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs="own")
        assert model.calls == expected
        assert "gradient_checkpointing_enable" not in vars(model)


@pytest.mark.parametrize(("version", "expected"), [("0.18.1", 8.0), ("0.19.0", 2.0), ("0.21.2", 2.0), ("1.0", 2.0)])
def test_dare_is_rescaled_once(monkeypatch: pytest.MonkeyPatch, version: str, expected: float) -> None:
    monkeypatch.setattr(compatibility, "version", lambda package: version)
    assert rescaled_dare(lambda tensors, weights, density: sum(tensors))([1.0, 1.0], None, 0.25) == expected


def llama() -> Any:
    shape = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).eval()


@pytest.mark.filterwarnings("error")
def test_the_cache_is_passed_and_read_without_a_warning_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    # Reading an output by a deprecated name is a line in the log of transformers, once per process.
    monkeypatch.setattr("transformers.utils.generic.logger.warning_once", pytest.fail)
    model, ids = llama(), torch.tensor([[3, 1, 4, 1]])
    name = cache_argument(model)
    assert name == CACHE
    whole = model(input_ids=ids).logits[:, -1]
    output = model(input_ids=ids[:, :3], use_cache=True)
    cache = read_cache(output)
    assert isinstance(cache, DynamicCache)
    assert cache.get_seq_length() == 3
    last = model(input_ids=ids[:, 3:], use_cache=True, **{name: cache})
    torch.testing.assert_close(last.logits[:, -1], whole)
    assert read_cache(last) is cache
    remove_cache(last)
    assert read_cache(last) is None
    assert read_cache(model(input_ids=ids, use_cache=False)) is None


class Renamed:
    """A model of transformers 5.24 or later."""

    def forward(self, input_ids: Any, cache: Any = None, **kwargs: Any) -> None: ...


class Older:
    """A model of an older version."""

    def forward(self, input_ids: Any, past_key_values: Any = None, **kwargs: Any) -> None: ...


@pytest.mark.parametrize(("model", "name"), [(Renamed(), "cache"), (Older(), "past_key_values")])
def test_both_names_of_the_cache_are_known(model: Any, name: str) -> None:
    assert cache_argument(model) == name
    assert read_cache({"input_ids": 1, name: 2}) == 2
    assert read_cache({"input_ids": 1, name: None}) is None
    assert read_cache(SimpleNamespace(logits=1, **{name: 2})) == 2
    output = SimpleNamespace(logits=1, **{name: 2})
    remove_cache(output)
    assert vars(output) == {"logits": 1, name: None}
    # transformers also uses the new name if both are given.
    assert read_cache({"past_key_values": 1, "cache": 2}) == 2


@pytest.mark.parametrize("source", [(1, 2), [1], {}, torch.zeros(2), None])
def test_an_output_without_a_cache_has_none(source: Any) -> None:
    remove_cache(source)
    assert read_cache(source) is None


def test_the_state_of_a_recurrent_model_is_no_key_value_cache() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4))
    assert cache_argument(model) is None
