"""A gate decides per row and position where an adapter acts; compared with the two models without a gate."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from core.gate.adapted_models import CUT, IDS, LAYER, adapted, bits, key_of, logits
from installed import CACHE, needs
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kedit_train.core.gate.adapted_layers import find_adapted_layers
from kedit_train.core.gate.gate import Gate, find_gate
from kedit_train.core.gate.gate_cache import _GateLayer
from kedit_train.errors import EditError


def test_rows_without_a_match_and_positions_before_it_are_those_of_the_base_model(models):
    base, model, gate = models
    own, before = logits(model), logits(base)
    for row in (1, 2):
        assert torch.equal(bits(own[row]), bits(before[row]))
    assert torch.equal(bits(own[0, :CUT]), bits(before[0, :CUT]))
    assert (own[0, CUT:] != before[0, CUT:]).any(dim=-1).all()
    gate.remove()
    ungated = logits(model)
    assert (ungated != before).any(dim=-1).all()
    assert find_gate(model) is None


def test_an_open_row_equals_a_model_whose_adapter_acts_from_the_match_on(models):
    base, model, _ = models
    own = logits(model)
    # The reference adds B A x to the outputs of the adapted layers at the open positions only.
    reference = copy.deepcopy(base)
    scale = 32 / 4
    names = {name.removesuffix(".base_layer"): m for name, m in model.get_base_model().named_modules()}
    for name, module in reference.named_modules():
        layer: Any = names.get(name)
        lora = model.get_base_model().get_submodule(name) if name else None
        if lora is None or not hasattr(lora, "lora_A") or layer is None:
            continue
        a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight

        def add(module: Any, args: Any, output: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            change = torch.zeros_like(output)
            change[0, CUT:] = scale * args[0][0, CUT:] @ a.T @ b.T
            return output + change

        module.register_forward_hook(add)
    torch.testing.assert_close(own, logits(reference), rtol=1e-4, atol=1e-5)


def test_a_token_never_depends_on_later_tokens(models):
    _, model, _ = models
    whole = logits(model, IDS[:1])
    for length in range(1, 7):
        torch.testing.assert_close(logits(model, IDS[:1, :length]), whole[:, :length], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", [1, 3, 4, 5])
def test_with_a_cache_the_state_of_each_row_is_kept(models, first):
    base, model, _ = models
    whole, parts, cache = logits(model), [], None
    with torch.no_grad():
        for start, end in ((0, first), *((i, i + 1) for i in range(first, 6))):
            output = model(input_ids=IDS[:, start:end], **{CACHE: cache}, use_cache=True)
            cache = getattr(output, CACHE)
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
    # The same calls of the base model give the same bits in the closed rows.
    cache = None
    with torch.no_grad():
        for part, (start, end) in zip(parts, ((0, first), *((i, i + 1) for i in range(first, 6))), strict=True):
            output = base(input_ids=IDS[:, start:end], **{CACHE: cache}, use_cache=True)
            cache = getattr(output, CACHE)
            assert torch.equal(bits(part[1:]), bits(output.logits[1:]))


def test_the_state_follows_operations_on_the_cache(models):
    _, model, _ = models
    with torch.no_grad():
        cache = getattr(model(input_ids=IDS[:, :5], use_cache=True), CACHE)
        last = model(input_ids=IDS, use_cache=False).logits[:, -1]
        chosen = torch.tensor([2, 0, 0, 1])
        selected = copy.deepcopy(cache)
        selected.batch_select_indices(chosen)
        got = model(input_ids=IDS[chosen, 5:], **{CACHE: selected}, use_cache=True).logits[:, -1]
        torch.testing.assert_close(got, last[chosen], rtol=1e-4, atol=1e-5)
        reordered = copy.deepcopy(cache)
        reordered.reorder_cache(torch.tensor([2, 1, 0]))
        got = model(input_ids=IDS[[2, 1, 0], 5:], **{CACHE: reordered}, use_cache=True).logits[:, -1]
        torch.testing.assert_close(got, last[[2, 1, 0]], rtol=1e-4, atol=1e-5)
        repeated = copy.deepcopy(cache)
        repeated.batch_repeat_interleave(2)
        twice = IDS.repeat_interleave(2, dim=0)
        got = model(input_ids=twice[:, 5:], **{CACHE: repeated}, use_cache=True).logits[:, -1]
        torch.testing.assert_close(got, last.repeat_interleave(2, dim=0), rtol=1e-4, atol=1e-5)


def test_padding_on_either_side_changes_nothing(models):
    base, model, _ = models
    whole = logits(model)
    pad = torch.full((3, 2), 13)  # 13 is the token of the key.
    mask = torch.ones(3, 8, dtype=torch.long)
    for side in ("left", "right"):
        ids = torch.cat([pad, IDS] if side == "left" else [IDS, pad], dim=1)
        real = mask.clone()
        real[:, :2] = 0
        real = real if side == "left" else real.flip(1)
        inputs = {"attention_mask": real, "position_ids": (real.cumsum(1) - 1).clamp(min=0)}
        found, before = logits(model, ids, **inputs), logits(base, ids, **inputs)
        own = slice(2, None) if side == "left" else slice(None, 6)
        torch.testing.assert_close(found[:, own], whole, rtol=1e-4, atol=1e-5)
        assert torch.equal(bits(found[1:, own]), bits(before[1:, own]))


def test_a_padding_position_never_opens_the_gate(models):
    _, model, gate = models
    gate.radii = torch.tensor([1e9])  # Every position matches.
    mask = torch.tensor([[0, 0, 0, 1, 1, 1]]).expand(3, 6)
    with torch.no_grad():
        cache = getattr(model(input_ids=IDS, attention_mask=mask, use_cache=True), CACHE)
    assert cache.layers[-1].keys[:, 0, :, 0].tolist() == [[False] * 3 + [True] * 3] * 3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"use_cache": False},
        {"num_beams": 2, "use_cache": False},
    ],
)
def test_generation_in_a_batch_with_open_and_closed_rows(models, options):
    base, model, _ = models
    prompts = IDS[:, : CUT + 1]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    mask = torch.ones_like(prompts)
    own = model.generate(input_ids=prompts, attention_mask=mask, **settings)
    before = base.generate(input_ids=prompts, attention_mask=mask, **settings)
    assert torch.equal(own[1:], before[1:])
    assert not torch.equal(own[0], before[0])
    alone = model.generate(input_ids=prompts[:1], attention_mask=mask[:1], **settings)
    assert torch.equal(own[:1], alone)


@needs("transformers", "5.0")  # transformers 4 refuses a minimum length in assisted generation
def test_tokens_that_assisted_generation_removes_do_not_count(models, monkeypatch):
    base, model, _ = models
    removed = []

    def crop(layer: Any, tokens: int) -> None:
        removed.append(abs(tokens))
        DynamicLayer.crop(layer, tokens)

    monkeypatch.setattr(_GateLayer, "crop", crop)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    # The unedited model proposes the tokens, so that the gated model rejects some of them in the open row.
    base.generation_config.num_assistant_tokens, base.generation_config.num_assistant_tokens_schedule = 3, "constant"
    for row in range(3):
        prompt = {"input_ids": IDS[row : row + 1, : CUT + 1], "attention_mask": torch.ones(1, CUT + 1)}
        plain = model.generate(**prompt, **settings)
        assert torch.equal(plain, base.generate(**prompt, **settings)) == (row > 0)
        removed.clear()
        assert torch.equal(model.generate(**prompt, assistant_model=base, **settings), plain)
        assert any(removed) or row > 0


def test_a_removed_token_that_opened_the_gate_closes_it_again(models):
    base, model, _ = models
    other = torch.tensor([[19, 23]])
    with torch.no_grad():
        caches = [getattr(one(input_ids=IDS[:1, : CUT + 1], use_cache=True), CACHE) for one in (model, base)]
        assert caches[0].layers[-1].keys.flatten().tolist() == [False] * CUT + [True]
        for cache in caches:
            cache.crop(-1)
        own, before = (
            one(input_ids=other, **{CACHE: cache}, use_cache=True).logits
            for one, cache in zip((model, base), caches, strict=True)
        )
    assert torch.equal(bits(own), bits(before))


def test_a_copied_and_a_pickled_model_have_their_own_gate(models):
    _, model, gate = models
    own = logits(model)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(bits(logits(clone)), bits(own))
        other = find_gate(clone)
        assert other is not None
        assert other is not gate
        other.remove()
        assert not torch.equal(logits(clone), own)
        assert torch.equal(bits(logits(model)), bits(own))


def test_a_gate_file_gives_the_same_gate(models, tmp_path):
    _, model, gate = models
    own = logits(model)
    model.save_pretrained(tmp_path)
    gate.remove()
    again = Gate.load(tmp_path)
    again.install(model)
    assert torch.equal(bits(logits(model)), bits(own))
    (tmp_path / "gate.safetensors").write_bytes((tmp_path / "gate.safetensors").read_bytes()[:-4] + b"abcd")
    with pytest.raises(EditError, match=r"was changed after it was written"):
        Gate.load(tmp_path)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_the_state_of_each_forward_pass(tiny, reentrant):
    base = tiny("llama", num_hidden_layers=3).eval()
    model = adapted(copy.deepcopy(base))
    gate = Gate(key_of(base, IDS[0], CUT), torch.tensor([1e-3]), LAYER)
    gate.install(model)
    model.train()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        # The second forward pass has another state. The backward pass goes through both.
        losses = [model(input_ids=ids, use_cache=False).logits.square().mean() for ids in (IDS, IDS[[1, 0, 2]])]
        torch.stack(losses).sum().backward()
        return [p.grad.clone() for n, p in model.named_parameters() if "lora_" in n]

    want = gradients()
    assert all(bool(gradient.any()) for gradient in want)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    if reentrant:
        with pytest.raises(EditError, match=r'gradient_checkpointing_kwargs=\{"use_reentrant": False\}'):
            gradients()
    else:
        for got, expected in zip(gradients(), want, strict=True):
            torch.testing.assert_close(got, expected)


def test_the_adapted_layers_of_a_model_are_found(tiny):
    found = find_adapted_layers(adapted(tiny("llama", num_hidden_layers=3)))
    assert (found.first, len(found.layers), len(found.blocks)) == (1, 4, 3)
