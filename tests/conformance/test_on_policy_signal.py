"""TRL trainers that train on generated completions: what each trainer learns from, and what it generates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.on_policy import SCOPE, SOME, edits, reward, scope, student, teacher, train
from conformance.settings import SHORT, TEXTS
from conformance.test_other_trainers import Rows
from torch import Tensor
from torch.nn import functional as F

from kedit_train.callbacks import EditCallback, EditMetrics, KLLocality, NormBall
from kedit_train.data.fact_in_context import prompt_with_fact


def first_distribution(model: Any, prompts: list[str]) -> Tensor:
    """Return the log probabilities of the token after each prompt, [prompts, vocabulary]."""
    tokenizer = student()[1]
    model.eval()
    with torch.no_grad():
        ids = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
        return torch.stack([model(one).logits[0, -1].log_softmax(-1) for one in ids])


def divergence(taught: Tensor, given: Tensor) -> float:
    return float(F.kl_div(given, taught, reduction="batchmean", log_target=True))


def test_sdft_moves_the_student_to_the_model_that_reads_the_fact() -> None:
    prompts = [edit.prompt for edit in edits()]
    taught = first_distribution(student()[0], [prompt_with_fact(edit, edit.prompt) for edit in edits()])
    before = divergence(taught, first_distribution(student()[0], prompts))
    used = train("SDFT", [scope(), NormBall(0.05)], 30, learning_rate=3e-3)
    assert divergence(taught, first_distribution(used.model, prompts)) < 0.5 * before


@pytest.mark.slow
def test_distillation_moves_the_student_to_its_teacher() -> None:
    prompts = [edit.prompt for edit in edits()]
    taught = first_distribution(teacher(), prompts)
    before = divergence(taught, first_distribution(student()[0], prompts))
    used = train("Distillation", [scope(), NormBall(0.05)], 30, learning_rate=3e-3)
    assert divergence(taught, first_distribution(used.model, prompts)) < 0.5 * before


@pytest.mark.parametrize("kind", ["GRPO", pytest.param("RLOO", marks=pytest.mark.slow)])
def test_the_opposite_reward_gives_the_opposite_step(kind: str) -> None:
    def change(sign: float) -> Tensor:
        rows = Rows()

        def signed(**columns: Any) -> list[float]:
            return [sign * value for value in reward(**columns)]

        used = train(kind, [scope(), rows], 1, reward_funcs=signed, optim="sgd", learning_rate=0.1, max_grad_norm=0.0)
        return torch.cat([(used.model.get_parameter(n).detach() - rows.before[n]).flatten() for n in sorted(SCOPE)])

    up, down = change(1.0), change(-1.0)
    assert up.abs().max() > 1e-5
    torch.testing.assert_close(up, -down, rtol=1e-2, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_the_reward_rises(kind: str) -> None:
    rewards: list[float] = []

    def recorded(**columns: Any) -> list[float]:
        values = reward(**columns)
        rewards.append(sum(values) / len(values))
        return values

    options = {"learning_rate": 1e-2, "num_generations": 8, "per_device_train_batch_size": 64}
    train(kind, [scope(), NormBall(0.1)], 25, reward_funcs=recorded, **options)
    assert sum(rewards[-5:]) > 1.15 * sum(rewards[:5])


class Generation(EditCallback):
    """Counts the forward passes without gradients, such as those of the generation."""

    def attach(self, run: Any) -> None:
        self.passes = 0

        def count(module: Any, args: Any, output: Any) -> None:
            self.passes += not torch.is_grad_enabled()

        self.handle = run.root.register_forward_hook(count)

    def detach(self, run: Any) -> None:
        self.handle.remove()


@pytest.mark.parametrize("kind", SOME)
def test_callbacks_do_not_change_what_is_generated(kind: str) -> None:
    def weights(*more: Any) -> dict[str, Tensor]:
        # A penalty and constraints without effect: all completions and all steps must be the same.
        used = train(kind, [scope(), *more], 3)
        return {name: used.model.get_parameter(name).detach() for name in SCOPE}

    generation = Generation()
    metrics = EditMetrics(edits(), every_n_steps=1, show=False, evaluation=SHORT)
    plain, used = weights(), weights(KLLocality(texts=TEXTS, weight=0.0), NormBall(100.0), metrics, generation)
    assert all(torch.equal(plain[name], used[name]) for name in SCOPE)
    assert generation.passes > 0
