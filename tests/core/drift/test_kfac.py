"""K-FAC factors, compared with gradients of every token by itself and with the exact expectation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core.drift.drift_runs import SCOPES, SEQUENCES, run_on
from torch import Tensor
from torch.nn import functional as F

from kedit_train.core.drift.kfac import KFACFactors, kfac_factors
from kedit_train.core.drift.linear_layers import find_linear_layers
from kedit_train.core.drift.second_moments import SecondMoment
from kedit_train.errors import EditError


def factors_by_hand(model: Any, name: str, labels: dict[tuple[int, ...], list[int]]) -> tuple[Tensor, Tensor]:
    """Return E[a aT] and E[g gT] for these labels, reading one sequence at a time."""
    module = model.get_submodule(name.removesuffix(".weight"))
    inputs, gradients = [], []
    for sequence in SEQUENCES:
        record: dict[str, Any] = {}
        handle = module.register_forward_hook(lambda _, args, out, record=record: record.update(a=args[0][0], y=out))
        logits = model(input_ids=torch.tensor([sequence])).logits[0]
        handle.remove()
        loss = F.cross_entropy(logits, torch.tensor(labels[tuple(sequence)]), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, record["y"])
        inputs.append(record["a"].detach().double())
        gradients.append(gradient[0].double())
    a, g = torch.cat(inputs), torch.cat(gradients)
    return a.T @ a / len(a), g.T @ g / len(g)


@pytest.mark.parametrize("family", SCOPES)
def test_factors_use_sampled_labels_and_do_not_depend_on_the_batch_size(tiny, family):
    model = tiny(family).eval()
    run = run_on(model, SCOPES[family])
    layers = find_linear_layers(model, run.scope)
    generator, labels = torch.Generator().manual_seed(3), {}
    for sequence in SEQUENCES:
        numbers = torch.rand(len(sequence), generator=generator, dtype=torch.float64)
        with torch.no_grad():
            cumulative = model(input_ids=torch.tensor([sequence])).logits[0].double().softmax(-1).cumsum(-1)
        labels[tuple(sequence)] = [int((c <= u).sum()) for c, u in zip(cumulative, numbers, strict=True)]
    for batch_size in (1, 3):
        factors = kfac_factors(run, layers, SEQUENCES, batch_size=batch_size, seed=3)
        for name, layer in layers.items():
            a, s = factors_by_hand(model, name, labels)
            assert factors.inputs[name].count == factors.gradients[name].count == 13
            torch.testing.assert_close(factors.inputs[name].mean.double(), a, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(factors.gradients[name].mean.double(), s, rtol=1e-3, atol=1e-6)
            assert (len(s), len(a)) == layer.as_matrix(run.scope[name]).shape
    assert all(p.grad is None for p in model.parameters())


def test_labels_are_sampled_with_the_models_probabilities(tiny):
    """In expectation, the trace of the gradient factor is that of the exact Gauss-Newton matrix."""
    model = tiny("llama", num_hidden_layers=1).eval()
    run = run_on(model, ["mlp.down_proj"])
    layers = find_linear_layers(model, run.scope)
    (name,) = layers
    sampled = [
        float(kfac_factors(run, layers, SEQUENCES * 8, batch_size=32, seed=seed).gradients[name].mean.trace())
        for seed in (0, 1)
    ]
    assert sampled[0] != sampled[1]
    # The exact trace: the sum over tokens and labels of p(label) |g_label|^2.
    module, total, count = model.get_submodule(name.removesuffix(".weight")), 0.0, 0
    for sequence in SEQUENCES:
        record: dict[str, Any] = {}
        handle = module.register_forward_hook(lambda _, args, out, record=record: record.update(y=out))
        logits = model(input_ids=torch.tensor([sequence])).logits[0]
        handle.remove()
        # Positions do not mix after the last MLP, so only a token's own loss reaches its output.
        for t in range(len(sequence)):
            p = logits[t].softmax(-1).detach()
            for label in range(61):
                loss = F.cross_entropy(logits[t], torch.tensor(label))
                (g,) = torch.autograd.grad(loss, record["y"], retain_graph=True)
                total += float(p[label] * g[0, t].square().sum())
            count += 1
    assert sum(sampled) / 2 == pytest.approx(total / count, rel=0.25)


def test_factors_of_two_samples_add_up_and_survive_a_checkpoint():
    def factors(scale: float, count: int) -> KFACFactors:
        inputs = {"w": SecondMoment(scale * torch.eye(3), count)}
        return KFACFactors(inputs, {"w": SecondMoment(2 * scale * torch.eye(2), count)})

    both = factors(1.0, 4) + factors(3.0, 2)
    assert both.inputs["w"].count == both.gradients["w"].count == 6
    assert torch.equal(both.inputs["w"].sum, 4 * torch.eye(3))
    assert torch.equal(both.gradients["w"].sum, 8 * torch.eye(2))
    restored = KFACFactors.from_state(both.state(), {"w": torch.empty(0)})
    assert torch.equal(restored.inputs["w"].sum, both.inputs["w"].sum)
    assert restored.gradients["w"].count == 6


def test_the_output_head_is_refused(tiny):
    model = tiny("llama")
    run = run_on(model, ["lm_head"])
    layers = find_linear_layers(model, run.scope)
    with pytest.raises(EditError, match=r"lm_head\.weight is the output head"):
        kfac_factors(run, layers, SEQUENCES, batch_size=2, seed=0)
