"""Modes and the training loop on a trained model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kedit_train import run_edits, world
from kedit_train.callbacks import NormBall, ParameterScope
from kedit_train.data import Edit, EditDataset
from kedit_train.data.tokenization import collate, pad_token_id
from kedit_train.errors import EditError
from kedit_train.modes import TrainLoop

KINDS = {torch.float32: torch.int32}


def bits(model: nn.Module) -> dict[str, Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: t.detach().clone().view(KINDS.get(t.dtype, t.dtype)) for name, t in tensors.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_single_restores_the_model_bit_for_bit() -> None:
    model, tokenizer = world.load()
    with torch.no_grad():
        next(model.parameters())[0, :2] = torch.tensor([-0.0, float("1e-42")])  # a signed zero and a subnormal
    model.lm_head.requires_grad_(False)
    model.model.layers[0].train()
    before = bits(model)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    moved = []

    def train(model: Any, edits: Sequence[Edit]) -> None:
        assert same(before, bits(model))
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        model.train()
        model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
        torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1).step()
        moved.append(not same(before, bits(model)))

    run_edits(model, tokenizer, world.edits(3), mode="single", train=train, progress=False)
    assert moved == [True] * 3
    assert same(before, bits(model))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())

    def fails(model: Any, edits: Sequence[Edit]) -> None:
        train(model, edits)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run_edits(model, tokenizer, world.edits(3), mode="single", train=fails, progress=False)
    assert same(before, bits(model))

    def widens(model: Any, edits: Sequence[Edit]) -> None:
        model.model.norm.weight = nn.Parameter(torch.ones(3))

    with pytest.raises(
        EditError, match=r"training changed the tensor 'model.norm.weight' from \(\d+,\) torch.float32 to \(3,\)"
    ):
        run_edits(model, tokenizer, world.edits(1), mode="single", train=widens, progress=False)


def test_train_loop_equals_a_plain_loop_with_the_same_seed() -> None:
    model, tokenizer = world.load()
    edits = world.edits(6)
    by_hand = copy.deepcopy(model)
    names = [name for name, _ in model.named_parameters() if "layers.2.mlp.down_proj" in name]
    assert names
    for name, parameter in by_hand.named_parameters():
        parameter.requires_grad_(name in names)
    default = TrainLoop(tokenizer)
    assert (default.epochs, default.batch_size, default.learning_rate) == (25, 100, 5e-4)
    encoded = EditDataset(edits).encode(tokenizer)
    optimizer = torch.optim.SGD([p for p in by_hand.parameters() if p.requires_grad], lr=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(5 + 6)
        for _ in range(2):
            for batch in torch.randperm(6).split(4):
                by_hand(**collate([encoded[i] for i in batch], pad_id=pad_token_id(tokenizer))).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    state = torch.get_rng_state()
    found = []
    for draws in (0, 17):
        torch.rand(draws)
        own = copy.deepcopy(model)
        loop = TrainLoop(
            tokenizer,
            callbacks=[ParameterScope(2, modules="mlp.down_proj")],
            epochs=2,
            batch_size=4,
            learning_rate=0.1,
            optimizer=torch.optim.SGD,
        )
        run_edits(own, tokenizer, edits, mode="batch", train=loop, seed=5, progress=False)
        found.append(bits(own))
    torch.set_rng_state(state)
    assert same(found[0], bits(by_hand))
    assert same(found[1], found[0])
    assert not same(found[0], bits(model))


@pytest.mark.slow
def test_single_and_sequential_on_a_trained_model() -> None:
    model, tokenizer = world.load()
    edits = world.edits(4)
    loop = TrainLoop(
        tokenizer,
        callbacks=[ParameterScope(0.7, modules="mlp.down_proj"), NormBall(10.0)],
        learning_rate=3e-3,
        epochs=30,
    )
    torch.manual_seed(1)
    drawn = torch.get_rng_state()
    single = run_edits(model, tokenizer, edits, mode="single", train=loop, progress=False)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert single.report.metrics["reliability"]["generated"].value == 1.0
    sequence = run_edits(model, tokenizer, edits, mode="sequential", train=loop, checkpoints=(1, 2), progress=False)
    assert [c.edits for c in sequence.checkpoints] == [1, 2, 4]
    assert all(c.latest.value == 1.0 for c in sequence.checkpoints)
    # The first edit of the sequence starts from the same model and the same seed as the single edit.
    first = [r.answer for r in sequence.checkpoints[0].report.answers if r.question == "reliability"]
    assert first == [single.report.answers[0].answer]
    assert "TrainLoop(callbacks=[ParameterScope" in sequence.meta["train"]


def test_train_loop_stops_at_the_loss_and_refuses_divergence() -> None:
    model, tokenizer = world.load()
    edits = world.edits(2)
    steps = []

    class Counted(torch.optim.Adam):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            steps.append(1)
            return super().step(*args, **kwargs)

    scope = [ParameterScope(0.7, modules="mlp.down_proj")]
    TrainLoop(tokenizer, callbacks=scope, learning_rate=3e-3, epochs=50, optimizer=Counted)(model, edits)
    assert 1 < len(steps) < 50
    steps.clear()
    TrainLoop(tokenizer, callbacks=scope, learning_rate=1e-4, epochs=5, optimizer=Counted, stop_loss=0.0)(model, edits)
    assert len(steps) == 5
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(EditError, match="TrainLoop: the loss is nan; lower learning_rate"):
        TrainLoop(tokenizer, callbacks=scope)(model, edits)
    with pytest.raises(EditError, match="TrainLoop: epochs must be an integer >= 1, got 0"):
        TrainLoop(tokenizer, epochs=0)
    for rate, expected in ((0.0, "> 0"), (-1e-3, "> 0"), (float("nan"), "> 0"), (float("inf"), "finite and > 0")):
        with pytest.raises(EditError, match=f"TrainLoop: learning_rate must be {expected}, got {rate}"):
            TrainLoop(tokenizer, learning_rate=rate)
