"""gradient_positions: the weight gets the outer products of some positions, everything else is unchanged."""

from __future__ import annotations

import pytest
import torch

from kedit_train.functional.gradient_positions import gradient_positions


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_equal_the_formula_and_values_do_not_change(bias):
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(5, 3, bias=bias).double()
    inputs = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    chosen = torch.rand(2, 4, generator=generator) < 0.5
    upstream = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    output = layer(inputs)
    limited = gradient_positions(output, inputs, layer.weight, chosen)
    assert torch.equal(limited, output)
    limited.backward(upstream)
    expected = torch.einsum("bto,bti->oi", upstream * chosen[..., None], inputs.detach())
    torch.testing.assert_close(layer.weight.grad, expected)
    torch.testing.assert_close(inputs.grad, upstream @ layer.weight.detach())
    if bias:
        torch.testing.assert_close(layer.bias.grad, (upstream * chosen[..., None]).sum((0, 1)))


def test_inputs_without_gradient_and_half_precision():
    layer = torch.nn.Linear(5, 3)
    inputs, chosen = torch.randn(1, 4, 5), torch.tensor([[True, False, False, True]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = gradient_positions(layer(inputs), inputs, layer.weight, chosen)
    assert output.dtype is torch.bfloat16
    output.float().sum().backward()
    expected = inputs[0, [0, 3]].sum(0).expand(3, 5)
    torch.testing.assert_close(layer.weight.grad, expected, atol=2e-2, rtol=2e-2)
    hidden = torch.randn(1, 4, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradient_positions(layer(hidden), hidden, layer.weight, chosen).float().sum().backward()
    assert hidden.grad.dtype is torch.float32
    torch.testing.assert_close(hidden.grad[0, 1], layer.weight.detach().sum(0), atol=2e-2, rtol=2e-2)
