"""Fisher information and gradients against loops over single texts, single tokens and every possible label."""

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

ROWS = [Encoded([5, 7, 11, 13], 2), Encoded([2, 4, 8, 16, 32, 60], 3), Encoded([9, 1], 1)]
TOKENS = 2 + 3 + 1


def log_probabilities(model: Any, row: Encoded) -> Tensor:
    """[targets, V], each the distribution of the token at a target position."""
    logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
    return logits[row.target_start - 1 : -1].log_softmax(-1)


def exact_fisher(model: Any, name: str, rows: list[Encoded]) -> Tensor:
    """The expectation itself: every label of every position, weighted by the model's probability."""
    parameter = model.get_parameter(name)
    total = torch.zeros_like(parameter)
    for row in rows:
        for log_p in log_probabilities(model, row).flatten():
            (gradient,) = torch.autograd.grad(log_p, parameter, retain_graph=True)
            total += log_p.exp().detach() * gradient.square()
    return total / TOKENS


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_it_is_the_mean_of_squares_row_by_row_for_labels_drawn_from_the_model(tiny, family, monkeypatch):
    model = tiny(family).double()
    drawn: list[Tensor] = []
    multinomial = torch.multinomial

    def watched(p: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        drawn.append(multinomial(p, *args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(torch, "multinomial", watched)
    own = copy.deepcopy(model)
    with editing(model, [ParameterScope(1, "mlp")]) as edit:
        got = diagonal_fisher(edit.run, ROWS)
        names = list(edit.run.scope)
    assert len(drawn) == len(ROWS)
    parameters = [own.get_parameter(name) for name in names]
    want = [torch.zeros_like(p) for p in parameters]
    for row, labels in zip(ROWS, drawn, strict=True):
        total = log_probabilities(own, row).gather(1, labels).sum()
        for w, g in zip(want, torch.autograd.grad(total, parameters), strict=True):
            w += g.square() / TOKENS
    for name, w in zip(names, want, strict=True):
        torch.testing.assert_close(got[name], w, rtol=1e-9, atol=1e-15)


def test_its_expectation_is_the_true_fisher_and_neither_the_empirical_nor_a_batchs_square(tiny):
    model = tiny("llama", num_hidden_layers=2, hidden_size=8, intermediate_size=6, vocab_size=13, head_dim=4)
    rows = [Encoded([token % 13 for token in row.input_ids], row.target_start) for row in ROWS]
    name = "model.layers.1.mlp.down_proj.weight"
    want = exact_fisher(model, name, rows)
    with editing(model, [ParameterScope(1, "down_proj")]) as edit:
        runs = [diagonal_fisher(edit.run, rows, seed=seed) for seed in range(400)]
        gradient = mean_gradient(edit.run, rows)[name]
    samples = torch.stack([run[name] for run in runs])
    error = (samples.mean(0) - want).abs() / (samples.std(0) / math.sqrt(len(samples)))
    # Standard errors from the expectation, in every entry.
    assert error.max() < 5
    assert error.square().mean() < 2
    batch = (gradient * TOKENS).square() / TOKENS
    assert ((batch - want).abs() / want).median() > 0.3


def test_the_gradient_is_the_batchs_own(tiny):
    model = tiny("llama")
    own = copy.deepcopy(model)
    with editing(model, [ParameterScope(1, "mlp")]) as edit:
        got = mean_gradient(edit.run, ROWS)
    loss = torch.tensor(0.0)
    for row in ROWS:
        logs = log_probabilities(own, row)
        loss = loss - logs.gather(1, torch.tensor(row.input_ids[row.target_start :])[:, None]).sum() / TOKENS
    loss.backward()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, own.get_parameter(name).grad, rtol=1e-4, atol=1e-7)


def test_seeded_and_without_touching_the_global_random_state(tiny):
    with editing(tiny("llama"), [ParameterScope(1, "mlp")]) as edit:
        before = torch.get_rng_state()
        first, again, other = (diagonal_fisher(edit.run, ROWS, seed=s) for s in (3, 3, 4))
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_it_is_taken_from_the_model_before_the_edit_and_leaves_nothing_behind(tiny):
    model = tiny("gpt2", resid_pdrop=0.5).train()
    with editing(model, [ParameterScope(1, "mlp")]) as edit:
        want = diagonal_fisher(edit.run, ROWS)
        with torch.no_grad():
            for parameter in edit.parameters():
                parameter.add_(torch.randn_like(parameter))
        moved = [p.detach().clone() for p in edit.parameters()]
        got = diagonal_fisher(edit.run, ROWS)
        assert all(torch.equal(p, m) for p, m in zip(edit.parameters(), moved, strict=True))
        assert all(p.grad is None for p in model.parameters())
        assert model.training
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_scored_in_fp32(tiny, dtype):
    model = tiny("llama")
    with editing(copy.deepcopy(model), [ParameterScope(1, "mlp")]) as edit:
        want = mean_gradient(edit.run, ROWS)
    with editing(model.to(dtype), [ParameterScope(1, "mlp")]) as edit:
        got = mean_gradient(edit.run, ROWS)
        fisher = diagonal_fisher(edit.run, ROWS)
    for name in want:
        assert got[name].dtype == fisher[name].dtype == torch.float32
        assert (got[name] - want[name]).norm() < 0.05 * want[name].norm()
