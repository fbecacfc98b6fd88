"""LowCurvature: the change has no part in the directions that a dense Gauss-Newton projector removes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from callbacks.inputs import SCOPE, WEIGHT, ScopeOfEdits, adamw, attach, train
from torch import Tensor

from kedit_train.callbacks import LowCurvature, NullSpace, ParameterScope, editing
from kedit_train.core.drift.kfac import KFACFactors
from kedit_train.core.drift.linear_layers import find_linear_layers
from kedit_train.core.state_file import load_state, save_state
from kedit_train.data import Edit
from kedit_train.errors import EditError

TEXTS = ["w1 w2 w3 w4 w5", "w9", "w20 w21 w22 w23", "w7 w8 w7"]
SMALL = {"llama": {"hidden_size": 8, "intermediate_size": 6}, "gpt2": {"n_embd": 8, "n_inner": 6}}
NAME = WEIGHT["llama"]


def scope(family: str = "llama") -> ParameterScope:
    return ParameterScope(1, modules=SCOPE[family])


def factors_of(callback: LowCurvature, run: Any) -> KFACFactors:
    return callback._factors_of_texts(run, find_linear_layers(run.model, run.scope))


@pytest.mark.parametrize("energy", [0.6, 0.95])
@pytest.mark.parametrize("family", WEIGHT)
def test_the_change_is_what_the_dense_projector_leaves(make, words, ids, family, energy):
    model = make(family, **SMALL[family])
    name = WEIGHT[family]
    before = model.get_parameter(name).detach().double().clone()
    low = LowCurvature(TEXTS, energy=energy, batch_size=3)
    with editing(model, [low, scope(family)], tokenizer=words, log_every_n_steps=50) as edit:
        edit.before_step()
        factors = factors_of(low, edit.run)
        train(model, edit, ids, adamw(edit.parameters()))
    change = model.get_parameter(name).detach().double() - before
    change = change.T if family == "gpt2" else change
    assert change.shape == (8, 6)
    # With column-major vec: (A (x) S) vec(D) = vec(S D A).
    dense = torch.kron(factors.inputs[name].mean.double(), factors.gradients[name].mean.double())
    values, vectors = torch.linalg.eigh(dense)
    values, vectors = values.flip(0), vectors.flip(1)
    number = int((values.cumsum(0) / values.sum() < energy).sum()) + 1
    assert values[number - 1] > 1.01 * values[number]
    removed = vectors[:, :number].T @ change.T.flatten()
    assert float(removed.norm() / change.norm()) < 1e-5
    assert float(change.norm()) > 0.1
    metrics = edit.history[-1]
    assert metrics["edit/drift/low_curvature_free"] == pytest.approx(1 - number / 48)
    share = float(values[:number].sum() / values.sum())
    assert metrics["edit/drift/low_curvature_removed"] == pytest.approx(share, rel=1e-3)
    assert metrics["edit/drift/low_curvature_leak"] < 1e-5


def test_predictions_on_the_texts_change_less_than_without_it(make, words, ids):
    sequences = [torch.tensor([words(text)["input_ids"]]) for text in TEXTS]

    def log_probabilities(model: Any) -> list[Tensor]:
        with torch.no_grad():
            return [model.eval()(sequence).logits.log_softmax(-1) for sequence in sequences]

    def divergence(callbacks: list[Any]) -> tuple[float, float, float]:
        torch.manual_seed(0)
        model = make("llama")
        before = log_probabilities(model)
        with editing(model, [*callbacks, scope()], tokenizer=words) as edit:
            optimizer = torch.optim.SGD(edit.parameters(), lr=0.05)
            losses = []
            for _ in range(20):
                edit.before_step()
                loss = model(input_ids=ids, labels=ids).loss
                losses.append(float(loss.detach()))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        after = log_probabilities(model)
        kl = torch.cat([(b.exp() * (b - a)).sum(-1).flatten() for b, a in zip(before, after, strict=True)])
        return float(kl.mean()), losses[0], losses[-1]

    free, constrained = divergence([]), divergence([LowCurvature(TEXTS * 20, energy=0.95)])
    assert constrained[0] < 0.1 * free[0]
    # The edit is still learned, though less.
    assert free[2] < constrained[2] < constrained[1] - 0.2


def test_more_directions_are_free_than_with_the_null_space(make, words, ids):
    free = {}
    for kind in (LowCurvature, NullSpace):
        model = make("llama")
        with editing(model, [kind(TEXTS), scope()], tokenizer=words, log_every_n_steps=1) as edit:
            train(model, edit, ids, adamw(edit.parameters()), 1)
        metrics = edit.history[-1]
        free[kind] = metrics.get("edit/drift/low_curvature_free", 1 - metrics.get("edit/drift/null_space_share", 0))
    assert free[LowCurvature] > free[NullSpace]


def test_the_file_of_factors_is_written_once_and_read_by_later_runs(make, words, ids, tmp_path, monkeypatch):
    path = tmp_path / "folder" / "factors.safetensors"
    final = []
    for attempt in range(2):
        torch.manual_seed(0)
        model = make("llama")
        if attempt:
            # A second computation would fail.
            monkeypatch.setattr("kedit_train.core.drift.factors_of_texts.kfac_factors", None)
        with editing(model, [LowCurvature(TEXTS, factors_path=path), scope()], tokenizer=words) as edit:
            train(model, edit, ids, adamw(edit.parameters()), 3)
        final.append(model.get_parameter(NAME).detach().clone())
    assert torch.equal(final[0], final[1])


def test_a_file_of_factors_is_refused_for_another_model_and_other_texts(make, words, tmp_path):
    path = tmp_path / "factors.safetensors"

    def start(model: Any, texts: list[str]) -> None:
        attach(model, words, LowCurvature(texts, factors_path=str(path)), scope())

    torch.manual_seed(0)
    model = make("llama")
    start(model, TEXTS)
    with pytest.raises(
        EditError, match=r"LowCurvature: .* does not fit this run: its factors were computed with other texts"
    ):
        start(model, TEXTS[:-1])
    # The weights in scope are the same, but a layer below them is not.
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1e-3)
    with pytest.raises(EditError, match=r"does not fit this run: .* with other weights than .*; use another path"):
        start(model, TEXTS)


def test_sequential_averages_the_factors_of_texts_and_previous_edits_over_tokens(make, words):
    model = make("llama")
    low, ids = LowCurvature(TEXTS, sequential=True), torch.tensor([words("w40 w41 w42")["input_ids"]])
    with editing(model, [low, ScopeOfEdits([Edit("w40 w41", "w42")])], tokenizer=words) as edit:
        train(model, edit, ids, adamw(edit.parameters()), 5)
        assert low._accumulated is not None
        of_texts = {key: m[NAME].sum.clone() for key, m in vars(low._accumulated).items()}
        assert low._accumulated.inputs[NAME].count == 13
    # The edited model has read the edit with its end-of-text token.
    of_edit = LowCurvature(["w40 w41 w42 </s>"])
    with editing(model, [of_edit, scope()], tokenizer=words) as edit:
        edit.before_step()
        factors = factors_of(of_edit, edit.run)
    for key, moments in vars(factors).items():
        both = vars(low._accumulated)[key][NAME]
        assert moments[NAME].count == 4
        assert both.count == 17
        torch.testing.assert_close(both.sum, of_texts[key] + moments[NAME].sum, rtol=1e-4, atol=1e-5)


def test_sequential_starts_again_with_another_model(make, words):
    low, first = LowCurvature(TEXTS, sequential=True), ScopeOfEdits([Edit("w40 w41", "w42")])
    attach(make("llama"), words, low, first)
    assert low._accumulated is not None
    assert low._accumulated.inputs[NAME].count == 17
    with editing(make("llama"), [low, first], tokenizer=words) as edit:
        with pytest.warns(UserWarning, match="sequential=True"):
            edit.before_step()
        assert low._accumulated.inputs[NAME].count == 13


def test_a_checkpoint_restores_the_factors_of_previous_edits(make, words, tmp_path):
    model = make("llama")
    low = LowCurvature(TEXTS, sequential=True)
    attach(model, words, low, ScopeOfEdits([Edit("w40 w41", "w42")]))
    second = ScopeOfEdits([Edit("w50", "w51")])
    with editing(model, [low, second], tokenizer=words) as edit:
        edit.before_step()
        assert low._accumulated is not None
        assert low._accumulated.inputs[NAME].count == 17
        save_state(tmp_path, low.state())
        weights, reference = {NAME: torch.randn(16, 32)}, dict(edit.run.reference)
        expected = low.constrain(weights, reference)[NAME]
    resumed = LowCurvature(TEXTS, sequential=True)
    with editing(model, [resumed, second], tokenizer=words) as edit:
        edit.before_step()
        assert not torch.equal(resumed.constrain(weights, reference)[NAME], expected)
        resumed.load_state(load_state(tmp_path) or {})
        assert torch.equal(resumed.constrain(weights, reference)[NAME], expected)
        assert resumed._accumulated is not None
        assert resumed._accumulated.gradients[NAME].count == 17
        with pytest.raises(EditError, match="checkpoint was written with another scope"):
            resumed.load_state({"subspaces": {}})


def test_sequential_needs_to_know_the_edits(make, words):
    with pytest.raises(EditError, match=r"LowCurvature: sequential=True .* EditMetrics"):
        attach(make(), words, LowCurvature(TEXTS, sequential=True), scope())


def test_sequential_needs_the_same_scope_in_every_run(make, words):
    model, low = make("llama"), LowCurvature(TEXTS, sequential=True)
    attach(model, words, low, ScopeOfEdits([Edit("w40 w41", "w42")]))
    wider = ScopeOfEdits([Edit("w50", "w51")])
    wider.modules = "mlp.*_proj.weight"
    with pytest.raises(EditError, match="LowCurvature: sequential=True needs the same scope in every run"):
        attach(model, words, low, wider)


def test_a_model_without_language_model_head_is_refused(words):
    with pytest.raises(
        EditError, match=r"LowCurvature: .*causal language model, got Linear, which has no language-model head"
    ):
        attach(torch.nn.Linear(3, 3), words, LowCurvature(TEXTS))


def test_a_scope_with_a_bias_is_refused(make, words):
    with pytest.raises(EditError, match=r"these are not: transformer\.h\.1\.mlp\.c_proj\.bias"):
        attach(make("gpt2"), words, LowCurvature(TEXTS), ParameterScope(1, modules="mlp.c_proj"))


def test_the_output_head_is_refused(make, words):
    with pytest.raises(EditError, match=r"LowCurvature: lm_head\.weight is the output head"):
        attach(make(), words, LowCurvature(TEXTS), ParameterScope(modules="lm_head"))


def test_an_adapter_is_refused(make, words):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["down_proj"], task_type="CAUSAL_LM")
    with pytest.raises(EditError, match="the scope must not contain LoRA factors, got "):
        attach(get_peft_model(make(), config), words, LowCurvature(TEXTS))


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"energy": 0.0}, r"in \(0, 1\)"),
        ({"energy": 1.0}, r"in \(0, 1\)"),
        ({"factors_path": "factors.pt"}, r"a path that ends in \.safetensors, without NUL characters, or None"),
        ({"limit": 0}, "an integer >= 1, or None"),
        ({"batch_size": 0}, "an integer >= 1"),
    ],
)
def test_invalid_arguments_are_refused(wrong, expected):
    (name,) = wrong
    with pytest.raises(EditError, match=f"LowCurvature: {name} must be {expected}, got {wrong[name]!r}"):
        LowCurvature(TEXTS, **wrong)
