"""F-Learning's subtraction against the formula written out, and each of its guards at work, on the embedded world."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from delta.tiny import equal_bits, state_of

from kedit_train import EditDelta, EditError, evaluate, run_edits, world
from kedit_train.callbacks import ParameterScope
from kedit_train.data import Edit
from kedit_train.data.tokenization import separator
from kedit_train.delta import sweep
from kedit_train.modes import ForgetThenLearn, Forgetting, TrainLoop, forget

NAME = "model.layers.4.mlp.down_proj.weight"
FULL = world.edits(6)
TEXTS = world.locality_texts(exclude=FULL, n=12)
# One question beside each edit is enough here.
EDITS = [replace(e, rephrases=(), portability={}, locality={"neighbour": e.locality["neighbour"][:1]}) for e in FULL]


@pytest.fixture(scope="module")
def loaded() -> Any:
    return world.load()


@pytest.fixture
def model(loaded) -> Any:
    return copy.deepcopy(loaded[0])


@pytest.fixture
def tokenizer(loaded) -> Any:
    return loaded[1]


def loop(tokenizer: Any, epochs: int = 4, lr: float = 2e-3) -> TrainLoop:
    scope = ParameterScope(layers="4", modules="mlp.down_proj")
    return TrainLoop(tokenizer, [scope], epochs=epochs, lr=lr, stop_loss=0.0)


def probability(model: Any, tokenizer: Any, edit: Edit) -> float:
    """Of the whole old answer: the product over its tokens, one forward pass each."""
    ids = tokenizer(edit.prompt)["input_ids"]
    ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
    answer = str(edit.old_target)
    found = 1.0
    for token in tokenizer(separator(edit.prompt, answer) + answer, add_special_tokens=False)["input_ids"]:
        with torch.no_grad():
            found *= float(model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)[token])
        ids.append(token)
    return found


def test_the_delta_is_minus_the_coefficient_times_what_training_on_the_old_answers_changes(model, tokenizer):
    base = state_of(model)
    seen: list[list[Edit]] = []

    def train(own: Any, edits: Sequence[Edit]) -> None:
        seen.append(list(edits))
        loop(tokenizer)(own, edits)

    before = torch.random.get_rng_state()
    guards: dict[str, Any] = {"texts": TEXTS, "bound": 1e-9, "growth": 9.0}
    with pytest.warns(UserWarning, match="with coefficient 0.8 the old answers still have a mean probability of 0.9"):
        found = forget(model, tokenizer, EDITS, train, [0.4, 0.8], scale="trained", **guards)
    assert equal_bits(state_of(model), base)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training is False
    assert [(e.prompt, e.target) for e in seen[0]] == [(e.prompt, e.old_target) for e in EDITS]

    trained = copy.deepcopy(model)
    with torch.random.fork_rng():
        loop(tokenizer)(trained, [replace(edit, target=str(edit.old_target)) for edit in EDITS])
    step = trained.get_parameter(NAME).detach() - base[NAME]
    assert found.length == pytest.approx(float(step.norm() / base[NAME].norm()), rel=1e-5)
    assert isinstance(found.delta, EditDelta)
    assert list(found.delta.changes) == [NAME]
    # Of 0.4 and 0.8 the larger, as neither guard ended it.
    assert (found.coefficient, found.ended_by) == (0.8, "coefficients")
    wanted = base[NAME] + -0.8 * step
    for taken in found.measured:
        own = copy.deepcopy(model)
        with torch.no_grad():
            own.get_parameter(NAME).copy_(base[NAME] + -taken.factor * step)
        byhand = [probability(own, tokenizer, edit) for edit in EDITS]
        assert taken.probability == pytest.approx(sum(byhand) / len(byhand), rel=1e-4)
    found.delta.apply(model)
    assert torch.equal(model.get_parameter(NAME), wanted)
    assert found.delta.meta["configuration"]["forgetting"] == {
        "coefficient": 0.8, "factor": 0.8, "scale": "trained", "ended_by": "coefficients",
    }  # fmt: skip


def test_a_coefficient_is_a_length_whatever_the_training_was(model, tokenizer):
    """Short and long trainings give differences of other lengths, and the same length of them forgets alike."""
    found: list[Forgetting] = []
    for epochs, lr in ((2, 1e-3), (10, 2e-3)):
        train = loop(tokenizer, epochs, lr)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(forget(model, tokenizer, EDITS, train, [0.3], texts=TEXTS, bound=1e-9, growth=1e9))
        taken = found[-1].delta
        assert taken is not None
        norm = float(taken.difference(NAME).norm() / model.get_parameter(NAME).detach().norm())
        assert norm == pytest.approx(0.3, rel=1e-4)
        assert found[-1].measured[-1].factor == pytest.approx(0.3 / found[-1].length)
    short, long = found
    assert long.length > 5 * short.length
    assert abs(short.measured[-1].probability - long.measured[-1].probability) < 0.2


def test_each_guard_ends_it(model, tokenizer):
    common: dict[str, Any] = {"texts": TEXTS, "growth": 1e6}
    train = loop(tokenizer)
    found = forget(model, tokenizer, EDITS, train, [0.4, 0.05, 0.8, 1.6], bound=0.5, **common)
    tried = [one.coefficient for one in found.measured]
    assert found.ended_by == "forgotten"
    assert tried == [0.0, 0.05, 0.4, 0.8, 1.6][: len(tried)]
    assert found.measured[-1].probability <= 0.5 < found.measured[-2].probability
    assert found.measured[0].given == 1.0
    assert found.coefficient == tried[-1] < 1.6

    # Texts that state the old facts themselves suffer from the first step on.
    own = [f"{e.prompt}{separator(e.prompt, str(e.old_target))}{e.old_target}." for e in EDITS]
    with pytest.warns(UserWarning, match=r"coefficient 0\.\d+ takes the perplexity from .* take finer coefficients"):
        found = forget(model, tokenizer, EDITS, train, [0.01, 0.8, 1.6], texts=own, growth=1.02, bound=0.01)
    assert (found.ended_by, found.coefficient, len(found.measured)) == ("perplexity", 0.01, 3)
    assert found.measured[1].perplexity <= 1.02 * found.measured[0].perplexity < found.measured[2].perplexity
    with pytest.warns(UserWarning, match="with coefficient 0 the old answers still have"):
        found = forget(model, tokenizer, EDITS, train, [1.6], texts=own, growth=1.0)
    assert (found.delta, found.coefficient, found.ended_by) == (None, 0.0, "perplexity")

    # A loop that stops at a low loss stops at once where the answers are known: the paper's coefficients reach nowhere.
    early = TrainLoop(tokenizer, [ParameterScope(layers="4", modules="mlp.down_proj")])
    with pytest.warns(UserWarning, match=r"no more coefficients .* give larger ones, or scale='base'"):
        found = forget(model, tokenizer, EDITS, early, texts=TEXTS, scale="trained")
    assert (found.ended_by, found.coefficient) == ("coefficients", 0.7)
    assert found.length < 0.02
    assert found.measured[-1].probability > 0.99
    assert forget(model, tokenizer, EDITS, early, texts=TEXTS, bound=0.7, growth=3.0).ended_by == "forgotten"


def test_only_what_the_model_answers_is_forgotten(model, tokenizer):
    real, other, new, unknown = EDITS[0], EDITS[1], EDITS[2], EDITS[3]
    edits = [
        replace(real, id="its own"),
        replace(other, old_target=None, id="not told"),
        replace(new, target=str(new.old_target), id="done"),
        replace(unknown, old_target="Atlantis", id=""),
    ]
    found = forget(model, tokenizer, edits, loop(tokenizer, 1), [0.01, 2.0], texts=TEXTS, growth=1e6)
    assert [(e.id, e.target) for e in found.forgot] == [("its own", real.old_target), ("not told", other.old_target)]
    assert found.left_out == {
        "done": f"the model gives the new answer already ({new.old_target!r})",
        "3": f"the model answers {unknown.old_target!r} and not 'Atlantis'",
    }
    called: list[Any] = []
    with pytest.warns(UserWarning, match="the model gives none of 1 old answers: nothing to forget"):
        found = forget(model, tokenizer, edits[3:], lambda *given: called.append(given), texts=TEXTS)
    assert (found.delta, found.ended_by, called) == (None, "unknown", [])
    with pytest.warns(UserWarning, match="gives none of 1"):
        found = forget(model, tokenizer, edits[:1], lambda *given: None, texts=TEXTS, max_new_tokens=1)
    assert found.left_out == {"its own": "the model gives no answer that ends"}


def test_what_makes_no_sense_is_refused_and_the_model_given_back(model, tokenizer):
    base = state_of(model)

    def fails(own: Any, edits: Any) -> None:
        with torch.no_grad():
            own.get_parameter(NAME).zero_()
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        forget(model, tokenizer, EDITS, fails, texts=TEXTS)
    for words, message in [
        ({"coefficients": []}, r"coefficients=\(\): give numbers above 0"),
        ({"coefficients": [0.1, -0.3]}, "give numbers above 0"),
        ({"scale": "norm"}, "scale='norm', bound=0.5, growth=1.1: expected base or trained"),
        ({"bound": 0.0}, "bound=0.0"),
        ({"growth": 0.9}, "growth=0.9"),
        ({"train": lambda *given: None}, "changed no weight"),
        ({"train": lambda own, edits: copy.deepcopy(own)}, "returned another model"),
        ({"edits": []}, "no edits"),
    ]:
        given: dict[str, Any] = {"edits": EDITS[:2], "train": loop(tokenizer, 1), "texts": TEXTS} | words
        with pytest.raises(EditError, match=message):
            forget(model, tokenizer, **given)
    with pytest.raises(EditError, match="give texts="):
        ForgetThenLearn(tokenizer, loop(tokenizer), loop(tokenizer))
    assert equal_bits(state_of(model), base)


@pytest.mark.parametrize("mode", ["single", "batch", "sequential"])
def test_it_trains_in_every_mode_from_what_was_forgotten(model, tokenizer, mode):
    begun: list[Any] = []

    def learn(own: Any, edits: Sequence[Edit]) -> None:
        begun.append((own.get_parameter(NAME).detach().clone(), torch.initial_seed()))
        loop(tokenizer, 20, 5e-3)(own, edits)

    start = model.get_parameter(NAME).detach().clone()
    options: dict[str, Any] = {"texts": TEXTS, "coefficients": [0.3, 0.6, 1.2], "growth": 1e6}
    train = ForgetThenLearn(tokenizer, loop(tokenizer, 2), learn, **options)
    rounds = 1 if mode == "batch" else 2
    asked: dict[str, Any] = {"max_new_tokens": 8, "progress": False}
    result = run_edits(model, tokenizer, EDITS[:2], mode, train=train, **asked)
    assert len(train.results) == len(begun) == rounds
    assert all(found.delta is not None for found in train.results)
    first, delta = begun[0][0], train.results[0].delta
    assert delta is not None
    assert torch.equal(first, delta.changes[NAME].after)
    assert float((first - start).norm()) > 0.1 * float(start.norm())
    assert result.report.metrics["reliability"]["generated"].value == 1.0
    assert "ForgetThenLearn" in result.meta["train"]
    if mode == "single":
        assert torch.equal(model.get_parameter(NAME), start)


def test_negating_an_edit_unlearns_it(model, tokenizer):
    """An edit that was trained in, taken back by its own negation: the edited model less the edit's difference."""
    edits, base = EDITS[:3], copy.deepcopy(model)
    loop(tokenizer, 20, 5e-3)(model, edits)
    asked: dict[str, Any] = {"max_new_tokens": 8, "progress": False}

    def new_answers(current: Any) -> dict[str, float]:
        flat = evaluate(current, tokenizer, edits, **asked).flat()
        return {"reliability": flat["edit/reliability"], "locality": flat["edit/locality"]}

    assert new_answers(model)["reliability"] == 1.0
    # On the edited model: what goes back to the base is minus the edit.
    back = EditDelta.between(model, base)

    def scores(current: Any) -> dict[str, float]:
        return new_answers(current) | {"reliability": 1 - new_answers(current)["reliability"]}

    found = sweep(model, back, scores, coefficients=[0.5, 1.0])
    assert found.points[0].reliability == 0.0
    assert found.points[-1].reliability == 1.0
    (1.0 * back).apply(model)
    said = evaluate(model, tokenizer, [replace(e, target=str(e.old_target), aliases=()) for e in edits], **asked)
    assert said.flat()["edit/reliability"] == 1.0
    torch.testing.assert_close(model.get_parameter(NAME), base.get_parameter(NAME), rtol=1e-5, atol=1e-7)
    assert math.isfinite(found.best.locality)
