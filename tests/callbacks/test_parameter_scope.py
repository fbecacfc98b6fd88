"""ParameterScope keeps everything outside the scope bit for bit, with any optimizer."""

from __future__ import annotations

import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from kedit_train import catalog
from kedit_train.callbacks import ParameterScope, editing
from kedit_train.errors import EditError

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def bits(model: nn.Module) -> dict[str, Tensor]:
    """View parameters and buffers as integers, so that signed zeros and NaN are compared exactly."""
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: v.detach().clone().view(INTEGERS.get(v.dtype, v.dtype)) for n, v in values.items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def train(edit, model, optimizer, ids, steps=5) -> None:
    for _ in range(steps):
        edit.before_step()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, weight_decay=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, weight_decay=0.5),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("everything", [False, True], ids=["scope only", "every parameter"])
def test_everything_outside_the_scope_stays_bit_for_bit(make, ids, optimizer, dtype, everything):
    model = make("llama", dtype)
    before = bits(model)
    with editing(model, [ParameterScope(1, modules="mlp.down_proj")]) as edit:
        # Trainers pass every parameter to the optimizer; the frozen ones have no gradient.
        trained = list(model.parameters()) if everything else edit.parameters()
        train(edit, model, OPTIMIZERS[optimizer](trained), ids)
    assert moved(before, bits(model)) == {"model.layers.1.mlp.down_proj.weight"}


@pytest.mark.parametrize(
    ("layers", "modules", "expected"),
    [
        (0, "mlp.c_proj", {"transformer.h.0.mlp.c_proj.weight", "transformer.h.0.mlp.c_proj.bias"}),
        (-1, "mlp.c_proj.weight", {"transformer.h.1.mlp.c_proj.weight"}),
        (None, "wte", {"transformer.wte.weight"}),
    ],
)
def test_scopes_of_gpt2(make, ids, layers, modules, expected):
    model = make("gpt2")
    before = bits(model)
    with editing(model, [ParameterScope(layers, modules=modules)]) as edit:
        train(edit, model, OPTIMIZERS["adamw"](model.parameters()), ids)
    # wte and lm_head are tied; named_parameters() returns them once.
    assert moved(before, bits(model)) == expected


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_the_adapters_of_one_layer_are_trained(make, ids):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=["down_proj", "q_proj"]))
    before = bits(model)
    with editing(model, [ParameterScope(1, modules="down_proj")]) as edit:
        assert edit.run.describe_scope()["parameters"] == 2 * (16 + 32)
        train(edit, model, OPTIMIZERS["adamw"](edit.parameters()), ids)
    assert {name.split(".down_proj.")[1] for name in moved(before, bits(model))} == {
        "lora_A.default.weight",
        "lora_B.default.weight",
    }
    assert all(".layers.1.mlp.down_proj." in name for name in moved(before, bits(model)))


def test_a_pretrained_model_changes_in_the_scope_only(factlm):
    model = AutoModelForCausalLM.from_pretrained(factlm)
    text = AutoTokenizer.from_pretrained(factlm)(["The mother tongue of Danielle Darrieux is French"])
    ids = torch.tensor(text["input_ids"])
    before = bits(model)
    with editing(model, [ParameterScope(0.7, modules="mlp.down_proj")]) as edit:
        scope = set(edit.run.scope)
        train(edit, model, OPTIMIZERS["adamw"](model.parameters()), ids, steps=2)
    assert len(scope) == 1
    assert moved(before, bits(model)) == scope


def test_drift_is_relative_to_the_reference_weights(make, ids):
    model = make()
    start = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    with editing(model, [scope := ParameterScope(1, modules="up_proj")], log_every_n_steps=1) as edit:
        assert scope.metrics(edit.run) == {"edit/scope/parameters": 512.0, "edit/drift/relative": 0.0}
        train(edit, model, OPTIMIZERS["sgd"](edit.parameters()), ids, steps=3)
        expected = (model.model.layers[1].mlp.up_proj.weight - start).norm() / start.norm()
        assert edit.history[-1]["edit/drift/relative"] == pytest.approx(expected.item(), rel=1e-5)
        assert [row["step"] for row in edit.history] == [1, 2, 3]


def test_any_module_can_be_scoped(ids):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).eval()
    before = bits(net)
    with editing(net, [ParameterScope(modules="2.weight")]) as edit:
        optimizer = OPTIMIZERS["adamw"](net.parameters())
        for _ in range(5):
            edit.before_step()
            net(torch.randn(8, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert moved(before, bits(net)) == {"2.weight"}


@pytest.mark.parametrize("arguments", [{}, {"layers": None, "modules": None}, {"full_precision": False}])
def test_a_scope_without_layers_and_modules_is_an_error(arguments):
    """Such a scope would silently be full fine-tuning."""
    with pytest.raises(EditError) as error:
        ParameterScope(**arguments)
    assert str(error.value) == (
        "ParameterScope: layers or modules must be set, got neither, so every parameter would be trained; choose "
        'a scope, for example ParameterScope(0.7, modules="mlp.down_proj"). For full fine-tuning, use modules="*".'
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modules": ["mlp", ""]}, "modules must be a pattern"),
        ({"layers": ["0.5", ""]}, "each value in layers must be an index"),
        ({"layers": "late"}, "layers must be an index"),
    ],
)
def test_a_scope_that_no_model_can_have_is_an_error_of_the_constructor(arguments, message):
    with pytest.raises(EditError, match=f"^ParameterScope: {message}"):
        ParameterScope(**arguments)


def test_full_fine_tuning_is_named_with_a_star(make):
    model = make()
    with editing(model, [ParameterScope(modules="*")]) as edit:
        assert set(edit.run.scope) == {name for name, _ in model.named_parameters()}


def test_the_yaml_fragment_has_a_scope():
    fragment = yaml.safe_load(catalog.find("callbacks", "parameter_scope").read_text())
    (entry,) = fragment["trainer"]["callbacks+"]
    scope = ParameterScope(**entry["init_args"])
    assert (scope.layers, scope.modules) == ("0.5-0.8", "mlp.down_proj")


@pytest.mark.parametrize("second", [{"layers": 0}, {"layers": 1}, {"modules": "*"}])
def test_two_scopes_on_one_model_are_an_error(make, second):
    with pytest.raises(EditError) as error, editing(make(), [ParameterScope(0), ParameterScope(**second)]):
        pass
    assert str(error.value) == (
        "ParameterScope: there are two callbacks of this class on this model; use one ParameterScope "
        "with all layers and modules."
    )
