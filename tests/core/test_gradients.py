"""A loss whose gradient does not reach the scope is an error at the first optimizer step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conformance.hosts import HOSTS
from torch import Tensor, nn

from kedit_train import world
from kedit_train.callbacks import EditCallback, ParameterScope, WeightAnchor, editing
from kedit_train.data import EditDataset
from kedit_train.errors import EditError
from kedit_train.evaluation_mode import evaluation_mode
from kedit_train.pretrained import is_causal

SLOW = [pytest.param(host, marks=pytest.mark.slow) for host in ("SFTTrainer", "Fabric")]


class Detached(nn.Module):
    """A layer whose output has no gradient, like a kernel for inference."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs).detach()


class NoStep(EditCallback):
    """Fails after an optimizer step."""

    def after_step(self, run: Any) -> None:
        raise AssertionError(f"step {run.step} was taken")


@pytest.mark.parametrize("host", ["Trainer", "Lightning", "loop", *SLOW])
def test_a_scope_behind_a_detached_output_is_an_error_before_the_first_step(host: str) -> None:
    model, tokenizer = world.load()
    for index in (2, 3):
        model.model.layers[index].mlp.down_proj = Detached(model.model.layers[index].mlp.down_proj)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    # Without this call, torch itself would refuse the backward pass, because the loss would have no gradient at all.
    model.enable_input_require_grads()
    used = [ParameterScope("2-3", modules="mlp.down_proj.layer"), NoStep()]
    with pytest.raises(
        EditError, match=r"^no gradient has reached model\.layers\.2\S+ or any other of the 2 parameters"
    ) as error:
        HOSTS[host](model, tokenizer, EditDataset(world.edits(n=4)), used, 2)
    assert "\n" not in str(error.value)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def step(model: nn.Module, loss: Any, steps: int = 1, modules: str = "*", callbacks: Any = ()) -> Any:
    """Take optimizer steps in a plain loop. ``loss`` is a function of the step number, or None for no backward."""
    with editing(model, [ParameterScope(modules=modules), *callbacks]) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=1.0)
        for number in range(steps):
            edit.before_step()
            value = loss(number)
            if value is not None:
                value.backward()
            optimizer.step()
            optimizer.zero_grad()
        return edit.run


def test_a_step_without_backward_is_an_error() -> None:
    with pytest.raises(
        EditError, match=r"^no gradient has reached weight or any other of the 2 parameters.*call backward\(\)"
    ):
        step(nn.Linear(2, 2), lambda number: None)
    with pytest.raises(EditError, match=r"^no gradient has reached weight, the parameter in scope"):
        step(nn.Linear(2, 2, bias=False), lambda number: None)


def test_one_parameter_with_a_gradient_is_enough() -> None:
    model = nn.Linear(2, 2)
    assert step(model, lambda number: model.bias.sum()).step == 1


def test_a_gradient_of_zeros_is_allowed() -> None:
    model = nn.Linear(2, 2)
    # A clipped loss of learned edits has such gradients.
    assert step(model, lambda number: model(torch.zeros(1, 2)).sum() * 0.0).step == 1


class Clip(EditCallback):
    """Stands for a token loss with a clip."""

    def provides(self) -> set[str]:
        return {"token_clip"}


@pytest.mark.parametrize("backward", [True, False])
def test_a_penalty_on_the_weights_does_not_hide_the_missing_gradient(backward: bool) -> None:
    """The penalty is zero at the reference weights, and so is its gradient."""
    model, other = nn.Linear(2, 2), nn.Parameter(torch.ones(()))
    with pytest.raises(EditError, match="no gradient has reached weight"):
        step(model, lambda number: other * 1.0 if backward else None, callbacks=[WeightAnchor(strength=1.0)])
    assert step(model, lambda number: model.bias.sum(), callbacks=[WeightAnchor(strength=1.0)]).step == 1
    assert step(model, lambda number: model.bias.sum() * 0, callbacks=[WeightAnchor(strength=1.0), Clip()]).step == 1


def test_only_the_first_step_needs_a_gradient() -> None:
    model = nn.Linear(2, 2)
    assert step(model, lambda number: model.bias.sum() if number == 0 else None, steps=2).step == 2


def test_experts_that_receive_no_token_are_allowed() -> None:
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})})
    step(model, lambda number: None, modules="experts.0")
    model.add_module("other", nn.Linear(2, 2))
    with pytest.raises(EditError, match="no gradient has reached other"):
        step(model, lambda number: None, modules="other")


class Packing(nn.Linear):
    """Stands for a 4-bit layer of bitsandbytes on a CPU: a call in evaluation mode packs the weights."""

    def __init__(self) -> None:
        super().__init__(4, 4, bias=False)
        self.weight.requires_grad_(False)
        self.weight.quant_state = SimpleNamespace(packing_format_for_cpu=False)  # type: ignore[attr-defined]
        self.support_avx512bf16_for_cpu = 1

    def forward(self, input: Tensor) -> Tensor:
        state = self.weight.quant_state
        if self.support_avx512bf16_for_cpu and not self.training and not torch.is_grad_enabled():
            state.packing_format_for_cpu = True
        output = super().forward(input)
        return output.detach() if state.packing_format_for_cpu else output


def packing() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), Packing())


@torch.no_grad()
def use(model: nn.Module) -> None:
    model.eval()(torch.ones(1, 4))


def is_packed(model: Any) -> bool:
    return model[1].weight.quant_state.packing_format_for_cpu


def test_layers_that_pack_their_weights_keep_their_gradient_during_an_edit() -> None:
    model = packing()

    def loss(number: int) -> Tensor:
        # An evaluation between two steps must not pack the weights again.
        use(model)
        assert not is_packed(model)
        return model.train()(torch.ones(1, 4)).sum()

    before = model[0].weight.detach().clone()
    step(model, loss, steps=2, modules="0")
    assert not torch.equal(model[0].weight, before)
    # After the edit, the layer may pack its weights again.
    use(model)
    assert is_packed(model)


def test_packed_weights_are_an_error_before_training() -> None:
    model = packing()
    use(model)
    message = r"4-bit weights of the layer '1' must not be packed .* no gradient .* load the model again"
    with pytest.raises(EditError, match=message) as error:
        step(model, lambda number: None, modules="0")
    assert "\n" not in str(error.value)


def test_evaluation_mode_packs_no_weights() -> None:
    model = packing()
    with evaluation_mode(model), torch.no_grad():
        model(torch.ones(1, 4))
    assert not is_packed(model)
    assert model.training
    use(model)
    assert is_packed(model)


def test_the_test_of_a_loaded_model_packs_no_weights() -> None:
    model = world.load()[0]
    layer = packing()[1]
    model.model.layers[0].mlp.register_module("extra", layer)
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, args, output: output + 0 * layer(output[..., :4]).sum()
    )
    assert is_causal(model)
    assert not layer.weight.quant_state.packing_format_for_cpu
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4]]))
    assert layer.weight.quant_state.packing_format_for_cpu
