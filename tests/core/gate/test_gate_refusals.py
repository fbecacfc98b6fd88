"""A gate refuses caches, inputs and models that it cannot handle."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from core.gate.adapted_models import CUT, IDS, LAYER, adapted, bits, logits
from installed import CACHE
from transformers import MambaConfig, MambaForCausalLM
from transformers.cache_utils import DynamicCache

from kedit_train.core.gate.adapted_layers import find_adapted_layers
from kedit_train.core.gate.gate import Gate, find_gate
from kedit_train.errors import EditError


def test_a_cache_of_a_fixed_size_is_refused(models):
    _, model, _ = models
    with pytest.raises(EditError, match=r"needs a key-value cache that grows, got StaticCache; leave out cache_impl"):
        model.generate(input_ids=IDS, max_new_tokens=2, cache_implementation="static", pad_token_id=0)


def test_an_offloaded_cache_is_refused(models):
    _, model, _ = models
    cache = DynamicCache()
    # DynamicCache(offloading=True) needs a GPU in some versions of transformers and torch.
    cache.offloading = True
    with pytest.raises(EditError, match=r"cannot use an offloaded key-value cache; leave out cache_implementation=\."):
        logits(model, **{CACHE: cache}, use_cache=True)


def test_a_cache_of_recurrent_states_is_refused():
    config = MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=3, state_size=4, eos_token_id=None)
    base = MambaForCausalLM(config).eval()
    model = adapted(copy.deepcopy(base), ["in_proj"], layers_pattern="layers")
    with torch.no_grad():
        key = base.backbone.layers[0](base.backbone.embeddings(IDS[:1]))[:, CUT]
    Gate(key, torch.tensor([1e-3]), LAYER).install(model)
    options: Any = {"input_ids": IDS, "max_new_tokens": 2, "pad_token_id": 0}
    with pytest.raises(EditError, match=r"^a gated model cannot use a cache of recurrent states; pass use_cache=False"):
        model.generate(**options)
    assert model.generate(**options, use_cache=False).shape == (3, 8)
    assert find_gate(model).opened_rows.tolist() == [True, False, False]


def refused(model: Any, message: str, **inputs: Any) -> None:
    with pytest.raises(EditError) as error:
        logits(model, **inputs)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_gate_cannot_read_is_refused(models):
    base, model, _ = models
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(3, 6)
    refused(model, "cannot read packed sequences; turn packing and padding_free off", position_ids=packed)
    refused(model, "needs attention_mask [rows, positions], got [3, 1, 6, 6]", attention_mask=torch.ones(3, 1, 6, 6))
    with torch.no_grad():
        cache = getattr(base(input_ids=IDS, use_cache=True), CACHE)
    refused(model, f"{CACHE} contains 6 tokens that the gated model has not read", **{CACHE: cache}, use_cache=True)
    with torch.no_grad():
        cache = getattr(model(input_ids=IDS[:, :2], use_cache=True), CACHE)
        base(input_ids=IDS[:, 2:], **{CACHE: cache}, use_cache=True)
    refused(model, f"{CACHE} contains 4 tokens that the gated model has not read", **{CACHE: cache}, use_cache=True)
    # The error leaves no state behind.
    assert torch.equal(bits(logits(model)[1:]), bits(logits(base)[1:]))
    for layer in find_adapted_layers(model).layers:
        layer.merge()  # type: ignore[operator]
    refused(model, "the adapter is merged into the weights")


def test_what_cannot_be_gated_is_refused(tiny):
    def build(**options: Any) -> Any:
        return adapted(tiny("llama", num_hidden_layers=3), **options)

    key = torch.zeros(1, 16)
    cases = [
        (tiny("llama"), LAYER, key, "needs a model with a LoRA adapter"),
        (build(bias="all"), LAYER, key, "bias must be \"none\", got 'all'"),
        (build(modules_to_save=["lm_head"]), LAYER, key, "remove modules_to_save"),
        (
            build(modules=["down_proj", "lm_head"], layers_to_transform=None),
            0,
            key,
            "must be inside the decoder blocks",
        ),
        (build(), 2, key, "must be at most 1, the index of the first block with an adapter, got 2"),
        (build(), LAYER, torch.zeros(1, 9), "the keys of the gate have 9 entries"),
    ]
    for model, layer, keys, message in cases:
        with pytest.raises(EditError) as error:
            Gate(keys, torch.ones(1), layer).install(model)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    twice = build()
    Gate(key, torch.ones(1), LAYER).install(twice)
    with pytest.raises(
        EditError, match=r"already has an adapter with a gate .* cannot be edited again; load the base model"
    ):
        Gate(key, torch.ones(1), LAYER).install(twice)
