"""The scope: which parameters layers and patterns select, and the errors when they select none."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from kedit_train.core.scope.scope import check_selection, find_layers, layer_indices, matches, resolve_scope
from kedit_train.errors import EditError


def layers_of(scope: dict) -> set[int]:
    return {int(found[1]) for name in scope if (found := re.search(r"\.(?:layers|h)\.(\d+)\.", name))}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (2, [2]),
        (0, [0]),
        (-1, [23]),
        (-24, [0]),
        ("2", [2]),
        ("-1", [23]),
        (0.0, [0]),
        (0.5, [12]),
        (0.7, [16]),
        (1.0, [23]),
        ("0.5", [12]),
        ("4-6", [4, 5, 6]),
        ("4:6", [4, 5, 6]),
        (" 4 - 6 ", [4, 5, 6]),
        ("-3--1", [21, 22, 23]),
        ("20--1", [20, 21, 22, 23]),
        ("0.5-0.6", [12, 13, 14]),
        ("0.9-1.0", [21, 22, 23]),
        ("2,4-6", [2, 4, 5, 6]),
        ([2, "4-6", -1, 0.5], [2, 4, 5, 6, 12, 23]),
        ((3, 3, 1), [1, 3]),
        (range(3), [0, 1, 2]),
        (None, list(range(24))),
    ],
)
def test_layers_are_indices_fractions_ranges_or_several(layers, expected):
    assert layer_indices(layers, 24) == expected


def test_binary_rounding_does_not_change_the_layer_of_a_fraction():
    # 0.29 * 100 is 28.999999999999996 in binary.
    assert [layer_indices(k / 100, 100) for k in range(100)] == [[k] for k in range(100)]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (24, "an index in layers must be from 0 to 23, or from -24 to -1 to count from the end, got 24."),
        (-25, "an index in layers must be from 0 to 23, or from -24 to -1 to count from the end, got -25."),
        (
            "20-30",
            "an index in layers must be from 0 to 23, or from -24 to -1 to count from the end, got 30 in '20-30'.",
        ),
        *(
            (
                value,
                f"a fraction in layers must be in [0, 1], got {value}; if you mean an index, write it without a "
                "decimal point.",
            )
            for value in (1.5, -0.1, float("nan"))
        ),
        ("6-4", "a range in layers must start at its lower layer, got '6-4'; write '4-6'."),
        ([], "layers must select at least one layer between 0 and 23, got []."),
        (True, "each value in layers must be an index (5, -1), a fraction (0.7) or a range ('4-6'), got True."),
        ([None], "each value in layers must be an index (5, -1), a fraction (0.7) or a range ('4-6'), got None."),
        ([[1, 2]], "each value in layers must be an index (5, -1), a fraction (0.7) or a range ('4-6'), got [1, 2]."),
        (
            nn.Identity(),
            "each value in layers must be an index (5, -1), a fraction (0.7) or a range ('4-6'), got Identity().",
        ),
        *(
            (
                text,
                "layers must be an index (5, -1), a fraction (0.7), a range ('4-6', '0.5-0.75'), or several of these "
                f"separated by commas ('2,4-6'), got {text!r}.",
            )
            for text in ("", " ", "last", "4-", "4,,5", "1e-1")
        ),
        *(
            (
                [1, text],
                "each value in layers must be an index (5, -1), a fraction (0.7) or a range ('4-6'), got "
                f"{text!r}{', which is blank' if isinstance(text, str) else ''}.",
            )
            for text in ("", " ", "\u200b", None, b"1")
        ),
        *(
            (
                value,
                f"each value in layers must be an index (5, -1), a fraction (0.7) or a range ('4-6'), got {value!r}.",
            )
            for value in (b"1", {1: 2})
        ),
    ],
)
def test_invalid_layers_are_errors(layers, message):
    with pytest.raises(EditError) as error:
        layer_indices(layers, 24)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("layers", "advice"),
    [("6-4", "4-6"), ("0.9-0.3", "0.3-0.9"), (["2", "1, -1--3"], "-3--1")],
)
def test_a_reversed_range_is_an_error_without_a_model(layers, advice):
    with pytest.raises(EditError, match=f"must start at its lower layer, got .*; write '{advice}'"):
        check_selection(layers, None)


@pytest.mark.parametrize("layers", ["4-6", "0.5-0.5", "5--1", "-1-5", "0.9-3", "-3--1", "1-0.3"])
def test_ranges_that_can_only_be_compared_in_a_model_are_accepted_without_one(layers):
    check_selection(layers, None)


@pytest.mark.parametrize("modules", ["mlp.down_proj", "layers.2.mlp.down_proj", "model.layers.2.mlp.down_proj.weight"])
def test_layer_2_is_never_layer_20(tiny, modules):
    model = tiny("llama", num_hidden_layers=24)
    assert list(resolve_scope(model, 2, modules)) == ["model.layers.2.mlp.down_proj.weight"]
    if "layers" in modules:
        assert list(resolve_scope(model, None, modules)) == ["model.layers.2.mlp.down_proj.weight"]


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("mlp.c_proj", "h.0.mlp.c_proj.bias", True),
        ("c_proj", "h.0.mlp.c_proj_extra.bias", False),
        ("h.1", "h.11.mlp.weight", False),
        ("*_proj", "h.0.attn.c_proj.weight", True),
        ("*", "anything", True),
        ("attn.*.bias", "h.0.attn.c_proj.bias", True),
        ("attn.*.bias", "h.0.attn.inner.c_proj.bias", False),
        ("h.?.attn", "h.5.attn.weight", True),
        ("h.?.attn", "h.15.attn.weight", False),
        ("h.[12].attn", "h.1.attn.weight", True),
        ("Attn", "h.0.attn.weight", False),
        ("mlp.", "h.0.mlp.weight", False),
        ("", "h.0.mlp.weight", False),
    ],
)
def test_patterns_are_compared_part_by_part(pattern, name, expected):
    assert matches(name, pattern) is expected


def test_a_module_pattern_includes_the_bias_and_a_weight_pattern_does_not(tiny):
    model = tiny("gpt2")
    both = ["transformer.h.1.mlp.c_proj.weight", "transformer.h.1.mlp.c_proj.bias"]
    assert list(resolve_scope(model, 1, "mlp.c_proj")) == both
    assert list(resolve_scope(model, -1, "mlp.c_proj.weight")) == both[:1]
    assert list(resolve_scope(model, 1, "c_proj.weight")) == ["transformer.h.1.attn.c_proj.weight", both[0]]


def test_several_modules_in_several_layers(tiny):
    scope = resolve_scope(tiny("llama", num_hidden_layers=24), "0.5-0.6", ["self_attn.[qk]_proj", "mlp"])
    assert layers_of(scope) == {12, 13, 14}
    assert len(scope) == 3 * (2 + 3)


def test_none_selects_everything_and_layers_alone_select_whole_layers(tiny):
    model = tiny("llama")
    assert list(resolve_scope(model)) == [name for name, _ in model.named_parameters()]
    whole = [name for name, _ in model.named_parameters() if name.startswith("model.layers.1.")]
    assert list(resolve_scope(model, 1)) == whole


@pytest.mark.parametrize("modules", ["lm_head", "embed_tokens", "lm_head.weight", ["lm_head", "embed_tokens"]])
def test_a_tied_weight_matches_both_names_and_is_returned_once(tiny, modules):
    model = tiny("llama-tied")
    scope = resolve_scope(model, None, modules)
    assert list(scope) == ["model.embed_tokens.weight"]
    assert scope["model.embed_tokens.weight"] is model.lm_head.weight


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_in_a_model_with_adapters_only_adapters_are_selected(tiny):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(tiny("llama"), lora)
    assert {name.split(".")[-3] for name in resolve_scope(model)} == {"lora_A", "lora_B"}
    scope = resolve_scope(model, 1, "mlp.down_proj")
    assert list(scope) == [f"base_model.model.model.layers.1.mlp.down_proj.lora_{x}.default.weight" for x in "AB"]
    with pytest.raises(EditError) as error:
        resolve_scope(model, 1, "mlp.up_proj")
    assert str(error.value) == (
        "modules='mlp.up_proj' in layers=1 matches only frozen parameters; unfreeze them, or select other modules. "
        "In a model with PEFT adapters, select modules that have an adapter."
    )
    with pytest.raises(EditError, match=r"modules='mlp.up_proj' in layers=1 matches only frozen"):
        resolve_scope(model, 1, ["mlp.down_proj", "mlp.up_proj"])


def test_a_pattern_without_a_match_is_an_error_with_examples(tiny):
    with pytest.raises(EditError) as error:
        resolve_scope(tiny("llama"), None, ["mlp", "fc_out"])
    assert str(error.value) == (
        "modules='fc_out' matches no parameter of LlamaForCausalLM; choose from these parameters: "
        "model.embed_tokens.weight, model.layers.*.self_attn.q_proj.weight, model.layers.*.self_attn.k_proj.weight, "
        "model.layers.*.self_attn.v_proj.weight, model.layers.*.self_attn.o_proj.weight, "
        "model.layers.*.mlp.gate_proj.weight, ..."
    )
    with pytest.raises(EditError, match=r"^modules='lm_head' matches no parameter in layers=1 of Llama"):
        resolve_scope(tiny("llama"), 1, "lm_head")
    with pytest.raises(EditError, match=r"choose from these parameters: weight$"):
        resolve_scope(nn.Linear(2, 2, bias=False), None, "nothing")


@pytest.mark.parametrize(
    "modules",
    [[], (), "", " ", "\u200b", 3, b"mlp", {"mlp": 1}, ["mlp", ""], ["mlp", " "], ("mlp", None), ["mlp", 3], [["mlp"]]],
)
def test_modules_that_are_not_patterns_are_an_error(tiny, modules):
    with pytest.raises(EditError) as error:
        resolve_scope(tiny("llama"), None, modules)
    assert str(error.value) == (
        'modules must be a pattern (for example "mlp.down_proj"), a list of patterns, or None for all modules, and '
        f"neither a pattern nor the list may be empty, got {modules!r}."
    )


def test_models_without_one_stack_of_layers(tiny):
    plain = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    assert list(resolve_scope(plain, None, "0")) == ["0.weight", "0.bias"]
    with pytest.raises(EditError) as error:
        resolve_scope(plain, 0)
    assert str(error.value) == (
        "layers= needs a model with exactly one stack of layers, but Sequential has no stack of layers; remove layers= "
        'and select parameters by their full names, for example modules="encoder.2.linear.*"'
    )
    import transformers

    seq2seq = tiny("t5", transformers.AutoModelForSeq2SeqLM)
    with pytest.raises(EditError) as error:
        resolve_scope(seq2seq, 0)
    assert str(error.value) == (
        "layers= needs a model with exactly one stack of layers, but T5ForConditionalGeneration has several stacks of "
        "layers (encoder.block, decoder.block); remove layers= and select parameters by their full names, for example "
        'modules="encoder.block.*"'
    )
    assert list(resolve_scope(seq2seq, None, "decoder.block.1.layer.2.DenseReluDense.wo"))


def test_the_stack_with_the_length_in_the_configuration_is_used(tiny):
    model = tiny("mixtral", num_hidden_layers=3)
    assert find_layers(model) == ("model.layers", 3)
    model.towers = nn.ModuleList([nn.Linear(1, 1)])
    assert find_layers(model) == ("model.layers", 3)
    model.others = nn.ModuleList([nn.Linear(1, 1) for _ in range(3)])
    with pytest.raises(EditError, match=r"several stacks of layers \(model\.layers, others\)"):
        find_layers(model)


def test_a_custom_module_with_a_stack_of_layers():
    class Forecaster(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(4)])
            self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)

    assert list(resolve_scope(Forecaster(), "1-2", "0.weight")) == ["blocks.1.0.weight", "blocks.2.0.weight"]
    assert "frozen" not in resolve_scope(Forecaster())


def test_a_model_that_encodes_texts_and_images_but_predicts_no_text_has_no_language_part():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(text_config=sizes, vision_config=sizes | {"image_size": 16, "patch_size": 4})
    assert len(resolve_scope(CLIPModel(config), modules="mlp.fc1.weight")) == 4
