"""SecondOrderLocality: its step has the stated length and direction under every optimizer, and keeps predictions."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from callbacks.inputs import SCOPE, WEIGHT, attach, train_with_scaler
from torch import Tensor

from kedit_train.callbacks import GradientMask, NormBall, ParameterScope, SecondOrderLocality, TokenLoss, editing
from kedit_train.core.drift.factors_of_texts import factors_of_texts
from kedit_train.core.drift.linear_layers import find_linear_layers
from kedit_train.errors import EditError

TEXTS = ["w1 w2 w3 w4 w5", "w9 w8", "w20 w21 w22 w23", "w7 w8 w7"] * 8
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=100.0, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.0),
}


def run_steps(
    model: Any,
    words: Any,
    ids: Tensor,
    *callbacks: Any,
    optimizer: str = "adamw",
    steps: int = 3,
    family: str = "llama",
) -> Any:
    scope = ParameterScope(1, modules=SCOPE[family])
    with editing(model, [scope, TokenLoss("cross_entropy"), *callbacks], tokenizer=words, log_every_n_steps=1) as edit:
        chosen = OPTIMIZERS[optimizer](edit.parameters())
        for _ in range(steps):
            edit.before_step()
            model(input_ids=ids, labels=ids).loss.backward()
            chosen.step()
            chosen.zero_grad()
    return edit


@pytest.mark.parametrize("family", WEIGHT)
def test_the_first_step_has_the_stated_direction_and_length(make, words, ids, family):
    torch.manual_seed(0)
    model = make(family)
    weight = model.get_parameter(WEIGHT[family])
    before = weight.detach().clone()
    locality = SecondOrderLocality(TEXTS, step_size=0.01, damping=0.1)
    scope = ParameterScope(1, modules=SCOPE[family])
    with editing(model, [scope, TokenLoss("cross_entropy"), locality], tokenizer=words) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=1.0)
        edit.before_step()
        layers = find_linear_layers(edit.run.model, edit.run.scope)
        sequences = locality.texts.tokenize(edit.run)
        moments = factors_of_texts(
            edit.run, layers, sequences, seed=locality.texts.seed, batch_size=4, path=None, skip_first=True
        )
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        loss = float(loss.detach())
        gradient = weight.grad.detach().clone().double()
        optimizer.step()
    change = weight.detach().double() - before.double()
    if family == "gpt2":
        change, gradient = change.T, gradient.T
    name = WEIGHT[family]
    roots = []
    for moment in (moments.gradients, moments.inputs):
        m = moment[name].mean.double()
        values, vectors = torch.linalg.eigh(m / m.diagonal().mean() + 0.1 * torch.eye(len(m), dtype=m.dtype))
        roots.append(vectors @ torch.diag(values**-0.5) @ vectors.T)
    # In the first step, Adam's direction is the sign of the gradient.
    transformed = roots[0] @ gradient @ roots[1]
    direction = roots[0] @ transformed.sign() @ roots[1]
    # The gradient predicts that the step removes a hundredth of the loss.
    expected = -0.01 * loss / float((gradient * direction).sum()) * direction
    # The first token of a text is not counted: 8 x (5 + 2 + 4 + 3 - 4) tokens.
    assert moments.inputs[name].count == 80
    # Gradients of the size of rounding errors have no sign, so not every entry is equal.
    assert float((change - expected).norm() / expected.norm()) < 0.02
    assert float((change * gradient).sum()) == pytest.approx(-0.01 * loss, rel=1e-3)


def test_no_step_is_longer_than_a_tenth_of_the_weights(make, words, ids):
    torch.manual_seed(0)
    model = make("llama")
    weight = model.get_parameter(WEIGHT["llama"])
    before = weight.detach().clone()
    run_steps(model, words, ids, SecondOrderLocality(TEXTS, step_size=1.0), steps=1)
    assert float((weight.detach() - before).norm() / before.norm()) == pytest.approx(0.1, rel=1e-5)


def test_the_result_does_not_depend_on_the_optimizer(make, words, ids):
    results = []
    for optimizer in OPTIMIZERS:
        torch.manual_seed(0)
        model = make("llama")
        run_steps(model, words, ids, SecondOrderLocality(TEXTS), optimizer=optimizer)
        results.append(model.get_parameter(WEIGHT["llama"]).detach().clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_edit_is_learned_and_predictions_on_the_texts_change_less(make, words, ids):
    sequences = [torch.tensor([words(text)["input_ids"]]) for text in TEXTS[:4]]

    def log_probabilities(model: Any) -> Tensor:
        with torch.no_grad():
            return torch.cat([model.eval()(ids).logits[0, 1:].log_softmax(-1) for ids in sequences])

    def loss_of(model: Any) -> float:
        with torch.no_grad():
            return float(model.eval()(input_ids=ids, labels=ids).loss)

    def divergence(damping: float) -> tuple[float, float, float, float]:
        torch.manual_seed(0)
        model = make("llama")
        before, first = log_probabilities(model), loss_of(model)
        callback = SecondOrderLocality(TEXTS, step_size=0.02, damping=damping)
        edit = run_steps(model, words, ids, callback, steps=20)
        last = loss_of(model)
        kl = float((before.exp() * (before - log_probabilities(model))).sum(-1).mean())
        return kl, first, last, edit.history[-1].get("edit/locality/second_order_kl", 0.0)

    plain, preconditioned = divergence(1e4), divergence(1e-3)
    assert preconditioned[2] < preconditioned[1] - 0.2
    # Divergence per unit of learning.
    gains = [kl / (first - last) for kl, first, last, _ in (plain, preconditioned)]
    assert gains[1] < 0.5 * gains[0]
    # The estimate is of the same size as the true divergence.
    assert 0.3 < plain[3] / plain[0] < 3.0


def test_constraints_are_exact_beside_it(make, words, ids):
    torch.manual_seed(0)
    model = make("llama")
    weight = model.get_parameter(WEIGHT["llama"])
    before = weight.detach().clone()
    mask = GradientMask("magnitude", density=0.25)
    run_steps(model, words, ids, SecondOrderLocality(TEXTS, step_size=0.1), NormBall(1e-2), mask, steps=5)
    change = weight.detach() - before
    assert int((change != 0).sum()) == weight.numel() // 4
    assert float(change.abs().max()) <= 1e-2


def test_a_step_without_gradients_moves_nothing(make, words, ids):
    torch.manual_seed(0)
    model = make("llama")
    weight = model.get_parameter(WEIGHT["llama"])
    before = weight.detach().clone()
    # Every token counts as learned, so every step is skipped.
    scope = ParameterScope(1, modules=SCOPE["llama"])
    callbacks = [scope, TokenLoss("cross_entropy", epsilon=1e3), SecondOrderLocality(TEXTS)]
    with editing(model, callbacks, tokenizer=words) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=1.0)
        edit.before_step()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("damping", "overflowing"),
    [(1e-300, "the inverse roots of the factors of model.layers.1"), (1e-60, "the squared gradients of step 1")],
)
def test_a_damping_that_makes_the_roots_overflow_is_named(make, words, ids, damping, overflowing):
    locality = SecondOrderLocality(["w1 w2 w3"], damping=damping)
    with pytest.raises(
        EditError, match=rf"^SecondOrderLocality: damping={damping:g} is too small: {overflowing}.* exceed"
    ):
        run_steps(make("llama"), words, ids, locality)


def test_a_gradient_that_is_not_finite_is_an_error(make, words, ids):
    model = make("llama")
    scope = ParameterScope(1, modules=SCOPE["llama"])
    with editing(model, [scope, TokenLoss("cross_entropy"), SecondOrderLocality(TEXTS)], tokenizer=words) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=1.0)
        edit.before_step()
        (model(input_ids=ids, labels=ids).loss * float("nan")).backward()
        with pytest.raises(EditError, match="SecondOrderLocality: the gradients of step 1 contain NaN or infinite"):
            optimizer.step()


def test_inputs_need_no_backward_pass(make, words, ids, monkeypatch):
    monkeypatch.setattr("kedit_train.core.drift.factors_of_texts.kfac_factors", None)
    model = make("llama")
    edit = run_steps(model, words, ids, SecondOrderLocality(TEXTS, factors="inputs"))
    assert "edit/locality/second_order_kl" not in edit.history[-1]


def test_the_file_of_factors_is_read_by_later_runs(make, words, ids, tmp_path, monkeypatch):
    path, final = tmp_path / "factors.safetensors", []
    for attempt in range(2):
        torch.manual_seed(0)
        model = make("llama")
        if attempt:
            # A second computation would fail.
            monkeypatch.setattr("kedit_train.core.drift.factors_of_texts.kfac_factors", None)
        run_steps(model, words, ids, SecondOrderLocality(TEXTS, factors_path=path))
        final.append(model.get_parameter(WEIGHT["llama"]).detach().clone())
    assert torch.equal(final[0], final[1])


def test_a_token_loss_is_needed(make, words):
    scope = ParameterScope(1, modules=SCOPE["llama"])
    with pytest.raises(EditError, match=r"SecondOrderLocality: .* length of each step .* loss, .*; add Token"):
        attach(make(), words, SecondOrderLocality(TEXTS), scope)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"step_size": 0.0}, r"in \(0, 1\]"),
        ({"damping": 0.0}, "> 0"),
        ({"factors": "fisher"}, '"kfac" or "inputs"'),
        ({"factors_path": "factors.pt"}, r"a path that ends in \.safetensors, without NUL characters, or None"),
    ],
)
def test_invalid_arguments_are_refused(wrong, expected):
    (name,) = wrong
    with pytest.raises(EditError, match=f"SecondOrderLocality: {name} must be {expected}"):
        SecondOrderLocality(TEXTS, **wrong)


def test_transformers_does_not_clip_the_gradients(make, words, ids, tmp_path):
    from transformers import Trainer, TrainingArguments, default_data_collator

    weights = []
    for largest_norm in (0.0, 1e-3):
        torch.manual_seed(0)
        model = make("llama")
        args = TrainingArguments(
            tmp_path, max_steps=2, max_grad_norm=largest_norm, report_to=[], save_strategy="no", use_cpu=True,
            disable_tqdm=True,
        )  # fmt: skip
        callbacks = [ParameterScope(1, modules=SCOPE["llama"]), TokenLoss("cross_entropy"), SecondOrderLocality(TEXTS)]
        rows = [{"input_ids": row, "labels": row} for row in ids]
        trainer = Trainer(
            model, args, train_dataset=rows, processing_class=words, callbacks=callbacks,  # type: ignore[arg-type]
            data_collator=default_data_collator,
        )  # fmt: skip
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        messages = [str(w.message) for w in caught if "max_grad_norm" in str(w.message)]
        assert len(messages) == (1 if largest_norm else 0)
        # The trainer's own arguments are as before.
        assert args.max_grad_norm == largest_norm
        weights.append(model.get_parameter(WEIGHT["llama"]).detach().clone())
    assert torch.equal(weights[0], weights[1])


@pytest.mark.filterwarnings("ignore:the run was resumed with")
@pytest.mark.parametrize("changed", [{"texts": TEXTS[:3]}, {"damping": 0.5}, {"factors": "inputs"}, {"limit": 5}])
def test_a_run_with_other_coordinates_cannot_be_resumed(make, words, ids, changed):
    torch.manual_seed(0)
    model = make("llama")
    options = {"texts": TEXTS} | changed
    with editing(model, _callbacks(SecondOrderLocality(TEXTS)), tokenizer=words) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=1.0)
        edit.before_step()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        state = edit.state_dict()
    same, other = SecondOrderLocality(TEXTS), SecondOrderLocality(options.pop("texts"), **options)
    with editing(model, _callbacks(same), tokenizer=words) as edit:
        edit.load_state_dict(state)
        edit.before_step()
    with editing(model, _callbacks(other), tokenizer=words) as edit:
        edit.load_state_dict(state)
        with pytest.raises(EditError, match="SecondOrderLocality: the checkpoint was written with other texts"):
            edit.before_step()


def _callbacks(locality: SecondOrderLocality) -> list[Any]:
    return [ParameterScope(1, modules=SCOPE["llama"]), TokenLoss("cross_entropy"), locality]


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_does_not_change_the_steps(make, words, ids, fused):
    weights = []
    for scale in (None, 2.0**10):
        torch.manual_seed(0)
        model = make("llama")
        locality = SecondOrderLocality(TEXTS, step_size=0.1)
        scope = ParameterScope(1, modules=SCOPE["llama"])
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        with editing(model, [scope, TokenLoss("cross_entropy"), locality], tokenizer=words) as edit:
            train_with_scaler(model, edit, ids, scaler, fused=fused)
        weights.append(model.get_parameter(WEIGHT["llama"]).detach().clone())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-7)
