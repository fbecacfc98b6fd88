"""PrefixCache gives the same bits as a run without it, from memory and from disk, for other batches and padding."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.prefixed import FAMILIES, HALVES, LENGTHS, batch, build, rates, same, scope, train

from kedit_train.callbacks import KLLocality, PrefixCache, TokenSmoothing, editing
from kedit_train.errors import EditError


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_weights_are_the_same_bit_for_bit(family: str, head: bool, side: str) -> None:
    batches = [batch(side, rows=half) for half in HALVES]
    more = [TokenSmoothing()] if head else []
    plain = train(build(family), [scope(), *more], batches)
    cached = train(build(family), [scope(), *more, PrefixCache()], batches)
    assert same(plain, cached)
    assert rates(cached[2]) == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    tokens = sum(LENGTHS)
    assert cached[2][-1]["edit/cache/memory_bytes"] == tokens * 16 * 4
    assert cached[2][-1]["edit/cache/sequences"] == 8
    # The comparison would notice one epoch more or less.
    assert not same(plain, train(build(family), [scope(), *more], batches, epochs=2))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_other_batches_and_other_padding_differ_by_rounding_only(family: str) -> None:
    def batches(width: int) -> list[Any]:
        return [batch(width=width, rows=half) for half in HALVES]

    shuffled = [{name: value.flip(0) for name, value in batch(width=20, rows=half).items()} for half in HALVES]
    plain = train(build(family), [scope()], [*batches(12), *shuffled, *batches(32)], epochs=1)
    cached = train(build(family), [scope(), PrefixCache()], [*batches(12), *shuffled, *batches(32)], epochs=1)
    assert rates(cached[2]) == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    torch.testing.assert_close(cached[0], plain[0], rtol=1e-5, atol=1e-6)


def test_with_position_ids_both_padding_sides_share_hidden_states() -> None:
    batches = [batch(side, width, positions=True) for side, width in (("right", 12), ("left", 12), ("left", 15))]
    plain, cached = (train(build("gpt2"), [scope(), *more], batches, epochs=1) for more in ([], [PrefixCache()]))
    assert rates(cached[2]) == [0.0, 1.0, 1.0]
    torch.testing.assert_close(cached[0], plain[0], rtol=1e-5, atol=1e-6)


def test_without_position_ids_left_padding_is_part_of_the_key() -> None:
    cached = train(build("gpt2"), [scope(), PrefixCache()], [batch("left", 12), batch("left", 13)], epochs=2)
    assert rates(cached[2]) == [0.0, 0.0, 1.0, 1.0]
    assert cached[2][-1]["edit/cache/sequences"] == 16


def test_beyond_the_memory_limit_hidden_states_go_to_disk_and_come_back_the_same(tmp_path: Path) -> None:
    batches = [batch(rows=half) for half in HALVES]
    plain = train(build(), [scope()], batches)
    cached = train(build(), [scope(), PrefixCache(1500, cache_dir=tmp_path / "cache")], batches)
    assert same(plain, cached)
    assert rates(cached[2])[2:] == [1.0] * 4
    assert 0 < cached[2][-1]["edit/cache/memory_bytes"] <= 1500 < cached[2][-1]["edit/cache/disk_bytes"]
    assert list((tmp_path / "cache").iterdir()) == []


def test_beyond_the_memory_limit_without_a_directory_sequences_are_computed_again_with_a_warning() -> None:
    batches = [batch(rows=half) for half in HALVES]
    plain = train(build(), [scope()], batches)
    with pytest.warns(UserWarning, match=r"^PrefixCache: memory_limit is reached with 4 sequences, .*raise"):
        cached = train(build(), [scope(), PrefixCache(sum(LENGTHS[:4]) * 64)], batches)
    assert same(plain, cached)
    assert rates(cached[2]) == [0.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    assert cached[2][1]["edit/cache/sequences_left_out"] == 4


def test_evaluation_during_training_runs_every_layer() -> None:
    model, calls = build(), []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    with editing(model, [scope(), PrefixCache()]) as edit:
        optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-2)
        for step in range(3):
            edit.before_step()
            calls.clear()
            model(**batch()).loss.backward()
            assert len(calls) == (step == 0)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                calls.clear()
                logits = model(**batch()).logits
                generated = model.generate(batch()["input_ids"][:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
                assert len(calls) == 4
            copied = copy.deepcopy(model)
            assert torch.equal(copied(**batch()).logits, logits)
            assert torch.equal(
                generated,
                copied.generate(batch()["input_ids"][:1], max_new_tokens=3, do_sample=False, pad_token_id=0),
            )


def test_reference_texts_of_kl_locality_are_served(words: Any) -> None:
    # All texts have one length and are in every batch, so that rounding is the same in every step.
    texts = [" ".join(f"w{(7 * i + j) % 59}" for j in range(6)) for i in range(4)]
    runs = []
    for more in ([], [PrefixCache()]):
        kl = KLLocality(texts, weight=10.0, batch_size=4)
        runs.append(train(build(), [scope(), TokenSmoothing(), kl, *more], [batch()], tokenizer=words))
    assert same(*runs)
    assert rates(runs[1][2]) == [0.0, 1.0, 1.0]
    assert runs[1][2][-1]["edit/cache/sequences"] == 8 + 4
    assert runs[1][2][-1]["edit/locality/kl"] > 0


def test_precision_is_part_of_the_key_and_hidden_states_keep_their_dtype() -> None:
    model, inputs = build(), batch()
    with editing(model, [scope(), cache := PrefixCache()], log_every_n_steps=1) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=0.0)
        losses = []
        for half in (False, True, False, True):
            edit.before_step()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert rates(edit.history) == [0.0, 0.0, 1.0, 1.0]
        assert losses[:2] == losses[2:]
        assert losses[0] != losses[1]
    with editing(model.to(torch.bfloat16), [scope(), cache], log_every_n_steps=1) as edit:
        edit.before_step()
        model(**inputs)
        assert cache.metrics(edit.run)["edit/cache/memory_bytes"] == sum(LENGTHS) * 16 * 2


def test_frozen_layers_below_adapters_are_skipped() -> None:
    from peft import LoraConfig, get_peft_model

    def adapted(layers: list[int]) -> Any:
        config = LoraConfig(r=2, target_modules=["down_proj"], layers_to_transform=layers, task_type="CAUSAL_LM")
        return get_peft_model(build(), config)

    batches = [batch(rows=half) for half in HALVES]
    plain, cached = (train(adapted([2, 3]), [TokenSmoothing(), *m], batches) for m in ([], [PrefixCache()]))
    assert same(plain, cached)
    assert rates(cached[2]) == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    with pytest.raises(EditError, match=r"layers\.0\.mlp\.down_proj\.lora_A.* in layer 0 is trained, so there is no"):
        train(adapted([0, 3]), [PrefixCache()], batches)
