"""L2-SP and EWC against their formulas, written out by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conformance.hosts import HOSTS
from torch import Tensor, nn

from kedit_train import world
from kedit_train.callbacks import EditCallback, GradientMask, ParameterScope, WeightAnchor, editing
from kedit_train.core.drift.fisher import diagonal_fisher
from kedit_train.data import Edit, EditDataset
from kedit_train.data.tokenization import Encoded
from kedit_train.errors import EditError

TEXTS = ["w1 w2 w3 w4 w5", "w9 w8", "w20 w21 w22 w23 w24 w25 w26"]
DOWN = "model.layers.1.mlp.down_proj.weight"


def shake(edit: Any, size: float = 0.1) -> None:
    """Stand in for training."""
    with torch.no_grad():
        for parameter in edit.parameters():
            parameter.add_(torch.randn_like(parameter) * size)


def twins() -> tuple[nn.Module, nn.Module]:
    one = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return one, copy.deepcopy(one)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_l2sp_is_decoupled_from_whatever_the_optimizer_does_and_follows_its_schedule(name):
    model, own = twins()
    start = copy.deepcopy(model)
    x = torch.randn(8, 3)
    with editing(model, [WeightAnchor(strength=0.7)], log_every_n_steps=1) as edit:
        ours, theirs = OPTIMIZERS[name](edit.parameters()), OPTIMIZERS[name](list(own.parameters()))
        schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (ours, theirs)]
        rate = 0.1
        for step in range(4):
            edit.before_step()
            model(x).square().mean().backward()
            ours.step()
            own(x).square().mean().backward()
            theirs.step()
            with torch.no_grad():
                for w, w0 in zip(own.parameters(), start.parameters(), strict=True):
                    w.copy_(w - rate * 0.7 * (w - w0))
            for w, want in zip(model.parameters(), own.parameters(), strict=True):
                torch.testing.assert_close(w, want, rtol=1e-6, atol=1e-7)
            distance = sum(
                float((w - w0).detach().square().sum())
                for w, w0 in zip(own.parameters(), start.parameters(), strict=True)
            )
            assert edit.history[step]["edit/drift/anchor"] == pytest.approx(0.7 / 2 * distance, rel=1e-4)
            for each in (*schedules, ours, theirs):
                each.step() if each in schedules else each.zero_grad()
            rate *= 0.5
    assert distance > 1e-3


def test_l2sp_in_the_loss_is_the_papers_penalty_and_counts_once_however_often_gradients_accumulate():
    model, own = twins()
    start = copy.deepcopy(model)
    x = torch.randn(8, 3)
    with editing(model, [WeightAnchor(strength=0.7, decoupled=False)]) as edit:
        optimizers = [torch.optim.SGD(p, lr=0.2) for p in (edit.parameters(), list(own.parameters()))]
        for _ in range(3):
            edit.before_step()
            for part in x.split(2):
                (model(part).square().mean() / 4).backward()
            penalty = sum((w - w0.detach()).square().sum() for w, w0 in
                          zip(own.parameters(), start.parameters(), strict=True))  # fmt: skip
            (own(x).square().mean() + 0.7 / 2 * penalty).backward()
            for w, want in zip(model.parameters(), own.parameters(), strict=True):
                torch.testing.assert_close(w.grad, want.grad, rtol=1e-5, atol=1e-7)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert not torch.equal(model[0].weight, start[0].weight)


@pytest.mark.parametrize("host", HOSTS)
def test_every_host_pulls_after_each_step_with_that_steps_own_rate(host):
    """Their rate is 1e-3: a strength of 1,000 takes every step back, a strength of 500 half of it."""
    drift = {}
    for strength in (0.0, 500.0, 1000.0):
        model, tokenizer = world.load()
        edits = EditDataset(world.edits(n=8))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        callbacks = [WeightAnchor(strength=strength), ParameterScope(0.5, "down_proj")]
        HOSTS[host](model, tokenizer, edits, callbacks, 1)
        drift[strength] = sum(float((p.detach() - before[n]).norm()) for n, p in model.named_parameters())
    assert drift[0.0] > 0.05
    assert drift[500.0] == pytest.approx(drift[0.0] / 2, rel=1e-4)
    assert drift[1000.0] < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ewc_weighs_the_square_by_the_fisher_information_on_the_texts(make, words, family):
    model = make(family)
    anchor = WeightAnchor("ewc", strength=3.0, texts=TEXTS)
    rows = [Encoded(words(text)["input_ids"], 1) for text in TEXTS]
    with editing(model, [anchor, ParameterScope(1, "mlp")], tokenizer=words) as edit:
        edit.before_step()
        fisher = diagonal_fisher(edit.run, rows, seed=0)
        start = {name: p.detach().clone() for name, p in edit.run.scope.items()}
        assert anchor.penalty(edit.run).item() == 0.0
        shake(edit)
        penalty = anchor.penalty(edit.run)
        want = sum(
            3.0 / 2 * f * (w - w0) ** 2
            for name, w in edit.run.scope.items()
            for f, w, w0 in zip(*(t.detach().double().flatten().tolist() for t in (fisher[name], w, start[name])),
                                strict=True)
        )  # fmt: skip
        assert want > 1e-3
        assert penalty.item() == pytest.approx(want, rel=1e-5)
        assert anchor.metrics(edit.run) == {"edit/drift/anchor": pytest.approx(want, rel=1e-5)}
        edit.run.model.zero_grad()
        penalty.backward()
        for name, parameter in edit.run.scope.items():
            torch.testing.assert_close(parameter.grad, 3.0 * fisher[name] * (parameter.detach() - start[name]))
        assert all(p.grad is None for n, p in model.named_parameters() if n not in edit.run.scope)


def test_ewc_is_to_second_order_the_divergence_on_its_texts(make, words):
    """One weight at a time, where the diagonal says all: strength 1 is nats a token."""
    model = make().double()
    ids = [torch.tensor([words(text)["input_ids"]]) for text in TEXTS]
    before = [model(input_ids=i).logits[0, :-1].detach().log_softmax(-1) for i in ids]
    name = "model.layers.1.mlp.down_proj.weight"
    # Many copies of each text: as many draws of the labels.
    anchor = WeightAnchor("ewc", strength=1.0, texts=TEXTS * 300, samples=None)
    with editing(model, [anchor, ParameterScope(1, "down_proj")], tokenizer=words) as edit:
        edit.before_step()
        weight = edit.run.scope[name]
        ratios = []
        for index in anchor._fisher[name].flatten().topk(8).indices.tolist():
            with torch.no_grad():
                weight.view(-1)[index] += 1e-2
                now = [model(input_ids=i).logits[0, :-1].log_softmax(-1) for i in ids]
                divergence = sum((b.exp() * (b - n)).sum() for b, n in zip(before, now, strict=True))
                ratios.append(float(anchor.penalty(edit.run) / (divergence / sum(len(b) for b in before))))
                weight.view(-1)[index] -= 1e-2
    assert all(0.7 < ratio < 1.4 for ratio in ratios), ratios


def test_ewc_counts_once_in_an_accumulated_step(make, words, ids):
    model = make()
    anchor = WeightAnchor("ewc", strength=50.0, texts=TEXTS)
    with editing(model, [anchor, ParameterScope(1, "mlp")], tokenizer=words) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=0.5)
        edit.before_step()
        shake(edit)
        optimizer.zero_grad()
        edit.before_step()
        for _ in range(3):
            (model(input_ids=ids, labels=ids).loss / 3).backward()
        got = model.get_parameter(DOWN).grad.clone()
        own = model(input_ids=ids, labels=ids).loss
        (want,) = torch.autograd.grad(own + anchor.penalty(edit.run), model.get_parameter(DOWN))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        (alone,) = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, model.get_parameter(DOWN))
        assert not torch.allclose(got, alone, rtol=1e-2)


def test_ewc_holds_back_what_the_texts_need_more_than_the_rest(make, words, ids):
    def train(*callbacks: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        model = make()
        before = model.get_parameter(DOWN).detach().clone()
        with editing(model, [ParameterScope(1, "down_proj"), *callbacks], tokenizer=words) as edit:
            optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-2)
            edit.before_step()
            fisher = diagonal_fisher(edit.run, [Encoded(words(t)["input_ids"], 1) for t in TEXTS])[DOWN]
            for _ in range(20):
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                edit.before_step()
        return (model.get_parameter(DOWN).detach() - before).abs(), fisher

    free, fisher = train()
    held, _ = train(WeightAnchor("ewc", strength=100.0, texts=TEXTS))
    top = fisher > fisher.median()
    assert held[top].sum() < 0.7 * free[top].sum()
    assert (held[top].sum() / free[top].sum()) < (held[~top].sum() / free[~top].sum())


def test_what_was_not_stepped_is_not_pulled():
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "ab"})
    a, b = model["a"].weight, model["b"].weight
    with editing(model, [WeightAnchor(strength=1.0)]) as edit:
        first, second = torch.optim.SGD([a], lr=0.5), torch.optim.SGD([b], lr=0.25)
        edit.before_step()
        start = {"a": a.detach().clone(), "b": b.detach().clone()}
        with torch.no_grad():
            a.add_(1.0)
            b.add_(1.0)
        (0.0 * a.sum()).backward()
        first.step()
        torch.testing.assert_close(a, start["a"] + 0.5)
        assert torch.equal(b, start["b"] + 1.0), "another optimizer's"
        first.zero_grad()
        second.step()
        assert torch.equal(b, start["b"] + 1.0), "no gradient"
        edit.before_step()
        first.step()
        torch.testing.assert_close(a, start["a"] + 0.5)
        (0.0 * b.sum()).backward()
        second.step()
        torch.testing.assert_close(b, start["b"] + 0.75)


def test_half_precision_is_pulled_in_fp32_and_rounded_once():
    model = nn.Linear(64, 64, bias=False).bfloat16()
    with editing(model, [WeightAnchor(strength=0.3)]) as edit:
        edit.before_step()
        start = model.weight.detach().clone()
        shake(edit, 0.01)
        moved = model.weight.detach().float()
        optimizer = torch.optim.SGD(edit.parameters(), lr=1.0)
        (0.0 * model.weight.sum()).backward()
        optimizer.step()
        assert torch.equal(model.weight, (moved - 0.3 * (moved - start.float())).bfloat16())


def test_a_mask_has_the_last_word(make, words, ids):
    model = make()
    before = model.get_parameter(DOWN).detach().clone()
    mask = GradientMask("random", 0.1)
    with editing(model, [mask, WeightAnchor(strength=0.5), ParameterScope(1, "down_proj")], tokenizer=words) as edit:
        optimizer = torch.optim.AdamW(edit.parameters(), lr=0.1)
        for _ in range(3):
            edit.before_step()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        same = model.get_parameter(DOWN).view(torch.int32) == before.view(torch.int32)
        assert bool(same[mask._held[DOWN]].all())
        assert not bool(same.all())


class Later(EditCallback):
    """Sees what the anchor made of the weights."""

    order, constrains = 40, True
    seen: Any = None

    def constrain(self, weights, reference):
        self.seen = {name: weight.clone() for name, weight in weights.items()}
        return weights


def test_the_anchor_comes_before_projections():
    model = nn.Linear(2, 2, bias=False)
    later = Later()
    with editing(model, [later, WeightAnchor(strength=1.0)]) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=0.5)
        edit.before_step()
        start = model.weight.detach().clone()
        model.weight.sum().backward()
        optimizer.step()
        torch.testing.assert_close(later.seen["weight"], start - 0.25)


def test_optimizers_without_a_rate_and_rates_that_overshoot_are_refused():
    from transformers import Adafactor

    def step(make_optimizer: Any, anchor: WeightAnchor) -> None:
        model = nn.Linear(3, 3)
        with editing(model, [anchor]) as edit:
            optimizer = make_optimizer(edit.parameters())
            edit.before_step()
            model(torch.randn(2, 3)).square().sum().backward()
            optimizer.step()

    def relative(parameters: Any) -> Any:
        return Adafactor(parameters, lr=None, relative_step=True, scale_parameter=True)

    with pytest.raises(EditError, match=r"^WeightAnchor: the optimizer has no learning rate of its own"):
        step(relative, WeightAnchor())
    step(relative, WeightAnchor(decoupled=False))
    with pytest.raises(
        EditError, match=r"^WeightAnchor: lr \* strength = 0.5 \* 4 is above 1, which would throw weight"
    ):
        step(lambda p: torch.optim.SGD(p, lr=0.5), WeightAnchor(strength=4.0))


def test_texts_with_what_the_edits_are_scored_on_are_left_out(make, words):
    model = make()
    found = []
    for texts in ([*TEXTS, "w40 w41 w42"], TEXTS):
        anchor = WeightAnchor("ewc", texts=texts)
        with editing(model, [anchor, ParameterScope(1, "mlp")], tokenizer=words) as edit:
            edit.run.edits = [Edit("w50", "w51", rephrases=("w40 w41",))]
            if len(texts) > 3:
                with pytest.warns(UserWarning, match="WeightAnchor: 1 of 4 texts contain a prompt"):
                    edit.before_step()
            else:
                edit.before_step()
            found.append(anchor._fisher[DOWN])
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "l1"}, "kind='l1' is out of bounds"),
        ({"strength": -1.0}, "strength=-1.0 is out of bounds"),
        ({"strength": float("nan")}, "strength=nan is out of bounds"),
        ({"anchor": "first"}, "anchor='first' is out of bounds"),
        ({"samples": 0}, "samples=0 is out of bounds"),
        ({"max_length": 1}, "max_length=1 is out of bounds"),
        ({"kind": "ewc"}, "kind='ewc' needs texts="),
        ({"texts": ["a"]}, "kind='l2sp' does not read texts="),
        ({"kind": "ewc", "texts": ["a"], "decoupled": True}, "kind='ewc' is a penalty in the loss"),
    ],
)
def test_arguments_that_make_no_sense(given, message):
    with pytest.raises(EditError) as error:
        WeightAnchor(**given)
    assert str(error.value).startswith(f"WeightAnchor: {message}")


def test_ewc_needs_a_language_model_and_texts_with_a_context(make, words):
    with pytest.raises(EditError, match=r"^WeightAnchor: kind='ewc' asks .* Linear has no language-model head; use"):
        editing(nn.Linear(2, 2), [WeightAnchor("ewc", texts=TEXTS)]).__enter__()
    with (
        editing(make(), [WeightAnchor("ewc", texts=["w1", "w2"])], tokenizer=words) as edit,
        pytest.raises(EditError, match=r"^WeightAnchor: no text has two tokens"),
    ):
        edit.before_step()
