"""TRL trainers that train on generated completions: every callback works or is refused before the first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.on_policy import PROMPTS, SCOPE, SOME, TRAINERS, edits, scope, student, teacher, train, trainer
from conformance.settings import SETTINGS, SHORT, TEXTS, one_host_each
from conformance.test_conformance import traces
from conformance.test_other_trainers import Rows, moved
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kedit_train.callbacks import (
    EditMetrics,
    GradientMask,
    KLLocality,
    NormBall,
    NullSpace,
    ParameterScope,
    PolyakStep,
    PrefixCache,
    SecondOrderLocality,
    StopWhenEdited,
    WeightAnchor,
)
from kedit_train.callbacks.hosts.teacher_vocabulary import check_teacher_vocabulary
from kedit_train.errors import EditError

LOSS = "^{name}: the (loss|penalty) .* computes its own loss from completions; use SFTTrainer, or remove"
# Callbacks that replace the loss, or that read the loss of another callback.
REFUSED = {
    "TokenLoss": "TokenLoss",
    "TokenSmoothing": "TokenSmoothing",
    "ContextTeacher": "ContextTeacher",
    "BatchAnchor": "BatchAnchor",
    "ForgettingBudget": "BatchAnchor",
    "SecondOrderLocality": "TokenSmoothing",
    "PolyakStep": "TokenSmoothing",
    "SubjectValues": "TokenSmoothing",
    "ActiveSet": "TokenSmoothing",
    "StopWhenEdited": "TokenSmoothing",
}
WORKING = [name for name in SETTINGS if name not in REFUSED]


@pytest.mark.filterwarnings("ignore:PrefixCache. a batch is computed in full")
@pytest.mark.parametrize(("callback", "kind"), one_host_each(WORKING, TRAINERS))
def test_a_callback_trains_and_leaves_no_trace(callback: str, kind: str) -> None:
    # The trainers themselves leave a hook on the embeddings after each generation.
    expected_traces = traces(train(kind, [], 2).model)
    model, tokenizer = student()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    callbacks = SETTINGS[callback](edits())
    scoped = any(isinstance(one, ParameterScope) for one in callbacks)
    trainer(kind, model, tokenizer, callbacks, 2).train()
    assert traces(model) == expected_traces
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, weights[name])}
    assert changed == {n for n in weights if not scoped or "layers.3.mlp.down_proj" in n}


@pytest.mark.parametrize(("callback", "kind"), one_host_each(REFUSED, TRAINERS))
def test_a_callback_that_needs_the_loss_is_an_error_before_the_first_step(callback: str, kind: str) -> None:
    (model, tokenizer), steps = student(), []
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        with pytest.raises(EditError, match=LOSS.format(name=REFUSED[callback])):
            trainer(kind, model, tokenizer, SETTINGS[callback](edits()), 2).train()
    finally:
        handle.remove()
    assert not steps


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (PolyakStep, r"^PolyakStep: .*TokenLoss"),
        (lambda: SecondOrderLocality(texts=TEXTS), r"^SecondOrderLocality: .*TokenLoss"),
        (lambda: StopWhenEdited(loss=0.1), r"^StopWhenEdited: .*TokenLoss"),
    ],
)
@pytest.mark.parametrize("kind", ["SDFT", "GRPO"])
def test_a_callback_without_the_loss_that_it_reads_is_an_error(kind: str, callback: Any, message: str) -> None:
    with pytest.raises(EditError, match=message) as error:
        train(kind, [scope(), callback()])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", SOME)
def test_scope_mask_ball_and_anchor_are_exact(kind: str) -> None:
    rows = Rows()
    constraints = [scope(), GradientMask("magnitude", density=0.25), NormBall(1e-3), WeightAnchor(strength=10.0)]
    used = train(kind, [*constraints, rows])
    assert set(moved(used.model, rows.before)) == SCOPE
    for name, entries in moved(used.model, rows.before).items():
        start, now = rows.before[name], used.model.get_parameter(name).detach()
        kept = start.abs().flatten().argsort()[: round(0.75 * start.numel())]
        assert torch.equal(start.flatten()[kept].view(torch.int32), now.flatten()[kept].view(torch.int32))
        assert entries > 0.2 * start.numel()
        assert 5e-4 < float((now.double() - start.double()).abs().max()) <= 1e-3
    assert len(rows.rows) == 3
    assert rows.rows[-1]["edit/drift/anchor"] > 0.0
    assert used.state.log_history[0]["edit/scope/mask_density"] == pytest.approx(0.25, abs=1e-4)


@pytest.mark.parametrize("kind", SOME)
def test_the_null_space_holds(kind: str) -> None:
    rows = Rows()
    used = train(kind, [scope(), NullSpace(texts=TEXTS), rows])
    assert set(moved(used.model, rows.before)) == SCOPE
    assert rows.rows[-1]["edit/drift/null_space_leak"] < 1e-5
    # The inputs of the first constrained layer do not change, so its outputs on the texts must not change either.
    tokens = student()[1](TEXTS[0], return_tensors="pt")
    inputs: list[Tensor] = []
    layer = used.model.model.layers[2].mlp.down_proj
    handle = layer.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    with torch.no_grad():
        used.model.eval()(**{name: tokens[name] for name in ("input_ids", "attention_mask")})
    handle.remove()
    change = (layer.weight - rows.before["model.layers.2.mlp.down_proj.weight"]).detach()
    # energy=0.9 leaves at most sqrt(0.1) of the norm of the inputs.
    assert 0.0 < float((inputs[0] @ change.T).norm()) < 0.4 * float(change.norm() * inputs[0].norm())


@pytest.mark.parametrize("kind", SOME)
def test_kl_locality_adds_its_penalty(kind: str) -> None:
    rate, weight = (0.1, 5.0) if kind in ("SDFT", "Distillation") else (0.15, 4.0)

    def run(weight: float) -> list[float]:
        rows = Rows()
        locality = KLLocality(texts=TEXTS, weight=weight, batch_size=len(TEXTS))
        # Plain gradient descent, because the step size of Adam does not depend on the size of the gradient.
        used = train(kind, [scope(), locality, rows], 12, optim="sgd", learning_rate=rate)
        assert set(moved(used.model, rows.before)) == SCOPE
        return [row["edit/locality/kl"] for row in rows.rows]

    free, held = run(0.0), run(weight)
    assert abs(free[0]) < 1e-6
    assert 0.0 < sum(held[-4:]) < 0.7 * sum(free[-4:])


@pytest.mark.parametrize("kind", SOME)
def test_the_metrics_are_logged_and_reported(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    metrics = EditMetrics(edits(), every_n_steps=1, show=False, evaluation=SHORT, report_path=str(path))
    used = train(kind, [scope(), metrics, KLLocality(texts=TEXTS, batch_size=2)], 2)
    rows = [row for row in used.state.log_history if "loss" in row]
    assert len(rows) == 2
    for row in rows:
        assert 0.0 <= row["edit/reliability"] <= 1.0
        assert "edit/locality/kl" in row
        assert "completions/mean_length" in row
    assert metrics.report is not None
    assert len(metrics.report.answers_table()) == PROMPTS
    assert path.exists()


def test_training_ends_when_the_metrics_say_so() -> None:
    # The model gives its old answers from the start.
    metrics = EditMetrics(edits().to_old_targets(), every_n_steps=1, show=False, evaluation=SHORT)
    used = train("SDFT", [scope(), metrics, StopWhenEdited(loss=None, reliability=0.5)], 4)
    assert used.state.global_step == 1


# -- bad input
def other_vocabulary(size: int) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=size, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1)
    )


def test_a_teacher_with_another_vocabulary_is_an_error_in_one_line() -> None:
    model, tokenizer = student()
    # TRL compares the sizes itself, after the callbacks have joined.
    with pytest.raises(ValueError, match="vocab_size 77") as error:
        trainer("Distillation", model, tokenizer, [scope()], 2, teacher_model=other_vocabulary(77))
    assert "\n" not in str(error.value)
    # The model is released: another trainer can edit it.
    trainer("Distillation", model, tokenizer, [scope()], 1).train()


def test_a_teacher_with_another_tokenizer_is_an_error_in_one_line(tmp_path: Path) -> None:
    (model, tokenizer), steps = student(), []
    other = teacher()
    other.save_pretrained(tmp_path)
    # The same number of tokens, but two of them are exchanged.
    saved = tokenizer.save_pretrained(tmp_path)
    path = next(Path(name) for name in saved if name.endswith("tokenizer.json"))
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))
    different = AutoModelForCausalLM.from_pretrained(tmp_path)
    used = trainer("Distillation", model, tokenizer, [scope()], 2, teacher_model=different)
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        with pytest.raises(EditError, match=r"^DistillationTrainer: the teacher .* must have the tokenizer") as error:
            used.train()
    finally:
        handle.remove()
    assert not steps
    assert "\n" not in str(error.value)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_vocabulary_of_any_teacher_is_checked() -> None:
    class Trainer:
        model, args, teacher_model = other_vocabulary(64), None, other_vocabulary(77)

    # Another trainer need not compare token ids.
    check_teacher_vocabulary(Trainer())
    Trainer.__module__ = "trl.experimental.gkd"
    with pytest.raises(EditError, match=r"^Trainer: .* \(64 tokens\), got 77 tokens; use a teacher with the same"):
        check_teacher_vocabulary(Trainer())
    Trainer.teacher_model = Trainer.model
    check_teacher_vocabulary(Trainer())


@pytest.mark.parametrize("kind", ["SDFT", "Distillation"])
def test_the_prefix_cache_says_that_it_cannot_help(kind: str) -> None:
    plain = train(kind, [scope()])
    with pytest.warns(UserWarning, match="PrefixCache: a batch is computed in full, without the cache"):
        used = train(kind, [scope(), PrefixCache()])
    assert all(torch.equal(plain.model.get_parameter(name), used.model.get_parameter(name)) for name in SCOPE)
