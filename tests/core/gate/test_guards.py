"""Only layers that a gate really switches are gated, and a gated model refuses what would lose the gate."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import warnings
from typing import Any

import peft
import pytest
import torch
from core.gate.test_gate import CUT, IDS, LAYER, adapted, bits, key_of, logits
from installed import needs
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import Tensor

from kedit_train.core.gate.gate import Gate, find_gate
from kedit_train.errors import EditError

BLOCKS = {"layers_to_transform": None, "target_modules": r".*\.[12]\.mlp\.down_proj"}


def gate_for(base: Any, radius: float = 1e-3) -> Gate:
    return Gate(key_of(base, IDS[0], CUT), torch.tensor([radius]), LAYER)


def traces(model: Any) -> dict[str, Any]:
    """Return the hooks and the attributes of all modules."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return {name: ({k: len(getattr(m, k)) for k in kinds}, set(m.__dict__)) for name, m in model.named_modules()}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (
            {"target_modules": [], "target_parameters": ["down_proj.weight"], "layers_to_transform": None},
            "ParamWrapper",
        ),
        pytest.param(BLOCKS, "BdLoraLinearVariant", marks=needs("peft", "0.21")),
        ({"alora_invocation_tokens": [1]}, "ALoraLinearVariant"),
    ],
)
def test_a_layer_whose_output_a_gate_does_not_switch_is_refused(tiny, options, name):
    base = tiny("llama", num_hidden_layers=3).eval()
    settings = {"r": 4, "lora_alpha": 32, "target_modules": ["down_proj"], "layers_to_transform": [1, 2], **options}
    if name == "BdLoraLinearVariant":
        settings["use_bdlora"] = peft.BdLoraConfig(target_modules_bd_b=["down_proj"], nblocks=2)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    before = traces(model)
    with pytest.raises(EditError, match=rf"^a gate works only with .*, but .* (is a|has) .*{name}") as error:
        gate_for(base).install(model)
    assert "\n" not in str(error.value)
    assert traces(model) == before


def test_another_adapter_name_and_an_adapter_around_an_adapter_are_refused(tiny):
    base = tiny("llama", num_hidden_layers=3).eval()
    config = LoraConfig(target_modules=["down_proj"], layers_to_transform=[1, 2], task_type="CAUSAL_LM")
    named = get_peft_model(copy.deepcopy(base), config, adapter_name="mine")
    with pytest.raises(EditError, match=r"^the adapter must have the name .default., got 'mine'"):
        gate_for(base).install(named)
    model = adapted(copy.deepcopy(base))
    gate = gate_for(base)
    gate.install(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about the second adapter.
        outer = get_peft_model(model, LoraConfig(target_modules=["up_proj"], task_type="CAUSAL_LM"))
    assert find_gate(outer) is gate
    with pytest.raises(EditError, match="one adapter around another"):
        gate_for(base).install(outer)


def test_dora_is_switched(tiny):
    base = tiny("llama", num_hidden_layers=3).eval()
    model = adapted(copy.deepcopy(base), use_dora=True)
    gate_for(base).install(model)
    own, before = logits(model), logits(base)
    assert torch.equal(bits(own[1:]), bits(before[1:]))
    assert torch.equal(bits(own[0, :CUT]), bits(before[0, :CUT]))
    assert (own[0, CUT:] != before[0, CUT:]).any(dim=-1).all()


def in_place(layer: Any, x: Tensor) -> Tensor:
    """Add the adapter to the output of the base layer in place, as a later version of PEFT might do."""
    result = layer.base_layer(x)
    result += layer.lora_B["default"](layer.lora_A["default"](x))
    return result


def without_base_layer(layer: Any, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, layer.base_layer.weight) + layer.lora_B["default"](layer.lora_A["default"](x))


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (in_place, "the gate does not switch the output of Linear"),
        (lambda layer, x: layer.base_layer(x), "the gate does not switch the output of Linear"),
        (without_base_layer, "the PEFT class 'Linear' did not call its base layer"),
    ],
)
def test_another_forward_of_peft_is_an_error_when_the_gate_is_installed(tiny, monkeypatch, forward, message):
    base = tiny("llama", num_hidden_layers=3).eval()
    model = adapted(copy.deepcopy(base))
    before, weights = traces(model), {n: p.clone() for n, p in model.named_parameters()}
    monkeypatch.setattr(Linear, "forward", forward)
    with pytest.raises(EditError, match=message):
        gate_for(base).install(model)
    assert traces(model) == before
    assert find_gate(model) is None
    monkeypatch.undo()
    gate_for(base).install(model)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def test_the_check_changes_no_random_state_and_no_mode(tiny):
    base = tiny("llama", num_hidden_layers=3).eval()
    model = adapted(copy.deepcopy(base), lora_dropout=0.5).train()
    state = torch.get_rng_state()
    gate_for(base).install(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


def test_a_gated_adapter_is_not_merged_and_merges_after_the_gate_is_removed(tiny, tmp_path):
    base = tiny("llama", num_hidden_layers=3).eval()
    model = adapted(copy.deepcopy(base))
    before, adapted_logits = traces(model), logits(model)
    gate = gate_for(base)
    gate.install(model)
    own = logits(model)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for merge in (one.merge_and_unload, one.merge_adapter, one.unload, one.base_model.merge_and_unload):
            with pytest.raises(EditError, match="cannot be merged into the weights or unloaded; remove the gate first"):
                merge()
        assert torch.equal(bits(logits(one)), bits(own))
        one.save_pretrained(tmp_path / "saved")
        assert torch.equal(Gate.load(tmp_path / "saved").keys, gate.keys)
        if one is not model:
            find_gate(one).remove()  # type: ignore[union-attr]
            assert traces(one) == before
    gate.remove()
    assert traces(model) == before
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), adapted_logits, rtol=1e-3, atol=1e-3)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in merged.modules()]
    assert hooks == [0] * len(hooks)


def test_threads_with_the_same_gated_model_do_not_mix_their_states(tiny):
    base = tiny("llama", num_hidden_layers=3).eval()
    model = adapted(copy.deepcopy(base))
    gate = gate_for(base)
    gate.install(model)
    rows = (IDS[:1], IDS[1:2])
    expected, wrong = [logits(model, row) for row in rows], []

    def work(index: int) -> None:
        for _ in range(150):
            try:
                right = torch.equal(bits(logits(model, rows[index])), bits(expected[index]))
                opened = gate.opened_rows.tolist() == [index == 0]  # type: ignore[union-attr]
            except Exception as error:
                wrong.append(error)
            else:
                wrong.extend([] if right and opened else [index])

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_adapter_names_and_a_second_adapter_are_refused_and_the_model_stays_usable(tiny):
    base = tiny("llama", num_hidden_layers=3).eval()
    model = adapted(copy.deepcopy(base))
    gate_for(base).install(model)
    own = logits(model)
    ids = IDS[:, :2]
    with pytest.raises(EditError, match="adapter_names= cannot be used with a gate"):
        logits(model, ids, adapter_names=["__base__"] * 3)
    with pytest.raises(EditError, match="adapter_names= cannot be used with a gate"):
        model.generate(input_ids=ids, adapter_names=["default"] * 3, max_new_tokens=1, pad_token_id=0)
    with pytest.raises(EditError, match="has exactly one adapter; load the base model again for another adapter"):
        model.add_adapter("two", LoraConfig(target_modules=["up_proj"], task_type="CAUSAL_LM"))
    assert torch.equal(bits(logits(model)), bits(own))


def test_the_adapter_is_not_deleted_until_the_gate_is_removed(tiny):
    base = tiny("llama", num_hidden_layers=3).eval()
    model = adapted(copy.deepcopy(base))
    gate = gate_for(base)
    gate.install(model)
    own = logits(model)
    for delete in (model.delete_adapter, model.base_model.delete_adapter):
        with pytest.raises(EditError, match=r"the adapter of a gated model cannot be deleted.*; remove the gate"):
            delete("default")
    assert torch.equal(bits(logits(model)), bits(own))
    gate.remove()
    model.delete_adapter("default")
    assert not model.peft_config


def test_another_kind_of_adapter_is_refused(tiny):
    model = get_peft_model(tiny("llama"), PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(EditError, match=r"^a gate needs a LoRA adapter, got PREFIX_TUNING; use LoraConfig"):
        Gate(torch.zeros(1, 16), torch.ones(1), LAYER).install(model)
