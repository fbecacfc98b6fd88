"""Fisher information and gradients, compared with loops over single examples, tokens and all possible labels."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kedit_train.callbacks import ParameterScope, editing
from kedit_train.core.drift.fisher import diagonal_fisher, mean_gradient
from kedit_train.data.tokenization import Encoded

EXAMPLES = [Encoded([5, 7, 11, 13], 2), Encoded([2, 4, 8, 16, 32, 60], 3), Encoded([9, 1], 1)]
TOKENS = 2 + 3 + 1


def log_probabilities(model: Any, example: Encoded) -> Tensor:
    """Return the log-probabilities at the target positions, [targets, V]."""
    logits = model(input_ids=torch.tensor([example.input_ids])).logits[0]
    return logits[example.target_start - 1 : -1].log_softmax(-1)


def exact_fisher(model: Any, name: str, examples: list[Encoded]) -> Tensor:
    """Return the expectation over all labels of every position, weighted by the model's probabilities."""
    parameter = model.get_parameter(name)
    total = torch.zeros_like(parameter)
    for example in examples:
        for log_p in log_probabilities(model, example).flatten():
            (gradient,) = torch.autograd.grad(log_p, parameter, retain_graph=True)
            total += log_p.exp().detach() * gradient.square()
    return total / TOKENS


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_fisher_is_the_mean_of_squared_gradients_per_example_for_sampled_labels(tiny, family, monkeypatch):
    model = tiny(family).double()
    sampled: list[Tensor] = []
    multinomial = torch.multinomial

    def recording(p: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sampled.append(multinomial(p, *args, **kwargs))
        return sampled[-1]

    monkeypatch.setattr(torch, "multinomial", recording)
    copied = copy.deepcopy(model)
    with editing(model, [ParameterScope(1, modules="mlp")]) as edit:
        fisher = diagonal_fisher(edit.run, EXAMPLES)
        names = list(edit.run.scope)
    assert len(sampled) == len(EXAMPLES)
    parameters = [copied.get_parameter(name) for name in names]
    expected = [torch.zeros_like(p) for p in parameters]
    for example, labels in zip(EXAMPLES, sampled, strict=True):
        total = log_probabilities(copied, example).gather(1, labels).sum()
        for w, g in zip(expected, torch.autograd.grad(total, parameters), strict=True):
            w += g.square() / TOKENS
    for name, w in zip(names, expected, strict=True):
        torch.testing.assert_close(fisher[name], w, rtol=1e-9, atol=1e-15)


def test_its_expectation_is_the_true_fisher_and_not_the_square_of_a_batch_gradient(tiny):
    model = tiny("llama", num_hidden_layers=2, hidden_size=8, intermediate_size=6, vocab_size=13, head_dim=4)
    examples = [Encoded([token % 13 for token in e.input_ids], e.target_start) for e in EXAMPLES]
    name = "model.layers.1.mlp.down_proj.weight"
    expected = exact_fisher(model, name, examples)
    with editing(model, [ParameterScope(1, modules="down_proj")]) as edit:
        runs = [diagonal_fisher(edit.run, examples, seed=seed) for seed in range(400)]
        gradient = mean_gradient(edit.run, examples)[name]
    samples = torch.stack([run[name] for run in runs])
    error = (samples.mean(0) - expected).abs() / (samples.std(0) / math.sqrt(len(samples)))
    # The error of each entry, in standard errors.
    assert error.max() < 5
    assert error.square().mean() < 2
    batch = (gradient * TOKENS).square() / TOKENS
    assert ((batch - expected).abs() / expected).median() > 0.3


def test_the_mean_gradient_is_that_of_one_batch(tiny):
    model = tiny("llama")
    copied = copy.deepcopy(model)
    with editing(model, [ParameterScope(1, modules="mlp")]) as edit:
        gradients = mean_gradient(edit.run, EXAMPLES)
    loss = torch.tensor(0.0)
    for example in EXAMPLES:
        labels = torch.tensor(example.input_ids[example.target_start :])
        loss = loss - log_probabilities(copied, example).gather(1, labels[:, None]).sum() / TOKENS
    loss.backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, copied.get_parameter(name).grad, rtol=1e-4, atol=1e-7)


def test_the_seed_decides_the_labels_and_the_global_random_state_stays(tiny):
    with editing(tiny("llama"), [ParameterScope(1, modules="mlp")]) as edit:
        before = torch.get_rng_state()
        first, again, other = (diagonal_fisher(edit.run, EXAMPLES, seed=s) for s in (3, 3, 4))
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_fisher_belongs_to_the_model_before_the_edit_and_leaves_no_trace(tiny):
    model = tiny("gpt2", resid_pdrop=0.5).train()
    with editing(model, [ParameterScope(1, modules="mlp")]) as edit:
        before = diagonal_fisher(edit.run, EXAMPLES)
        with torch.no_grad():
            for parameter in edit.parameters():
                parameter.add_(torch.randn_like(parameter))
        moved = [p.detach().clone() for p in edit.parameters()]
        after = diagonal_fisher(edit.run, EXAMPLES)
        assert all(torch.equal(p, m) for p, m in zip(edit.parameters(), moved, strict=True))
        assert all(p.grad is None for p in model.parameters())
        assert model.training
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_computed_in_fp32(tiny, dtype):
    model = tiny("llama")
    with editing(copy.deepcopy(model), [ParameterScope(1, modules="mlp")]) as edit:
        expected = mean_gradient(edit.run, EXAMPLES)
    with editing(model.to(dtype), [ParameterScope(1, modules="mlp")]) as edit:
        gradients = mean_gradient(edit.run, EXAMPLES)
        fisher = diagonal_fisher(edit.run, EXAMPLES)
    for name in expected:
        assert gradients[name].dtype == fisher[name].dtype == torch.float32
        assert (gradients[name] - expected[name]).norm() < 0.05 * expected[name].norm()
