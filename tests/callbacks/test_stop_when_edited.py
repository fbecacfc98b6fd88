"""StopWhenEdited: when each rule ends training, alone and together, and what it requires."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from callbacks.stopped_runs import Publisher, stopped_at
from conformance.hosts import HOSTS, collator

from kedit_train import world
from kedit_train.callbacks import (
    EditCallback,
    EditMetrics,
    KLLocality,
    ParameterScope,
    StopWhenEdited,
    TokenLoss,
    TokenSmoothing,
    editing,
)
from kedit_train.data import EditDataset
from kedit_train.errors import EditError
from kedit_train.evaluation.options import EvaluationOptions

SHORT = EvaluationOptions(max_new_tokens=4)
WITH_KL = EvaluationOptions(max_new_tokens=4, metrics=["kl"])
PROBABILITY = "edit/reliability_smallest_token_probability"


def rising(key: str, *values: float) -> list[dict[str, float]]:
    return [{key: value} for value in values]


@pytest.mark.parametrize(
    ("rule", "key", "values", "step"),
    [
        ({"reliability": 0.75}, "edit/reliability", (0.0, 0.5, 0.75, 1.0, 1.0, 1.0), 3),
        ({"reliability": 1.0}, "edit/reliability", (0.0, 0.5, 0.75, 0.99, 0.5, 0.5), None),
        ({"smallest_probability": 0.9}, PROBABILITY, (0.1, 0.5, 0.8, 0.89, 0.95, 1.0), 5),
        ({"kl_budget": 0.1}, "edit/locality/kl", (0.0, 0.1, 0.11, 0.0, 0.0, 0.0), 3),
        ({"kl_budget": 0.1}, "edit/locality_kl", (0.0, 0.05, 0.1, 0.2, 0.0, 0.0), 4),
        ({"idle_steps": 2}, "edit/tokens/active_now", (0, 3, 0, 0, 1, 0), 4),
        ({"loss": 0.2, "loss_steps": 1}, "edit/tokens/loss_now", (1.0, 0.3, 0.2, 0.1, 1.0, 1.0), 4),
        ({"loss": 0.2, "loss_steps": 3}, "edit/tokens/loss_now", (0.1, 0.1, 0.5, 0.1, 0.1, 0.3), 6),
        ({"loss": 0.2, "loss_steps": 7}, "edit/tokens/loss_now", (0.1, 0.1, 0.1, 0.1, 0.1, 0.1), None),
    ],
)
def test_a_rule_ends_training_at_the_step_that_meets_it(
    rule: dict[str, Any],
    key: str,
    values: tuple[float, ...],
    step: int | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop = StopWhenEdited(**{"loss": None, **rule})
    assert stopped_at([Publisher(rising(key, *values)), stop]) == step
    assert (stop.reason is None) == (step is None)
    printed = capsys.readouterr().out
    assert printed == ("" if step is None else f"stopped at step {step}: {stop.reason}\n")


def test_the_first_rule_that_is_met_ends_training_and_all_rules_that_are_met_are_named() -> None:
    scores = [
        {"edit/reliability": 0.5, "edit/locality/kl": 0.0},
        {"edit/reliability": 0.5, "edit/locality/kl": 0.3},
        {"edit/reliability": 1.0, "edit/locality/kl": 0.3},
    ]
    stop = StopWhenEdited(loss=None, reliability=1.0, kl_budget=0.2)
    assert stopped_at([Publisher(scores), stop]) == 2
    assert stop.reason == "KL to the reference model 0.3 is above the budget of 0.2"
    assert stopped_at([Publisher([scores[0], scores[2]]), stop]) == 2
    assert stop.reason == ("reliability 1 is at least 1 and KL to the reference model 0.3 is above the budget of 0.2")


@pytest.mark.parametrize("epsilon", [0.0, 0.05])
def test_the_loss_of_a_step_is_the_mean_over_its_tokens_with_and_without_accumulation(epsilon: float) -> None:
    model, tokenizer = world.load()
    rows = EditDataset.load("world", limit=6).encode(tokenizer)
    collate, expected = collator(tokenizer), []
    recorded: list[float] = []

    class Recorder(EditCallback):
        order = 95

        def after_step(self, run: Any) -> None:
            recorded.append(run.scores["edit/tokens/loss_now"])

    stop = StopWhenEdited(loss=1e-9, loss_steps=1)
    callbacks = [ParameterScope(0.5, modules="mlp.down_proj"), TokenLoss(epsilon=epsilon), stop, Recorder()]
    with editing(model, callbacks, tokenizer=tokenizer) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=0.0)
        for parts in ([rows], [rows[:1], rows[1:]]):
            edit.before_step()
            for part in parts:
                batch = collate(part)
                with torch.no_grad():
                    logits, labels = model(**batch).logits[:, :-1], batch["labels"][:, 1:]
                expected.append(torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")[labels != -100])
                (model(**batch).loss / len(parts)).backward()
            optimizer.step()
            optimizer.zero_grad()
    first, *rest = (torch.clamp(losses, min=epsilon) for losses in expected)
    assert recorded == pytest.approx([first.mean().item(), torch.cat(rest).mean().item()], rel=1e-5)


def test_the_loss_rule_requires_a_token_loss() -> None:
    with pytest.raises(EditError, match="StopWhenEdited: loss needs a callback that computes the loss; add TokenLoss"):
        stopped_at([StopWhenEdited(loss=0.1)])


# Nats a token.
BUDGET = 0.002


def batches(edits: EditDataset, callbacks: list[Any], steps: int, lr: float) -> tuple[Any, int]:
    model, tokenizer = world.load()
    batch = collator(tokenizer)(edits.encode(tokenizer))
    with editing(model, [ParameterScope(layers=0.5, modules="mlp"), *callbacks], log_every_n_steps=1) as edit:
        optimizer = torch.optim.Adam(edit.parameters(), lr=lr)
        for step in range(1, steps + 1):
            edit.before_step()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if edit.should_stop:
                return edit, step
    return edit, steps + 1


def test_training_stops_when_every_target_token_is_probable() -> None:
    edits = EditDataset(world.edits(n=3))
    metrics = EditMetrics(edits, every_n_steps=2, show=False, evaluation=EvaluationOptions(max_new_tokens=8))
    edit, step = batches(edits, [metrics, StopWhenEdited(None, smallest_probability=0.8)], 60, 3e-3)
    smallest = [row[PROBABILITY] for row in edit.history if PROBABILITY in row]
    assert step % 2 == 0
    assert smallest[step // 2 - 1] >= 0.8
    assert all(value < 0.8 for value in smallest[: step // 2 - 1])


@pytest.mark.parametrize("measured_by", ["KLLocality", "EditMetrics"])
def test_training_stops_when_the_kl_budget_is_spent(measured_by: str) -> None:
    edits = EditDataset(world.edits(n=3))
    if measured_by == "KLLocality":
        key, callbacks = (
            "edit/locality/kl",
            [KLLocality(texts=["The old baker found a coin.", "A red fox slept."], weight=1e-6)],
        )
    else:
        key = "edit/locality_kl"
        callbacks = [EditMetrics(edits, every_n_steps=1, show=False, evaluation=WITH_KL)]
    edit, step = batches(edits, [*callbacks, StopWhenEdited(None, kl_budget=BUDGET)], 40, 3e-3)
    assert 1 < step <= 40
    measured = [row[key] for row in edit.history if key in row]
    assert max(measured) > BUDGET
    assert measured[0] <= BUDGET


class MyMetrics(EditMetrics):
    """A user's subclass, which has another name."""


def test_a_subclass_of_edit_metrics_provides_what_the_reliability_rule_requires() -> None:
    edits = EditDataset(world.edits(n=3))
    metrics = MyMetrics(edits, every_n_steps=5, show=False, evaluation=EvaluationOptions(max_new_tokens=8))
    stop = StopWhenEdited(loss=None, reliability=1.0)
    _, step = batches(edits, [metrics, stop], 60, 3e-3)
    assert step < 60
    assert stop.reason == "reliability 1 is at least 1"


@pytest.mark.parametrize("host", ["Trainer", "Lightning"])
def test_trainers_stop_at_the_step_of_the_rule(host: str) -> None:
    edits = EditDataset(world.edits(n=2))
    model, tokenizer = world.load()
    metrics = EditMetrics(edits, every_n_steps=1, show=False, evaluation=SHORT)
    stop = StopWhenEdited(None, smallest_probability=1e-9)
    HOSTS[host](model, tokenizer, edits, [metrics, stop], 5)
    assert metrics.report is not None
    assert metrics.report.meta["steps"] == 1
    assert stop.reason is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StopWhenEdited(None), "at least one rule must be set, but all are None"),
        (
            lambda: StopWhenEdited(smallest_probability=1.0),
            r"must be in \(0, 1\), or None, got 1.0",
        ),
        (lambda: StopWhenEdited(kl_budget=0.0), "kl_budget must be > 0, or None, got 0.0"),
        (lambda: StopWhenEdited(idle_steps=0), 'idle_steps must be an integer >= 1 or "epoch", or None, got 0'),
        (lambda: StopWhenEdited(loss_steps="day"), """loss_steps must be an integer >= 1 or "epoch", got 'day'"""),
        (lambda: StopWhenEdited(loss=0.0), "loss must be > 0, or None, got 0.0"),
    ],
)
def test_invalid_arguments_are_errors(make: Any, message: str) -> None:
    with pytest.raises(EditError, match=message):
        make()


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        (
            StopWhenEdited(None, reliability=1.0),
            "reliability needs the measurements of EditMetrics",
        ),
        (StopWhenEdited(None, smallest_probability=0.5), "smallest_probability needs the measurements of EditM"),
        (
            StopWhenEdited(None, kl_budget=0.5),
            "kl_budget needs a callback that measures the divergence; add KLLocality",
        ),
        (StopWhenEdited(None, idle_steps=3), "idle_steps needs a token loss with epsilon > 0"),
    ],
)
def test_a_rule_without_its_metric_is_an_error_before_the_first_step(stop: StopWhenEdited, message: str) -> None:
    with pytest.raises(EditError, match=message):
        stopped_at([stop])


def test_the_kl_budget_requires_the_kl_metric() -> None:
    edits = EditDataset(world.edits(n=2))
    metrics = EditMetrics(edits, every_n_steps=1, show=False, evaluation=SHORT)
    with pytest.raises(EditError, match="a callback that measures the divergence"):
        batches(edits, [metrics, TokenSmoothing(), StopWhenEdited(None, kl_budget=0.5)], 1, 1e-3)
