"""The frozen layers of a model: where they end, and which changes of them are noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from kedit_train.core.cache.layer_stack import Prefix, PrefixState, call_arguments, find_prefix
from kedit_train.errors import EditError

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def build(**config: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(**{"vocab_size": 61, **sizes, **config}))


def prefix_of(model: Any, pattern: str) -> Prefix:
    """Freeze everything but the parameters with ``pattern`` in their names, and find the frozen layers."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(pattern in name)
    trained = [p for p in model.parameters() if p.requires_grad]
    return find_prefix(model, trained, IDS, lambda: model(input_ids=IDS))


@pytest.mark.parametrize(("pattern", "cut"), [("layers.2.mlp", 2), ("layers.3.", 3), ("lm_head", 3), ("layers.1", 1)])
def test_the_cut_is_the_first_trained_layer_or_the_last_layer(pattern: str, cut: int) -> None:
    model = build()
    prefix = prefix_of(model, pattern)
    assert prefix.backbone is model.model
    assert prefix.layers == list(model.model.layers)
    assert prefix.cut == cut
    below = {n for n, _ in model.named_parameters() if n.startswith(tuple(f"model.layers.{i}." for i in range(cut)))}
    assert set(prefix.parameters) == below | {"model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layers.0.mlp", "in layer 0 is trained"),
        ("embed_tokens", "is trained and is used before layer 3"),
    ],
)
def test_a_trained_tensor_before_the_layers_is_an_error(pattern: str, message: str) -> None:
    with pytest.raises(EditError, match=message):
        prefix_of(build(), pattern)


def test_a_model_without_a_stack_of_layers_is_an_error() -> None:
    plain = nn.Sequential(nn.Embedding(61, 4), nn.Linear(4, 4))
    with pytest.raises(EditError, match=r"exactly one stack of layers .* but Sequential has none; remove PrefixCache"):
        find_prefix(plain, plain.parameters(), IDS, lambda: plain(IDS))


def test_no_hook_is_left_on_the_model() -> None:
    model = build()
    prefix_of(model, "layers.3.")
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.model.layers.modules())


def test_arguments_of_a_call_are_named_and_none_is_left_out() -> None:
    model = build()
    named = call_arguments(model.model, (IDS,), {"attention_mask": None, "use_cache": False, "extra": 1})
    assert named.keys() == {"input_ids", "use_cache", "extra"}
    assert named["input_ids"] is IDS


def test_changes_of_tensors_modules_and_hooks_are_noticed() -> None:
    model = build()
    state = PrefixState(model, prefix_of(model, "layers.3."))
    assert state.unchanged_modules()
    assert not state.is_trained()
    assert state.changed_tensor() is None
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2.0)
    assert state.changed_tensor() == "model.layers.0.mlp.up_proj.weight"
    assert state.changed_tensor() is None
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight.mul_(2.0)
    assert state.changed_tensor() is None
    model.model.rotary_emb.inv_freq.mul_(1.0)
    assert state.changed_tensor() is None
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    assert state.is_trained()
    model.model.layers[0].register_forward_hook(lambda module, args, output: output)
    assert not state.unchanged_modules()
