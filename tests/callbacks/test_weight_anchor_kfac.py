"""WeightAnchor with K-FAC factors compared with its formula computed by hand, and kept over several runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from callbacks.weight_anchor_inputs import DOWN, TEXTS, move
from torch import Tensor, nn

from kedit_train.callbacks import EditCallback, ParameterScope, WeightAnchor, editing
from kedit_train.errors import EditError


def factors_by_hand(model: nn.Module, words: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return the exact expected factors of DOWN: E[a aᵀ], and E[g gᵀ] over all labels instead of sampled ones."""
    layer = model.get_submodule(DOWN.removesuffix(".weight"))
    seen: dict[str, Tensor] = {}

    def record(module: nn.Module, args: Any, output: Tensor) -> None:
        seen["inputs"], seen["outputs"] = args[0], output

    handle = layer.register_forward_hook(record)
    inputs, gradients, count = [], [], 0
    for text in texts:
        ids = torch.tensor([words(text)["input_ids"]])
        log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
        inputs += list(seen["inputs"][0, 1:].detach())
        count += len(log_probs) - 1
        for position, row in enumerate(log_probs):
            if position == 0:
                continue
            for label in range(len(row)):
                (gradient,) = torch.autograd.grad(row[label], seen["outputs"], retain_graph=True)
                gradients += [row[label].exp().detach().sqrt() * gradient[0, at] for at in range(1, len(log_probs))]
    handle.remove()
    A = sum(torch.outer(a, a) for a in inputs) / count
    # Gradients of different positions have a mean of zero for a sampled label, so their products vanish on average.
    S = sum(torch.outer(g, g) for g in gradients) / count
    return A, S


@pytest.mark.parametrize(("family", "modules"), [("llama", "mlp.down_proj.weight"), ("gpt2", "mlp.c_proj.weight")])
def test_the_penalty_and_its_gradient_follow_from_the_factors(make, words, family, modules):
    model = make(family)
    anchor = WeightAnchor("kfac", strength=3.0, texts=TEXTS)
    with editing(model, [anchor, ParameterScope(1, modules=modules)], tokenizer=words) as edit:
        edit.before_step()
        start = {name: p.detach().clone() for name, p in edit.run.scope.items()}
        assert anchor.penalty(edit.run).item() == 0.0
        move(edit)
        expected, gradients = 0.0, {}
        for name, weight in edit.run.scope.items():
            D = (weight.detach() - start[name]).double()
            D = D.T if family == "gpt2" else D
            S, A = (m[name].mean.double() for m in (anchor._factors.gradients, anchor._factors.inputs))
            expected += 1.5 * float((S @ D @ A @ D.T).trace())
            gradients[name] = 3.0 * (S @ D @ A)
        penalty = anchor.penalty(edit.run)
        assert expected > 1e-4
        assert penalty.item() == pytest.approx(expected, rel=1e-4)
        assert anchor.metrics(edit.run) == {"edit/drift/anchor": pytest.approx(expected, rel=1e-4)}
        edit.run.model.zero_grad()
        penalty.backward()
        for name, parameter in edit.run.scope.items():
            gradient = parameter.grad.T if family == "gpt2" else parameter.grad
            torch.testing.assert_close(gradient.double(), gradients[name], rtol=1e-3, atol=1e-6)


def test_the_factors_approach_their_expectation_with_many_samples(make, words):
    model = make().double()
    A, S = factors_by_hand(model, words, TEXTS)
    anchor = WeightAnchor("kfac", texts=TEXTS * 300, limit=None)
    with editing(model, [anchor, ParameterScope(1, modules="down_proj")], tokenizer=words) as edit:
        edit.before_step()
        torch.testing.assert_close(anchor._factors.inputs[DOWN].mean, A, rtol=1e-6, atol=1e-9)
        sampled = anchor._factors.gradients[DOWN].mean
        assert float((sampled - S).norm() / S.norm()) < 0.2


def test_an_edit_changes_predictions_on_the_texts_less_than_without_the_penalty(make, words, ids):
    def divergence(*callbacks: EditCallback) -> float:
        torch.manual_seed(0)
        model = make()
        unedited = copy.deepcopy(model)
        with editing(model, [ParameterScope(1, modules="down_proj"), *callbacks], tokenizer=words) as edit:
            optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-2)
            for _ in range(20):
                edit.before_step()
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        total = 0.0
        for text in TEXTS:
            one = torch.tensor([words(text)["input_ids"]])
            before, after = (m(input_ids=one).logits[0].log_softmax(-1).detach() for m in (unedited, model))
            total += float((before.exp() * (before - after)).sum())
        return total

    assert divergence(WeightAnchor("kfac", strength=300.0, texts=TEXTS)) < 0.3 * divergence()


def test_a_later_run_keeps_the_factors_of_the_first_weights_and_a_new_process_restores_them(make, words):
    model = make()
    anchor = WeightAnchor("kfac", texts=TEXTS)

    def run(callback: WeightAnchor, state: Any = None) -> tuple[Tensor, float, Any]:
        with editing(model, [callback, ParameterScope(1, modules="down_proj")], tokenizer=words) as edit:
            edit.before_step()
            if state is not None:
                callback.load_state(state)
            factor = callback._factors.gradients[DOWN].mean.clone()
            penalty = callback.penalty(edit.run).item()
            move(edit)
            return factor, penalty, copy.deepcopy(callback.state())

    first, penalty, _ = run(anchor)
    assert penalty == 0.0
    second, penalty, state = run(anchor)
    assert torch.equal(first, second)
    assert penalty > 0.0
    restored = WeightAnchor("kfac", texts=TEXTS)
    third, _, _ = run(restored, state)
    assert torch.equal(first, third)


def test_lora_factors_are_refused(make, words):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(make(), peft.LoraConfig(target_modules=["down_proj"], r=2))
    with (
        editing(adapted, [WeightAnchor("kfac", texts=TEXTS)], tokenizer=words) as edit,
        pytest.raises(EditError, match=r"^WeightAnchor: the scope must not contain LoRA factors"),
    ):
        edit.before_step()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "kind='kfac' needs texts="),
        ({"texts": TEXTS, "decoupled": True}, "decoupled must be None or False if kind='kfac', got True"),
        ({"texts": TEXTS, "strength": -1.0}, "strength must be"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(EditError, match=rf"^WeightAnchor: {message}"):
        WeightAnchor("kfac", **arguments)
