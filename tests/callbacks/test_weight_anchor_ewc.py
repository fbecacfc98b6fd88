"""WeightAnchor: EWC compared with its formula computed by hand, and its relation to the divergence on the texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from callbacks.weight_anchor_inputs import DOWN, TEXTS, examples_of, move
from torch import Tensor, nn

from kedit_train.callbacks import ParameterScope, WeightAnchor, editing
from kedit_train.core.drift.fisher import diagonal_fisher
from kedit_train.data import Edit
from kedit_train.errors import EditError


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ewc_weights_the_squares_by_the_fisher_information_on_the_texts(make, words, family):
    model = make(family)
    anchor = WeightAnchor("ewc", strength=3.0, texts=TEXTS)
    examples = examples_of(words)
    with editing(model, [anchor, ParameterScope(1, modules="mlp")], tokenizer=words) as edit:
        edit.before_step()
        fisher = diagonal_fisher(edit.run, examples, seed=0)
        start = {name: p.detach().clone() for name, p in edit.run.scope.items()}
        assert anchor.penalty(edit.run).item() == 0.0
        move(edit)
        penalty = anchor.penalty(edit.run)
        expected = sum(
            3.0 / 2 * f * (w - w0) ** 2
            for name, w in edit.run.scope.items()
            for f, w, w0 in zip(*(t.detach().double().flatten().tolist() for t in (fisher[name], w, start[name])),
                                strict=True)
        )  # fmt: skip
        assert expected > 1e-3
        assert penalty.item() == pytest.approx(expected, rel=1e-5)
        assert anchor.metrics(edit.run) == {"edit/drift/anchor": pytest.approx(expected, rel=1e-5)}
        edit.run.model.zero_grad()
        penalty.backward()
        for name, parameter in edit.run.scope.items():
            torch.testing.assert_close(parameter.grad, 3.0 * fisher[name] * (parameter.detach() - start[name]))
        assert all(p.grad is None for n, p in model.named_parameters() if n not in edit.run.scope)


@pytest.mark.slow
def test_ewc_with_strength_1_is_to_second_order_the_divergence_on_its_texts(make, words):
    """One weight moves at a time, so the diagonal of the Fisher matrix is enough."""
    model = make().double()
    ids = [torch.tensor([words(text)["input_ids"]]) for text in TEXTS]
    before = [model(input_ids=i).logits[0, :-1].detach().log_softmax(-1) for i in ids]
    # Many copies of each text give many samples of the labels.
    anchor = WeightAnchor("ewc", strength=1.0, texts=TEXTS * 300, limit=None)
    with editing(model, [anchor, ParameterScope(1, modules="down_proj")], tokenizer=words) as edit:
        edit.before_step()
        weight = edit.run.scope[DOWN]
        ratios = []
        for index in anchor._fisher[DOWN].flatten().topk(8).indices.tolist():
            with torch.no_grad():
                weight.view(-1)[index] += 1e-2
                after = [model(input_ids=i).logits[0, :-1].log_softmax(-1) for i in ids]
                divergence = sum((b.exp() * (b - a)).sum() for b, a in zip(before, after, strict=True))
                ratios.append(float(anchor.penalty(edit.run) / (divergence / sum(len(b) for b in before))))
                weight.view(-1)[index] -= 1e-2
    assert all(0.7 < ratio < 1.4 for ratio in ratios), ratios


@pytest.mark.filterwarnings("ignore:2 training steps began, but no optimizer")
@pytest.mark.filterwarnings("ignore:other code has changed")
def test_ewc_counts_once_in_an_accumulated_step(make, words, ids):
    model = make()
    anchor = WeightAnchor("ewc", strength=50.0, texts=TEXTS)
    with editing(model, [anchor, ParameterScope(1, modules="mlp")], tokenizer=words) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=0.5)
        edit.before_step()
        move(edit)
        optimizer.zero_grad()
        edit.before_step()
        for _ in range(3):
            (model(input_ids=ids, labels=ids).loss / 3).backward()
        accumulated = model.get_parameter(DOWN).grad.clone()
        loss = model(input_ids=ids, labels=ids).loss
        (expected,) = torch.autograd.grad(loss + anchor.penalty(edit.run), model.get_parameter(DOWN))
        torch.testing.assert_close(accumulated, expected, rtol=1e-4, atol=1e-6)
        (alone,) = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, model.get_parameter(DOWN))
        assert not torch.allclose(accumulated, alone, rtol=1e-2)


def test_ewc_holds_weights_that_the_texts_need_more_than_others(make, words, ids):
    def train(*callbacks: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        model = make()
        before = model.get_parameter(DOWN).detach().clone()
        with editing(model, [ParameterScope(1, modules="down_proj"), *callbacks], tokenizer=words) as edit:
            optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-2)
            edit.before_step()
            fisher = diagonal_fisher(edit.run, examples_of(words))[DOWN]
            for _ in range(20):
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                edit.before_step()
        return (model.get_parameter(DOWN).detach() - before).abs(), fisher

    free, fisher = train()
    anchored, _ = train(WeightAnchor("ewc", strength=100.0, texts=TEXTS))
    top = fisher > fisher.median()
    assert anchored[top].sum() < 0.7 * free[top].sum()
    assert (anchored[top].sum() / free[top].sum()) < (anchored[~top].sum() / free[~top].sum())


def test_texts_that_the_edits_are_scored_on_are_left_out(make, words):
    model = make()
    fisher = []
    for texts in ([*TEXTS, "w40 w41 w42"], TEXTS):
        anchor = WeightAnchor("ewc", texts=texts)
        with editing(model, [anchor, ParameterScope(1, modules="mlp")], tokenizer=words) as edit:
            edit.run.edits = [Edit("w50", "w51", rephrases=("w40 w41",))]
            if len(texts) > 3:
                with pytest.warns(UserWarning, match="WeightAnchor: 1 of 4 texts contain an evaluation prompt"):
                    edit.before_step()
            else:
                edit.before_step()
            fisher.append(anchor._fisher[DOWN])
    assert torch.equal(*fisher)


def test_ewc_needs_a_language_model():
    with pytest.raises(EditError, match=r"^WeightAnchor: kind='ewc' needs .* Linear has no language-model head; use"):
        editing(nn.Linear(2, 2), [WeightAnchor("ewc", texts=TEXTS)]).__enter__()


def test_ewc_needs_a_text_of_two_tokens(make, words):
    with (
        editing(make(), [WeightAnchor("ewc", texts=["w1", "w2"])], tokenizer=words) as edit,
        pytest.raises(EditError, match=r"^WeightAnchor: texts must contain a text of at least two tokens"),
    ):
        edit.before_step()
