"""A gate decides per row and position where an adapter acts; compared with the two models without a gate."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from installed import CACHE, needs
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer

from kedit_train.core.gate.adapted_layers import find_adapted_layers
from kedit_train.core.gate.gate import Gate, find_gate
from kedit_train.core.gate.gate_cache import _GateLayer
from kedit_train.errors import EditError

LAYER, CUT = 1, 3  # The gate reads the inputs of block 1; the key is the state at position 3 of row 0.
IDS = torch.tensor([[5, 7, 11, 13, 17, 3], [2, 4, 8, 16, 32, 60], [9, 7, 11, 13, 17, 3]])


def adapted(base: Any, modules: Any = ("down_proj", "q_proj"), **options: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 32, "target_modules": list(modules), "layers_to_transform": [1, 2]}
    model = get_peft_model(base, LoraConfig(**{**settings, "task_type": "CAUSAL_LM", **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    return model.eval()


def key_of(base: Any, ids: Tensor, position: int) -> Tensor:
    with torch.no_grad():
        return base(input_ids=ids[None], output_hidden_states=True).hidden_states[LAYER][0, position][None]


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32)


@pytest.fixture(params=["llama", "qwen3", "gemma3", "gpt2"])
def models(request: Any, tiny: Any) -> tuple[Any, Any, Gate]:
    """A model, the same model with an adapter and a gate that opens at position 3 of row 0, and the gate."""
    gpt2 = request.param == "gpt2"
    base = tiny(request.param, **{"n_layer" if gpt2 else "num_hidden_layers": 3}).eval()
    model = adapted(copy.deepcopy(base), ("c_proj", "c_attn") if gpt2 else ("down_proj", "q_proj"), fan_in_fan_out=gpt2)
    gate = Gate(key_of(base, IDS[0], CUT), torch.tensor([1e-3]), LAYER)
    gate.install(model)
    return base, model, gate


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    return model(input_ids=ids, **inputs).logits


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
        (build(), 2, key, "must be at most 1, the first block with an adapter, got 2"),
        (build(), LAYER, torch.zeros(1, 9), "the keys of the gate have 9 entries"),
    ]
    for model, layer, keys, message in cases:
        with pytest.raises(EditError) as error:
            Gate(keys, torch.ones(1), layer).install(model)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    twice = build()
    Gate(key, torch.ones(1), LAYER).install(twice)
    with pytest.raises(EditError, match=r"already gated and cannot be edited again; load the base model"):
        Gate(key, torch.ones(1), LAYER).install(twice)


def test_the_adapted_layers_of_a_model_are_found(tiny):
    found = find_adapted_layers(adapted(tiny("llama", num_hidden_layers=3)))
    assert (found.first, len(found.layers), len(found.blocks)) == (1, 4, 3)
