"""Deltas of PEFT adapters contain merged weights, and FSDP2 shards are read and written as whole tensors."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from delta.tiny import equal_bits, state_of
from installed import needs

from kedit_train import EditDelta, EditError


def adapted(model, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    given = {"r": 2, "target_modules": ["down_proj", "q_proj"], "task_type": "CAUSAL_LM"} | options
    found = get_peft_model(copy.deepcopy(model), LoraConfig(**given))
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter += torch.randn_like(parameter) * 0.1
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_the_delta_of_an_adapter_contains_its_merged_weights(dtype, options, make, tmp_path):
    base = make(dtype)
    model = adapted(base, **options)
    before = state_of(model)
    delta = EditDelta.load(EditDelta.between(base, model).save(tmp_path / "edit.safetensors"))
    assert equal_bits(state_of(model), before)
    changed = {"self_attn.q_proj.weight", "mlp.down_proj.weight"}
    want = {f"model.layers.{i}.{name}" for i in range(2) for name in changed}
    assert set(delta.changes) == want | ({"lm_head.weight"} if "modules_to_save" in options else set())
    applied = delta.apply(copy.deepcopy(base))
    assert equal_bits(state_of(applied), state_of(model.merge_and_unload()))
    assert equal_bits(state_of(delta.revert(applied)), state_of(base))


def test_an_adapter_that_adds_zero_gives_an_empty_delta(make):
    from peft import LoraConfig, get_peft_model

    base = make()
    with torch.no_grad():
        base.get_parameter("model.layers.0.mlp.down_proj.weight")[0, :4] = -0.0
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM"))
    assert len(EditDelta.between(base, model)) == 0


def test_adapter_factors_in_a_state_dict_are_ordinary_tensors(make):
    base = adapted(make())
    trained = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter += 1.0
    delta = EditDelta.between(base.state_dict(), trained.state_dict())
    assert all("lora_B" in name for name in delta.changes)
    old = state_of(base)
    assert equal_bits(state_of(delta.apply(base)), state_of(trained))
    assert equal_bits(state_of(delta.revert(base)), old)


def test_adapters_that_cannot_be_merged_are_refused(make):
    from peft import PromptTuningConfig, get_peft_model

    base = make()
    prompts = get_peft_model(make(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(EditError, match="prompt tuning changes no weight"):
        EditDelta.between(base, prompts)
    merged = adapted(base)
    merged.merge_adapter()
    with pytest.raises(EditError, match=r"q_proj: the adapter is already merged; call unmerge_adapter\(\)"):
        EditDelta.between(base, merged)
    model = adapted(base)
    with pytest.raises(EditError, match=r"the delta was made. This model has an adapter: merge or remove it"):
        EditDelta.between(base, model).apply(model)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@needs("torch", "2.13")  # FSDP2 of torch 2.6 does not run on CPUs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sharded_parameters(one_process, dtype, make, edited):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    base, trained = make(dtype), edited(dtype)
    old, new = state_of(base), state_of(trained)
    mesh = init_device_mesh("cpu", (1,))
    for model in (base, trained):
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in base.parameters())
    delta = EditDelta.between(base, trained)
    assert delta.verify(base, full=True) == "base"
    delta.apply(base)
    gathered = {name: value.full_tensor() for name, value in base.state_dict().items()}
    assert equal_bits(gathered, new)
    ids = torch.arange(8).unsqueeze(0)
    plain = make(dtype)
    plain.load_state_dict(new)
    assert torch.equal(base(ids).logits, plain(ids).logits)
    delta.revert(base)
    assert equal_bits({name: value.full_tensor() for name, value in base.state_dict().items()}, old)
