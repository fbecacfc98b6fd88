"""The scope in mixture-of-experts models: patterns of dense models select experts, and routers stay frozen."""

from __future__ import annotations

import pytest
import torch
from installed import needs
from moe_models import FAMILIES, build
from torch import nn

from kedit_train.callbacks import ParameterScope, editing
from kedit_train.core.scope.experts import experts_per_block, routers
from kedit_train.core.scope.scope import resolve_scope
from kedit_train.errors import EditError

# transformers 4 has other names for experts, and each expert is a module of its own.
pytestmark = needs("transformers", "5.0")


def in_layer(family: str, modules: str | list[str] | None, layer: int = -1) -> set[str]:
    """Return the selected names of one layer, without the name of the layer."""
    return {name.split(".", 3)[-1] for name in resolve_scope(build(family), layer, modules)}


@pytest.mark.parametrize(
    ("family", "modules", "expected"),
    [
        ("qwen3_moe", "mlp.down_proj", {"mlp.experts.down_proj"}),
        ("qwen3_moe", "mlp.down_proj.weight", {"mlp.experts.down_proj"}),
        ("qwen3_moe", "mlp.experts.down_proj", {"mlp.experts.down_proj"}),
        ("qwen3_moe", "mlp.*_proj", {"mlp.experts.down_proj", "mlp.experts.gate_up_proj"}),
        ("mixtral", "mlp.down_proj", {"mlp.experts.down_proj"}),
        ("mixtral", "mlp", {"mlp.experts.down_proj", "mlp.experts.gate_up_proj"}),
        ("mixtral", "mlp.*", {"mlp.experts.down_proj", "mlp.experts.gate_up_proj"}),
        ("mixtral", "mlp.gate", {"mlp.gate.weight"}),
        ("mixtral", ["mlp.down_proj", "gate"], {"mlp.experts.down_proj", "mlp.gate.weight"}),
        ("qwen2_moe", "mlp.down_proj", {"mlp.experts.down_proj", "mlp.shared_expert.down_proj.weight"}),
        ("qwen2_moe", "shared_expert.down_proj", {"mlp.shared_expert.down_proj.weight"}),
        ("qwen2_moe", "shared_expert_gate", {"mlp.shared_expert_gate.weight"}),
        ("deepseek_v3", "mlp.down_proj", {"mlp.experts.down_proj", "mlp.shared_experts.down_proj.weight"}),
        ("gpt_oss", "mlp.down_proj", {"mlp.experts.down_proj", "mlp.experts.down_proj_bias"}),
        ("gpt_oss", "mlp.down_proj.weight", {"mlp.experts.down_proj"}),
        ("gpt_oss", "router.weight", {"mlp.router.weight"}),
        ("llama4", "feed_forward.down_proj", {
            "feed_forward.experts.down_proj", "feed_forward.shared_expert.down_proj.weight"
        }),
    ],
)  # fmt: skip
def test_a_pattern_selects_experts_by_their_names_in_a_dense_model(family, modules, expected):
    assert in_layer(family, modules) == expected


def test_layers_by_fraction_and_a_dense_layer_among_layers_with_experts():
    assert list(resolve_scope(build("qwen3_moe"), "0.5-1.0", "mlp.down_proj")) == [
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.2.mlp.experts.down_proj",
    ]
    assert in_layer("deepseek_v3", "mlp.down_proj", 0) == {"mlp.down_proj.weight"}


@pytest.mark.parametrize("family", FAMILIES)
def test_only_a_pattern_with_its_name_or_a_star_selects_a_router(family):
    model = build(family)
    everything = {name for name, _ in model.named_parameters()}
    gates = {f"{name}.{key}" for name, router in routers(model).items() for key, _ in router.named_parameters()}
    gates |= {name for name in everything if "shared_expert_gate" in name}
    assert len(gates) >= 2
    assert set(resolve_scope(model, modules="*")) == set(resolve_scope(model, modules=["*"])) == everything
    assert set(resolve_scope(model)) == set(resolve_scope(model, "0-2", "*.*")) | {
        name for name in everything if ".layers." not in name
    }
    assert not gates & set(resolve_scope(model))
    assert set(resolve_scope(model)) | gates == everything


def test_a_pattern_that_matches_only_routers_is_an_error():
    with pytest.raises(EditError) as error:
        resolve_scope(build("mixtral"), 1, "mlp.gat?")
    assert str(error.value) == (
        "modules='mlp.gat?' in layers=1 matches only routers, which stay frozen unless a pattern contains their name; "
        "select other modules, or set modules='gate'."
    )


def test_a_list_of_experts_is_selected_like_stacked_experts():
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = nn.Linear(3, 2)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.gate = nn.ModuleList([Expert() for _ in range(2)]), nn.Linear(3, 2)

    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": Block()})])})
    expected = {f"layers.0.mlp.experts.{i}.down_proj.{key}" for i in (0, 1) for key in ("weight", "bias")}
    selected = resolve_scope(model, 0, "mlp.down_proj")
    assert set(selected) == set(resolve_scope(model, 0)) == expected
    assert experts_per_block(selected) == {"layers.0.mlp": 2}


def test_names_of_a_dense_model_keep_their_meaning():
    # A gate that is not next to experts is an ordinary module.
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"gate": nn.Linear(2, 2), "shared_expert": nn.Linear(2, 2)})})
    assert set(resolve_scope(model, modules="mlp")) == {name for name, _ in model.named_parameters()}
    with pytest.raises(EditError, match="matches no parameter"):
        resolve_scope(model, modules="mlp.weight")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_the_number_of_experts_is_printed_and_logged(family, capsys):
    with editing(build(family), [ParameterScope("1-2", modules="mlp.down_proj")]) as edit:
        assert capsys.readouterr().out == "ParameterScope: 4 experts per layer are trained (2 layers)\n"
        assert edit.run.collect()["edit/scope/experts"] == 8.0
    with editing(build(family), [ParameterScope(1, modules="self_attn.o_proj")]) as edit:
        assert capsys.readouterr().out == ""
        assert "edit/scope/experts" not in edit.run.collect()


def test_a_router_is_one_matrix():
    model = build("mixtral")
    assert list(routers(model)) == [f"model.layers.{i}.mlp.gate" for i in range(3)]
    model.model.layers[0].mlp.gate = nn.Sequential(nn.Linear(16, 4))
    assert list(routers(model)) == [f"model.layers.{i}.mlp.gate" for i in (1, 2)]
    assert routers(nn.Linear(2, 2)) == {}
    assert torch.equal(routers(model)["model.layers.1.mlp.gate"].weight, model.model.layers[1].mlp.gate.weight)
