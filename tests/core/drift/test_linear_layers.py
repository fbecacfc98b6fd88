"""Which parameters are found as weights of linear layers, and which are refused."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers.pytorch_utils import Conv1D

from kedit_train.core.drift.linear_layers import find_linear_layers
from kedit_train.errors import EditError


@pytest.mark.parametrize(("family", "transposed"), [("llama", False), ("gpt2", True)])
def test_the_weights_of_a_model_are_found_with_their_layout(tiny, family, transposed):
    model = tiny(family)
    scope = {n: p for n, p in model.named_parameters() if n.endswith("weight") and ".mlp." in n}
    layers = find_linear_layers(model, scope)
    assert list(layers) == list(scope)
    for name, layer in layers.items():
        assert layer.transposed == transposed
        assert layer.modules == (model.get_submodule(name.removesuffix(".weight")),)


def test_a_shared_weight_has_several_modules():
    modules = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.Embedding(3, 3), Conv1D(5, 3)])
    modules[1].weight = modules[0].weight
    layers = find_linear_layers(modules, {"0.weight": modules[0].weight, "3.weight": modules[3].weight})
    assert layers["0.weight"].modules == (modules[0], modules[1])
    assert layers["3.weight"].as_matrix(modules[3].weight).shape == (5, 3)
    modules[2].weight = modules[0].weight
    with pytest.raises(EditError, match=r"these are not: 0\.weight; select weights only"):
        find_linear_layers(modules, {"0.weight": modules[0].weight})


def test_other_parameters_are_refused_by_name(tiny):
    model = tiny("gpt2")
    with pytest.raises(EditError, match=r"these are not: transformer\.wte\.weight, .* and \d+ more; .*\.weight'\)"):
        find_linear_layers(model, dict(model.named_parameters()))
    linear = nn.Linear(3, 3)
    with pytest.raises(EditError, match="these are not: bias"):
        find_linear_layers(linear, {"bias": linear.bias})


def test_only_weights_that_are_sharded_along_another_dimension_are_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Linear(4, 2, bias=False)
        mesh, weight = init_device_mesh("cpu", (1,)), model.weight.detach()
        model.weight = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
        assert list(find_linear_layers(model, {"weight": model.weight})) == ["weight"]
        model.weight = nn.Parameter(distribute_tensor(weight, mesh, [Shard(1)]))
        with pytest.raises(
            EditError, match=r"the parameter 'weight' must be sharded along its first dimension, got .*Shard\(dim=1\)"
        ):
            find_linear_layers(model, {"weight": model.weight})
    finally:
        dist.destroy_process_group()
