"""Files of statistics: they replace running the model on the texts, and one file fits several callbacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from callbacks.inputs import SCOPE, TEXTS, WEIGHT, ScopeOfEdits, adamw, attach, train

from kedit_train.callbacks import LowCurvature, NullSpace, ParameterScope, SecondOrderLocality, TokenLoss, editing
from kedit_train.core.drift import factors_of_texts
from kedit_train.data import Edit
from kedit_train.errors import EditError

NAME = WEIGHT["llama"]


def trained(model: Any, words: Any, ids: Any, *callbacks: Any) -> torch.Tensor:
    before = model.get_parameter(NAME).detach().clone()
    with editing(model, [*callbacks, ParameterScope(1, modules=SCOPE["llama"])], tokenizer=words) as edit:
        train(model, edit, ids, adamw(edit.parameters()), 5)
    after = model.get_parameter(NAME).detach().clone()
    with torch.no_grad():
        model.get_parameter(NAME).copy_(before)
    return after


def refuse_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the texts were read again")

    monkeypatch.setattr(factors_of_texts, "input_moments", fail)


def test_a_second_run_reads_the_file_and_gives_the_same_weights(make, words, ids, tmp_path, monkeypatch):
    model, path = make("llama"), tmp_path / "statistics.safetensors"
    without = trained(model, words, ids, NullSpace(TEXTS))
    first = trained(model, words, ids, NullSpace(TEXTS, factors_path=path))
    assert torch.equal(first, without)
    refuse_to_read(monkeypatch)
    assert torch.equal(trained(model, words, ids, NullSpace(TEXTS, factors_path=path)), without)
    # Another energy needs no other statistics.
    assert not torch.equal(trained(model, words, ids, NullSpace(TEXTS, energy=0.5, factors_path=path)), without)


def test_the_file_of_low_curvature_can_be_used(make, words, ids, tmp_path, monkeypatch):
    model, path = make("llama"), tmp_path / "factors.safetensors"
    without = trained(model, words, ids, NullSpace(TEXTS))
    trained(model, words, ids, LowCurvature(TEXTS, factors_path=path))
    refuse_to_read(monkeypatch)
    torch.testing.assert_close(trained(model, words, ids, NullSpace(TEXTS, factors_path=path)), without)


def test_second_order_steps_with_input_moments_read_their_file(make, words, ids, tmp_path, monkeypatch):
    model, path = make("llama"), tmp_path / "moments.safetensors"

    def steps() -> torch.Tensor:
        return trained(model, words, ids, TokenLoss(), SecondOrderLocality(TEXTS, factors="inputs", factors_path=path))

    first = steps()
    refuse_to_read(monkeypatch)
    assert torch.equal(steps(), first)


def test_other_texts_are_refused(make, words, ids, tmp_path):
    model, path = make("llama"), tmp_path / "statistics.safetensors"
    trained(model, words, ids, NullSpace(TEXTS, factors_path=path))
    with pytest.raises(EditError, match="its factors were computed with other texts, another limit or another seed"):
        trained(model, words, ids, NullSpace(TEXTS[:2], factors_path=path))
    with pytest.raises(EditError, match=r"no statistics of gradients, because it was written by NullSpace or with"):
        trained(model, words, ids, LowCurvature(TEXTS, factors_path=path))
    with pytest.raises(
        EditError, match=r"factors were computed by another callback, which handles the first tokens of texts"
    ):
        trained(model, words, ids, TokenLoss(), SecondOrderLocality(TEXTS, factors_path=path))
    with (
        editing(
            model, [NullSpace(TEXTS, factors_path=path), ParameterScope(0, modules=SCOPE["llama"])], tokenizer=words
        ) as e,
        pytest.raises(
            EditError, match=r"has no statistics of the parameter 'model\.layers\.0\..* written for another scope"
        ),
    ):
        e.before_step()


def test_lora_is_refused(make, words, tmp_path):
    peft = pytest.importorskip("peft")
    path = tmp_path / "statistics.safetensors"
    adapted = peft.get_peft_model(make("llama"), peft.LoraConfig(target_modules=["down_proj"], r=2))
    with (
        editing(adapted, [NullSpace(TEXTS, factors_path=path)], tokenizer=words) as edit,
        pytest.raises(EditError, match=r"^NullSpace: factors_path cannot be used with LoRA"),
    ):
        edit.before_step()


def test_a_sequence_of_runs_reads_the_file_before_its_first_run(make, words, tmp_path):
    """The file belongs to the weights before the first run. Later runs do not need it."""
    path = tmp_path / "statistics.safetensors"
    model, null_space = make("llama"), NullSpace(TEXTS, sequential=True, factors_path=path)
    attach(model, words, NullSpace(TEXTS, factors_path=path), ScopeOfEdits([Edit("w40", "w41")]))
    written = path.stat().st_mtime_ns
    for prompt in ("w40 w41", "w50 w51"):
        ids = torch.tensor([words(f"{prompt} w42")["input_ids"]])
        scope = ScopeOfEdits([Edit(prompt, "w42")])
        with editing(model, [null_space, scope], tokenizer=words, log_every_n_steps=5) as edit:
            train(model, edit, ids, adamw(edit.parameters()), 5)
        assert edit.history[-1]["edit/drift/null_space_leak"] < 1e-5
    assert path.stat().st_mtime_ns == written


def test_wrong_arguments():
    with pytest.raises(EditError, match=r"^NullSpace: factors_path must be a path that ends in \.safetensors"):
        NullSpace(TEXTS, factors_path="factors.pt")
    with pytest.raises(EditError, match=r"^NullSpace: factors_path='f\.safetensors' needs texts"):
        NullSpace([torch.ones(2, 3)], factors_path="f.safetensors")
