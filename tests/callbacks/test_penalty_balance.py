"""A penalty that is larger than the training loss gives one warning with both numbers, in every training loop."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from conformance.hosts import HOSTS

from kedit_train import world
from kedit_train.callbacks import EditCallback, KLLocality, ParameterScope, TokenLoss
from kedit_train.core.penalty_balance import exceeds_loss
from kedit_train.data import EditDataset

TEXTS = ["The old baker found a coin.", "A red fox slept."]
LINE = (
    r"^KLLocality: the mean penalty \((\S+)\) was larger than the mean training loss \((\S+)\) in the first 5 steps, "
    r"so the edits may not be learned; set weight= to a smaller number \(now 1000000.0\)\.$"
)


class Losses(EditCallback):
    """Records the losses that the model returns, before they reach the training loop."""

    def attach(self, run: Any) -> None:
        self.seen: list[float] = []

        def read(module: Any, args: Any, output: Any) -> None:
            if torch.is_grad_enabled() and output.loss is not None:
                self.seen.append(float(output.loss))

        run.language_model.register_forward_hook(read)


def train(host: str, weight: float, *callbacks: Any, steps: int = 6, **options: Any) -> list[str]:
    model, tokenizer = world.load()
    edits = EditDataset(world.edits(n=4))
    kl = KLLocality(TEXTS, weight=weight, batch_size=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scope = ParameterScope(layers=0.9, modules="mlp.down_proj")
        HOSTS[host](model, tokenizer, edits, [scope, kl, *callbacks], steps, **options)
    return [text for w in caught if (text := str(w.message)).startswith("KLLocality")]


@pytest.mark.parametrize("host", HOSTS)
def test_a_penalty_larger_than_the_loss_is_one_warning(host: str) -> None:
    losses = Losses()
    (line,) = train(host, 1e6, losses)
    found = re.search(LINE, line)
    assert found
    penalty, loss = map(float, found.groups())
    assert penalty > loss
    assert loss == pytest.approx(sum(losses.seen[:5]) / 5, rel=1e-2)


@pytest.mark.parametrize("host", ["Trainer", "SFTTrainer"])
def test_the_loss_is_that_of_the_whole_step_under_accumulation(host: str) -> None:
    whole, parts = train(host, 1e6), train(host, 1e6, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    first, second = (re.search(LINE, line[0]) for line in (whole, parts))
    assert first
    assert second
    # The mean over sequences differs slightly from the mean over tokens.
    assert float(second[2]) == pytest.approx(float(first[2]), rel=0.05)


@pytest.mark.parametrize("host", ["loop", "SFTTrainer"])
def test_token_loss_changes_nothing(host: str) -> None:
    (line,) = train(host, 1e6, TokenLoss())
    (plain,) = train(host, 1e6)
    assert line == plain


def test_a_small_penalty_is_no_warning() -> None:
    assert train("loop", 20.0, steps=21) == []
    assert train("loop", 0.0, steps=6) == []


def test_the_hook_is_removed() -> None:
    model, tokenizer = world.load()
    kl = KLLocality(TEXTS, weight=20.0, batch_size=1)
    before = len(model._forward_hooks)
    HOSTS["loop"](model, tokenizer, EditDataset(world.edits(n=2)), [ParameterScope(layers=0.9), kl], 2)
    assert len(model._forward_hooks) == before
    copy.deepcopy(kl)


def test_the_means_are_compared() -> None:
    assert exceeds_loss([], [1.0]) is None
    assert exceeds_loss([9.0], []) is None
    assert exceeds_loss([1.0, 3.0], [2.0]) is None
    assert exceeds_loss([1.0, 4.0], [2.0, 2.0]) == (2.5, 2.0)
