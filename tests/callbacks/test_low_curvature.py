"""LowCurvature: the change has no part in the directions that a dense Gauss-Newton projector bars."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kedit_train.callbacks import LowCurvature, NullSpace, ParameterScope, editing
from kedit_train.core.state_file import load_state, save_state
from kedit_train.data import Edit
from kedit_train.errors import EditError

TEXTS = ["w1 w2 w3 w4 w5", "w9", "w20 w21 w22 w23", "w7 w8 w7"]
WEIGHT = {"llama": "model.layers.1.mlp.down_proj.weight", "gpt2": "transformer.h.1.mlp.c_proj.weight"}
SCOPE = {"llama": "mlp.down_proj.weight", "gpt2": "mlp.c_proj.weight"}
SMALL = {"llama": {"hidden_size": 8, "intermediate_size": 6}, "gpt2": {"n_embd": 8, "n_inner": 6}}


def scope(family: str = "llama") -> ParameterScope:
    return ParameterScope(1, SCOPE[family])


def train(model: Any, edit: Any, ids: Tensor, steps: int = 50) -> None:
    optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        edit.before_step()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("energy", [0.6, 0.95])
@pytest.mark.parametrize("family", WEIGHT)
def test_the_change_equals_what_the_dense_projector_leaves(make, words, ids, family, energy):
    model = make(family, **SMALL[family])
    name = WEIGHT[family]
    before = model.get_parameter(name).detach().double().clone()
    low = LowCurvature(TEXTS, energy=energy, sequential=False, batch_size=3)
    with editing(model, [low, scope(family)], tokenizer=words, log_every_n_steps=50) as edit:
        edit.before_step()
        inputs, gradients = low._on_texts(edit.run)
        train(model, edit, ids)
    delta = model.get_parameter(name).detach().double() - before
    delta = delta.T if family == "gpt2" else delta
    assert delta.shape == (8, 6)
    # Column-major vec: (A (x) S) vec(D) = vec(S D A).
    dense = torch.kron(inputs[name].mean.double(), gradients[name].mean.double())
    values, vectors = torch.linalg.eigh(dense)
    values, vectors = values.flip(0), vectors.flip(1)
    number = int((values.cumsum(0) / values.sum() < energy).sum()) + 1
    assert values[number - 1] > 1.01 * values[number]
    barred = vectors[:, :number].T @ delta.T.flatten()
    assert float(barred.norm() / delta.norm()) < 1e-5
    assert float(delta.norm()) > 0.1
    row = edit.history[-1]
    assert row["edit/drift/low_curvature_free"] == pytest.approx(1 - number / 48)
    assert row["edit/drift/low_curvature_barred"] == pytest.approx(
        float(values[:number].sum() / values.sum()), rel=1e-3
    )
    assert row["edit/drift/low_curvature_leak"] < 1e-5


def test_it_keeps_answers_on_the_texts_better_than_training_without(make, words, ids):
    rows = [torch.tensor([words(text)["input_ids"]]) for text in TEXTS]

    def divergence(callbacks: list[Any]) -> tuple[float, float, float]:
        torch.manual_seed(0)
        model = make("llama")
        with torch.no_grad():
            before = [model.eval()(row).logits.log_softmax(-1) for row in rows]
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
        with torch.no_grad():
            now = [model.eval()(row).logits.log_softmax(-1) for row in rows]
        apart = torch.cat([(b.exp() * (b - n)).sum(-1).flatten() for b, n in zip(before, now, strict=True)])
        return float(apart.mean()), losses[0], losses[-1]

    free, constrained = divergence([]), divergence([LowCurvature(TEXTS * 20, energy=0.95)])
    assert constrained[0] < 0.1 * free[0]
    # And the edit is still learned, if less.
    assert free[2] < constrained[2] < constrained[1] - 0.2


def test_more_is_free_than_in_the_null_space_of_the_inputs(make, words, ids):
    free = {}
    for kind in (LowCurvature, NullSpace):
        model = make("llama")
        with editing(model, [kind(TEXTS), scope()], tokenizer=words, log_every_n_steps=1) as edit:
            train(model, edit, ids, 1)
        row = edit.history[-1]
        free[kind] = row.get("edit/drift/low_curvature_free", 1 - row.get("edit/drift/null_space_share", 0))
    assert free[LowCurvature] > free[NullSpace]


def test_factors_are_saved_once_reused_and_refused_for_anything_else(make, words, ids, tmp_path, monkeypatch):
    path = tmp_path / "kept" / "factors.safetensors"
    finals = []
    for attempt in range(2):
        torch.manual_seed(0)
        model = make("llama")
        if attempt:
            # Nothing is computed again.
            monkeypatch.setattr("kedit_train.callbacks.low_curvature.curvature_factors", None)
        with editing(model, [LowCurvature(TEXTS, factors=str(path)), scope()], tokenizer=words) as edit:
            train(model, edit, ids, 3)
        finals.append(model.get_parameter(WEIGHT["llama"]).detach().clone())
    assert torch.equal(finals[0], finals[1])
    assert [file.name for file in path.parent.iterdir()] == ["factors.safetensors"]
    with safe_open(path, framework="pt") as file:
        assert set(file.metadata()) == {"weights", "texts", "tokens"}
        assert file.get_slice(f"inputs/{WEIGHT['llama']}").get_shape() == [32, 32]
        assert file.get_slice(f"gradients/{WEIGHT['llama']}").get_shape() == [16, 16]

    def begin(model: Any, **options: Any) -> None:
        callback = LowCurvature(**{"texts": TEXTS, "factors": str(path), **options})
        with editing(model, [callback, scope()], tokenizer=words) as edit:
            edit.before_step()

    with pytest.raises(EditError, match="made with other weights than this run's; give another path"):
        begin(model)
    torch.manual_seed(0)
    with pytest.raises(EditError, match="made with other texts than this run's"):
        begin(make("llama"), texts=TEXTS[:-1])
    # The same weights in the scope, below them another model.
    torch.manual_seed(0)
    other = make("llama")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(1e-3)
    with pytest.raises(EditError, match="made with other weights than this run's"):
        begin(other)
    whole = path.read_bytes()
    spoilt = {f"{kind}/{WEIGHT['llama']}": torch.full((n, n), float("nan")) for kind, n in (("inputs", 32),)}
    with safe_open(path, framework="pt") as file:
        save_file(spoilt, path, metadata=file.metadata())
    torch.manual_seed(0)
    with pytest.raises(EditError, match=r"has no usable factor inputs/"):
        begin(make("llama"))
    path.write_bytes(whole[:100])
    with pytest.raises(EditError, match="cannot be read"):
        begin(make("llama"))


class Knows(ParameterScope):
    """Says what the run edits, as EditMetrics and data modules do."""

    def __init__(self, edits: list[Edit]) -> None:
        super().__init__(1, SCOPE["llama"])
        self.edits = edits

    def prepare(self, run: Any) -> None:
        super().prepare(run)
        run.edits = self.edits


def test_sequential_factors_are_the_average_over_tokens_of_texts_and_earlier_edits(make, words, tmp_path):
    model, name = make("llama"), WEIGHT["llama"]
    low, first = LowCurvature(TEXTS, sequential=True), Knows([Edit("w40 w41", "w42")])
    ids = torch.tensor([words("w40 w41 w42")["input_ids"]])
    with editing(model, [low, first], tokenizer=words) as edit:
        train(model, edit, ids, 5)
        texts = {kind: moments[name].sum.clone() for kind, moments in zip("as", low._running, strict=True)}
        assert low._running[0][name].count == 13
    # What the edited model makes of the edit, with its end of text, has joined.
    again = LowCurvature(["w40 w41 w42 </s>"])
    with editing(model, [again, scope()], tokenizer=words) as edit:
        edit.before_step()
        own = again._on_texts(edit.run)
    for kind, moments, running in zip("as", own, low._running, strict=True):
        assert moments[name].count == 4
        assert running[name].count == 17
        torch.testing.assert_close(running[name].sum, texts[kind] + moments[name].sum, rtol=1e-4, atol=1e-5)
    with editing(model, [low, Knows([Edit("w50", "w51")])], tokenizer=words) as edit:
        edit.before_step()
        assert low._running[0][name].count == 17
        save_state(tmp_path, low.state())
        weights, reference = {name: torch.randn(16, 32)}, dict(edit.run.reference)
        wanted = low.constrain(weights, reference)[name]
    resumed = LowCurvature(TEXTS, sequential=True)
    with editing(model, [resumed, Knows([Edit("w50", "w51")])], tokenizer=words) as edit:
        edit.before_step()
        assert not torch.equal(resumed.constrain(weights, reference)[name], wanted)
        resumed.load_state(load_state(tmp_path) or {})
        assert torch.equal(resumed.constrain(weights, reference)[name], wanted)
        assert resumed._running[1][name].count == 17
        with pytest.raises(EditError, match="checkpoint is of another scope"):
            resumed.load_state({"curvatures": {}})
    other = make("llama")
    with editing(other, [low, first], tokenizer=words) as edit:
        with pytest.warns(UserWarning, match="a new sequence begins"):
            edit.before_step()
        assert low._running[0][name].count == 13


def attempt(model: Any, callback: Any, words: Any, *more: Any) -> None:
    with editing(model, [callback, *more], tokenizer=words) as edit:
        edit.before_step()


def test_what_cannot_hold_is_refused(make, words):
    with pytest.raises(EditError, match="needs a causal language model, and Linear has no language-model head"):
        attempt(torch.nn.Linear(3, 3), LowCurvature(TEXTS), words)
    with pytest.raises(EditError, match=r"not the weight of nn.Linear or Conv1D \(transformer.h.1.mlp.c_proj.bias\)"):
        attempt(make("gpt2"), LowCurvature(TEXTS), words, ParameterScope(1, "mlp.c_proj"))
    with pytest.raises(EditError, match="vocabulary by vocabulary"):
        attempt(make(), LowCurvature(TEXTS), words, ParameterScope(None, "lm_head"))
    with pytest.raises(EditError, match=r"sequential=True .* nothing says what they are; add EditMetrics"):
        attempt(make(), LowCurvature(TEXTS, sequential=True), words, scope())
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["down_proj"], task_type="CAUSAL_LM")
    with pytest.raises(EditError, match="factor of an adapter, which has no curvature while B is zero"):
        attempt(get_peft_model(make(), config), LowCurvature(TEXTS), words)


@pytest.mark.parametrize(
    "wrong", [{"energy": 0.0}, {"energy": 1.0}, {"factors": "factors.pt"}, {"samples": 0}, {"max_length": 0}]
)
def test_arguments_out_of_bounds_are_refused(wrong):
    with pytest.raises(EditError, match=f"LowCurvature: {next(iter(wrong))}=.* is out of bounds"):
        LowCurvature(TEXTS, **wrong)
