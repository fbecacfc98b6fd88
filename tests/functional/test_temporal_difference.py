"""Temporal differences: targets against returns computed by hand, and a value function on a small Markov chain."""

from __future__ import annotations

import doctest
import random

import pytest
import torch

from kedit_train.errors import EditError
from kedit_train.functional import temporal_difference
from kedit_train.functional.temporal_difference import last_valid, td_targets, value_loss


def by_hand(values: list[float], reward: float, trace: float, discount: float) -> list[float]:
    """The lambda-return as the weighted sum of all n-step returns, as a textbook writes it."""
    last = len(values) - 1
    targets = []
    for t in range(len(values)):
        left = last - t
        if left == 0:
            targets.append(reward)
            continue
        # The n-step return bootstraps from the value n steps later; after the last step it is the reward.
        returns = [discount**n * values[t + n] for n in range(1, left + 1)] + [discount**left * reward]
        weights = [(1 - trace) * trace ** (n - 1) for n in range(1, left + 1)] + [trace**left]
        targets.append(sum(w * r for w, r in zip(weights, returns, strict=True)))
    return targets


@pytest.mark.parametrize("trace", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("discount", [1.0, 0.8])
def test_targets_are_the_weighted_n_step_returns_at_both_padding_sides(trace: float, discount: float) -> None:
    draw = random.Random(0)
    for _ in range(50):
        length, left, right = draw.randint(1, 6), draw.randint(0, 3), draw.randint(0, 3)
        values, reward = [draw.gauss(0, 1) for _ in range(length)], draw.gauss(0, 1)
        expected = torch.tensor(by_hand(values, reward, trace, discount), dtype=torch.float64)
        # Large values in the padding must not be used.
        row = torch.tensor([[9e9] * left + values + [9e9] * right], dtype=torch.float64)
        mask = torch.tensor([[False] * left + [True] * length + [False] * right])
        found = td_targets(row, torch.tensor([reward], dtype=torch.float64), mask, trace=trace, discount=discount)
        torch.testing.assert_close(found[mask], expected)
        assert not found[~mask].any()


def test_the_reward_is_the_target_of_the_last_valid_position_only() -> None:
    # Published code uses argmax of the mask, which is the first valid position.
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 0, 0]]).bool()
    assert last_valid(mask).tolist() == [2, 3, 0]
    targets = td_targets(torch.zeros(3, 4), torch.tensor([1.0, 2.0, 3.0]), mask)
    assert targets.tolist() == [[0, 0, 1, 0], [0, 0, 0, 2], [3, 0, 0, 0]]


def test_the_gradient_is_a_semi_gradient() -> None:
    values = torch.tensor([[0.5, 2.0, 0.0]], requires_grad=True)
    mask, reward = torch.ones(1, 3, dtype=torch.bool), torch.tensor([1.0])
    loss = value_loss(values, td_targets(values, reward, mask), mask)
    (gradient,) = torch.autograd.grad(loss, values)
    # d/dv_t of mean (v_t - target_t)^2 with constant targets 2.0, 0.0 and 1.0. Full (residual) gradients differ.
    torch.testing.assert_close(gradient, torch.tensor([[-1.5, 2.0, -1.0]]) * 2 / 3)


def test_targets_have_no_gradient() -> None:
    values, rewards = torch.ones(1, 2, requires_grad=True), torch.ones(1, requires_grad=True)
    assert not td_targets(values, rewards, torch.ones(1, 2, dtype=torch.bool), trace=0.5).requires_grad


@pytest.mark.parametrize("trace", [0.0, 0.7])
def test_a_value_function_on_a_markov_chain_converges_to_the_true_values(trace: float) -> None:
    # A random walk on states 1 to 5 that ends at 0 (reward 0) or at 6 (reward 1): the true value of state s is s / 6.
    draw = random.Random(0)
    walks = []
    for _ in range(600):
        state, walk = 3, [3]
        while True:
            state += draw.choice((-1, 1))
            if state in (0, 6):
                break
            walk.append(state)
        walks.append((walk, float(state == 6)))
    longest = max(len(walk) for walk, _ in walks)
    states = torch.tensor([walk + [0] * (longest - len(walk)) for walk, _ in walks])
    mask, rewards = states > 0, torch.tensor([reward for _, reward in walks])
    table = torch.zeros(7, requires_grad=True)
    optimizer = torch.optim.SGD([table], lr=0.5)
    averaged = torch.zeros(7)
    for step in range(1500):
        optimizer.zero_grad()
        values = table[states]
        value_loss(values, td_targets(values, rewards, mask, trace=trace), mask).backward()
        optimizer.step()
        if step >= 1000:
            averaged += table.detach() / 500
    torch.testing.assert_close(averaged[1:6], torch.arange(1, 6) / 6, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("values", "rewards", "mask"), [((2, 3), (2, 1), (2, 3)), ((2, 1), (2,), (2, 3)), ((2, 3), (3,), (2, 3))]
)
def test_shapes_that_would_be_broadcast_are_refused(values: tuple, rewards: tuple, mask: tuple) -> None:
    with pytest.raises(EditError, match=r"must have the shape \[batch, length\]"):
        td_targets(torch.zeros(values), torch.zeros(rewards), torch.ones(mask, dtype=torch.bool))


def test_a_loss_of_different_shapes_and_an_empty_sequence_are_refused() -> None:
    with pytest.raises(EditError, match="must have the same shape"):
        value_loss(torch.zeros(2, 1), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(EditError, match="at least one valid position"):
        last_valid(torch.zeros(1, 2, dtype=torch.bool))


def test_the_examples_run() -> None:
    assert doctest.testmod(temporal_difference).failed == 0
