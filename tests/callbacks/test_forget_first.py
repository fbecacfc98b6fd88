"""ForgetFirst is compared with training and subtraction by hand. Its limits and its use with constraints are tested."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.forgetting import EDITS, TEXTS, scope
from conformance.hosts import HOSTS
from delta.tiny import equal_bits, state_of
from torch import Tensor

from kedit_train import EditDelta, EditError, world
from kedit_train.callbacks import (
    EditMetrics,
    ForgetFirst,
    ForgetTraining,
    GradientMask,
    NormBall,
    SaveDelta,
    TokenSmoothing,
    editing,
)
from kedit_train.data import Edit, EditDataset
from kedit_train.data.tokenization import collate, pad_token_id, separator
from kedit_train.evaluation.options import EvaluationOptions
from kedit_train.evaluation.scoring.old_answers import find_old_answers

NAME = "model.layers.4.mlp.down_proj.weight"
FAST_TRAINING = ForgetTraining(epochs=3, learning_rate=2e-3)
FAST: dict[str, Any] = {
    "training": ForgetTraining(epochs=3, learning_rate=2e-3, batch_size=4),
    "max_perplexity_ratio": 9.0,
    "max_probability": 0.9,
}


@pytest.fixture
def loaded() -> Any:
    return world.load()


def old(edits: Any = EDITS) -> list[Edit]:
    return [Edit(edit.prompt, str(edit.old_target)) for edit in edits]


def trained_by_hand(model: Any, tokenizer: Any) -> Tensor:
    """Return the change by Adam when it trains on the old answers with the model's own loss, in the order of seed 0."""
    own = copy.deepcopy(model).eval()
    for name, parameter in own.named_parameters():
        parameter.requires_grad_(name == NAME)
    weight = own.get_parameter(NAME)
    optimizer, rows = torch.optim.Adam([weight], lr=2e-3), EditDataset(old()).encode(tokenizer)
    source = torch.Generator().manual_seed(0)
    for _ in range(3):
        for batch in torch.randperm(6, generator=source).split(4):
            optimizer.zero_grad()
            own(**collate([rows[int(i)] for i in batch], pad_id=pad_token_id(tokenizer))).loss.backward()
            optimizer.step()
    return weight.detach() - model.get_parameter(NAME).detach()


def probability(model: Any, tokenizer: Any, edit: Edit) -> float:
    """Return the probability of the whole answer: the product over its tokens, with one forward pass per token."""
    ids, found = tokenizer(edit.prompt)["input_ids"], 1.0
    ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
    words = separator(edit.prompt, edit.target) + edit.target
    for token in tokenizer(words, add_special_tokens=False)["input_ids"]:
        with torch.no_grad():
            found *= float(model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)[token])
        ids.append(token)
    return found


@pytest.mark.parametrize("scale", ["base", "trained"])
def test_the_live_weights_are_the_base_minus_the_factor_times_the_trained_difference(loaded, scale, capsys) -> None:
    model, tokenizer = loaded
    base = state_of(model)
    step = trained_by_hand(model, tokenizer)
    length = float(step.norm() / base[NAME].norm())
    coefficients = [0.2, 0.4] if scale == "base" else [0.2 / length, 0.4 / length]
    options: dict[str, Any] = {**FAST, "max_probability": 1e-9, "scale": scale}
    forget = ForgetFirst(TEXTS, edits=EDITS, coefficients=coefficients, **options)
    random = torch.random.get_rng_state()
    with editing(model.train(), [forget, scope()], tokenizer=tokenizer) as edit:
        with pytest.warns(UserWarning, match="ForgetFirst: the mean probability of the old answers must be .* got 0"):
            edit.before_step()
        run = edit.run
        wanted = base[NAME] - 0.4 / length * step
        moved = model.get_parameter(NAME).detach() - base[NAME]
        # Adam turns the rounding of small gradients into steps of full size, in few entries.
        assert float((moved - (wanted - base[NAME])).norm() / moved.norm()) < 1e-3
        assert [one.factor for one in forget.measured] == pytest.approx([0.0, 0.2 / length, 0.4 / length], rel=1e-3)
        assert (forget.chosen, run.step, model.training) == (2, 0, True)
        assert torch.equal(torch.random.get_rng_state(), random)
        assert all(parameter.grad is None for parameter in model.parameters())
        # Nothing else has changed, and the model before the edit is the one before forgetting.
        assert equal_bits({n: v for n, v in base.items() if n != NAME}, {
            n: v for n, v in state_of(model).items() if n != NAME
        })  # fmt: skip
        with run.reference_model():
            assert equal_bits(state_of(model), base)
        model.eval()
        by_hand = [probability(model, tokenizer, edit) for edit in old()]
        assert forget.measured[-1].probability == pytest.approx(sum(by_hand) / 6, rel=1e-4)
        rows = run.collect()
        assert rows["edit/forgetting/old_probability"] == forget.measured[2].probability
        assert rows["edit/drift/relative"] == pytest.approx(0.4, rel=1e-2)
    assert "from training on the old answers of 6 of 6 edits" in capsys.readouterr().out


def test_it_ends_at_the_bound_and_before_the_texts_suffer(loaded) -> None:
    model, tokenizer = loaded
    base = state_of(model)
    steps = [1.6, 0.05, 0.4, 0.8]
    forget = ForgetFirst(
        TEXTS, edits=EDITS, coefficients=steps, max_probability=0.5, max_perplexity_ratio=1e6, training=FAST_TRAINING
    )
    with editing(model, [scope(), forget], tokenizer=tokenizer) as edit:
        edit.before_step()
    tried = [one.coefficient for one in forget.measured]
    assert tried == [0.0, 0.05, 0.4, 0.8, 1.6][: len(tried)]
    assert forget.measured[-1].probability <= 0.5 < forget.measured[-2].probability
    assert forget.chosen == len(tried) - 1

    model.load_state_dict(base)
    # These texts state the old facts in other words than the probes. Their perplexity rises from the first step on.
    own = [f"Indeed: {edit.target}." for edit in old()]
    forget = ForgetFirst(
        own,
        edits=EDITS,
        coefficients=[1e-4, 2.0],
        max_probability=0.01,
        max_perplexity_ratio=1.0001,
        training=FAST_TRAINING,
    )
    with editing(model, [scope(), forget], tokenizer=tokenizer) as edit, pytest.warns(UserWarning, match="perplexity"):
        edit.before_step()
    before, last = forget.measured[0], forget.measured[-1]
    assert last.perplexity > 1.0001 * before.perplexity
    moved = float((model.get_parameter(NAME).detach() - base[NAME]).norm() / base[NAME].norm())
    assert moved == pytest.approx(forget.measured[forget.chosen].coefficient, rel=1e-3, abs=1e-9)
    assert moved < 1e-3


def test_what_the_model_does_not_answer_is_not_forgotten(loaded) -> None:
    model, tokenizer = loaded
    base = state_of(model)
    # In the first edit, the model already gives the new answer. In the second edit, it does not give the old answer.
    known = [Edit(EDITS[0].prompt, str(EDITS[0].old_target)), replace(EDITS[1], old_target="Nowhere")]
    forget = ForgetFirst(TEXTS, edits=known, **FAST)
    with editing(model, [scope(), forget], tokenizer=tokenizer) as edit:
        with pytest.warns(UserWarning, match="ForgetFirst: the model gives none of the 2 old answers"):
            edit.before_step()
        assert equal_bits(state_of(model), base)
        assert (forget.measured, forget.metrics(edit.run)) == ([], {})


def test_constraints_hold_for_the_forgetting(loaded) -> None:
    model, tokenizer = loaded
    base = state_of(model)[NAME]
    mask = GradientMask("random", density=0.25)
    forget = ForgetFirst(TEXTS, edits=EDITS, coefficients=[0.5], **{**FAST, "max_probability": 0.999})
    with editing(model, [scope(), forget, mask], tokenizer=tokenizer) as edit:
        edit.before_step()
        moved = model.get_parameter(NAME).detach() != base
    assert 0.2 < float(moved.float().mean()) <= 0.25
    # The whole difference is half as long as the weights, and the mask keeps a quarter of its entries.
    assert 0.1 < float((model.get_parameter(NAME).detach() - base).norm() / base.norm()) < 0.5

    with torch.no_grad():
        model.get_parameter(NAME).copy_(base)
    ball, forget = NormBall(radius=1e-4), ForgetFirst(TEXTS, edits=EDITS, coefficients=[0.5], **FAST)
    with editing(model, [scope(), ball, forget], tokenizer=tokenizer) as edit:
        with pytest.warns(UserWarning, match=r"got 0\.99.* NormBall removed a part of the subtraction"):
            edit.before_step()
        assert 0 < float((model.get_parameter(NAME).detach() - base).abs().max()) <= 1.001e-4


def test_scores_and_the_delta_are_those_of_the_whole_edit(loaded, tmp_path: Path) -> None:
    """The unedited scores are measured before forgetting. The delta leads from the weights at that time to the end."""
    model, tokenizer = loaded
    base = state_of(model)
    path = str(tmp_path / "edit.safetensors")
    metrics = EditMetrics(EDITS, every_n_steps=0, show=False, evaluation=EvaluationOptions(max_new_tokens=8))
    callbacks = [ForgetFirst(TEXTS, coefficients=[0.4, 1.2], **{**FAST, "max_probability": 0.5}), scope(), metrics]
    HOSTS["Lightning"](model, tokenizer, EDITS, [*callbacks, SaveDelta(path)], 1, optimizer=_still)
    assert metrics.unedited is not None
    assert metrics.report is not None
    table = metrics.report.answers_table()
    assert [row["before"] for row in table] == [edit.old_target for edit in EDITS]
    assert sum(row["after"] == row["before"] for row in table) <= 4
    assert metrics.report.flat()["edit/locality"] > 0.8
    delta = EditDelta.load(path)
    assert list(delta.changes) == [NAME]
    delta.revert(model)
    assert equal_bits(state_of(model), base)


def _still(parameters: Any) -> Any:
    """Return an optimizer whose steps move nothing, as in recipes/unlearn.yaml."""
    return torch.optim.Adam(parameters, lr=0.0)


@pytest.mark.parametrize("host", ["Trainer", "Lightning"])
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_does_not_forget_again_and_ends_on_the_same_bits(host: str, tmp_path: Path, capsys) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    def train(resume: bool) -> tuple[dict[str, Tensor], ForgetFirst]:
        model, tokenizer = world.load()
        torch.manual_seed(0)
        forget = ForgetFirst(TEXTS, edits=EDITS, coefficients=[0.2, 0.4, 0.8], **FAST)
        callbacks: list[Any] = [forget, scope(), TokenSmoothing(), NormBall(radius=0.05)]
        options: dict[str, Any]
        if host == "Lightning":
            callbacks.append(ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}"))
            options = {"enable_checkpointing": True}
            options |= {"ckpt_path": str(tmp_path / "step=2.ckpt")} if resume else {}
        else:
            options = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
            options["resume"] = str(tmp_path / "checkpoint-2") if resume else False
        HOSTS[host](model, tokenizer, EDITS, callbacks, 4, **options)
        return state_of(model), forget

    whole, first = train(resume=False)
    assert capsys.readouterr().out.count("ForgetFirst: subtracted") == 1
    resumed, second = train(resume=True)
    assert "ForgetFirst:" not in capsys.readouterr().out
    assert equal_bits(whole, resumed)
    assert len(first.measured) > 1
    assert (second.measured, second.chosen) == (first.measured, first.chosen)


def test_a_coefficient_of_the_base_scale_is_a_length_whatever_the_training_was(loaded) -> None:
    model, tokenizer = loaded
    base = state_of(model)
    results = []
    for epochs, rate in ((2, 1e-3), (10, 2e-3)):
        forget = ForgetFirst(
            TEXTS,
            edits=EDITS,
            coefficients=[0.3],
            max_probability=1e-9,
            max_perplexity_ratio=1e9,
            training=ForgetTraining(epochs=epochs, learning_rate=rate),
        )
        expected = pytest.warns(UserWarning, match="there are no larger coefficients")
        with editing(model, [scope(), forget], tokenizer=tokenizer) as edit, expected:
            edit.before_step()
        moved = float((model.get_parameter(NAME).detach() - base[NAME]).norm() / base[NAME].norm())
        assert moved == pytest.approx(0.3, rel=1e-4)
        assert forget.measured[-1].factor == pytest.approx(0.3 / forget.length)
        model.load_state_dict(base)
        results.append(forget)
    short, long = results
    assert long.length > 4 * short.length
    assert abs(short.measured[-1].probability - long.measured[-1].probability) < 0.2


def test_only_old_answers_that_the_model_gives_take_part(loaded) -> None:
    model, tokenizer = loaded
    kept, unknown_old, learned, wrong = EDITS[0], EDITS[1], EDITS[2], EDITS[3]
    edits = [
        replace(kept, id="kept"),
        replace(unknown_old, old_target=None, id="old answer not in the data"),
        replace(learned, target=str(learned.old_target), id="learned"),
        replace(wrong, old_target="Atlantis", id=""),
    ]
    options: dict[str, Any] = {"batch_size": 4, "prompt_format": "plain"}
    found, left_out = find_old_answers(model, tokenizer, edits, **options)
    assert [(e.id, e.target) for e in found] == [
        ("kept", kept.old_target),
        ("old answer not in the data", unknown_old.old_target),
    ]
    assert left_out == {
        "learned": f"the model already gives the new answer ({learned.old_target!r})",
        "3": f"the model answers {wrong.old_target!r} and not the old answer 'Atlantis'",
    }
    _, left_out = find_old_answers(model, tokenizer, edits[:1], max_new_tokens=1, **options)
    assert left_out == {"kept": "the model gives no answer, or does not end its answer"}
    with pytest.raises(EditError, match="there are no edits"):
        find_old_answers(model, tokenizer, [], **options)
