"""Each rule that ends a run, alone and beside another, and what it needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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
from kedit_train.modes import TrainLoop

PROBABILITY = "edit/reliability_smallest_token_probability"


class Publisher(EditCallback):
    """Publishes prepared scores, one dict per step, in place of the callbacks that measure them."""

    # Where EditMetrics would measure.
    order = 60

    def __init__(self, scores: list[dict[str, float]]) -> None:
        self.scores = scores

    def provides(self) -> set[str]:
        return {"token_clip"}.union(*self.scores)

    def after_step(self, run: Any) -> None:
        run.publish(self.scores[run.step - 1])


def stopped_at(callbacks: list[Any], steps: int = 6) -> int | None:
    """The step after which a loop that asks ``should_stop`` ends; None where it never has to."""
    model = torch.nn.Linear(2, 2)
    with editing(model, callbacks) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=0.1)
        for step in range(1, steps + 1):
            edit.before_step()
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if edit.should_stop:
                return step
    return None


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
def test_a_rule_ends_the_run_at_the_step_that_meets_it(
    rule: dict[str, Any],
    key: str,
    values: tuple[float, ...],
    step: int | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop = StopWhenEdited(**{"reliability": None, **rule})
    assert stopped_at([Publisher(rising(key, *values)), stop]) == step
    assert (stop.reason is None) == (step is None)
    said = capsys.readouterr().out
    assert said == ("" if step is None else f"stopped at step {step}: {stop.reason}\n")


def test_of_two_rules_the_first_that_is_met_ends_the_run_and_both_are_named_where_both_are() -> None:
    scores = [
        {"edit/reliability": 0.5, "edit/locality/kl": 0.0},
        {"edit/reliability": 0.5, "edit/locality/kl": 0.3},
        {"edit/reliability": 1.0, "edit/locality/kl": 0.3},
    ]
    stop = StopWhenEdited(kl_budget=0.2)
    assert stopped_at([Publisher(scores), stop]) == 2
    assert stop.reason == "KL to the unedited model 0.3 is above the budget of 0.2"
    assert stopped_at([Publisher([scores[0], scores[2]]), stop]) == 2
    assert stop.reason == ("reliability 1 is at least 1 and KL to the unedited model 0.3 is above the budget of 0.2")


@pytest.mark.parametrize("epsilon", [0.0, 0.05])
def test_the_loss_of_a_step_is_the_mean_over_its_tokens_whatever_the_accumulation(epsilon: float) -> None:
    model, tokenizer = world.load()
    rows = EditDataset.load("world", limit=6).encode(tokenizer)
    collate, wanted = collator(tokenizer), []
    heard: list[float] = []

    class Hears(EditCallback):
        order = 95

        def after_step(self, run: Any) -> None:
            heard.append(run.scores["edit/tokens/loss_now"])

    stop = StopWhenEdited(reliability=None, loss=1e-9, loss_steps=1)
    callbacks = [ParameterScope(0.5, modules="mlp.down_proj"), TokenLoss(epsilon=epsilon), stop, Hears()]
    with editing(model, callbacks, tokenizer=tokenizer) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=0.0)
        for parts in ([rows], [rows[:1], rows[1:]]):
            edit.before_step()
            for part in parts:
                batch = collate(part)
                with torch.no_grad():
                    logits, labels = model(**batch).logits[:, :-1], batch["labels"][:, 1:]
                wanted.append(torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")[labels != -100])
                (model(**batch).loss / len(parts)).backward()
            optimizer.step()
            optimizer.zero_grad()
    first, *rest = (torch.clamp(losses, min=epsilon) for losses in wanted)
    assert heard == pytest.approx([first.mean().item(), torch.cat(rest).mean().item()], rel=1e-5)


def test_the_loss_of_nobody_is_refused() -> None:
    with pytest.raises(EditError, match="StopWhenEdited: loss reads the training loss of TokenSmoothing; add"):
        stopped_at([StopWhenEdited(reliability=None, loss=0.1)])


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


def test_a_real_run_stops_when_every_token_of_every_target_is_likely() -> None:
    edits = EditDataset(world.edits(n=3))
    metrics = EditMetrics(edits, every_n_steps=2, show=False, max_new_tokens=8)
    edit, step = batches(edits, [metrics, StopWhenEdited(None, smallest_probability=0.8)], 60, 3e-3)
    least = [row[PROBABILITY] for row in edit.history if PROBABILITY in row]
    assert step % 2 == 0
    assert least[step // 2 - 1] >= 0.8
    assert all(value < 0.8 for value in least[: step // 2 - 1])


@pytest.mark.parametrize("measured_by", ["KLLocality", "EditMetrics"])
def test_a_real_run_stops_when_its_budget_of_divergence_is_spent(measured_by: str) -> None:
    edits = EditDataset(world.edits(n=3))
    if measured_by == "KLLocality":
        key, callbacks = (
            "edit/locality/kl",
            [KLLocality(texts=["The old baker found a coin.", "A red fox slept."], weight=1e-6)],
        )
    else:
        key = "edit/locality_kl"
        callbacks = [EditMetrics(edits, every_n_steps=1, show=False, max_new_tokens=4, metrics=["kl"])]
    edit, step = batches(edits, [*callbacks, StopWhenEdited(None, kl_budget=BUDGET)], 40, 3e-3)
    assert 1 < step <= 40
    found = [row[key] for row in edit.history if key in row]
    assert max(found) > BUDGET
    assert found[0] <= BUDGET


class MyMetrics(EditMetrics):
    """A user's subclass, which has another name."""


def test_a_subclass_of_edit_metrics_provides_what_the_reliability_rule_requires() -> None:
    edits = EditDataset(world.edits(n=3))
    metrics = MyMetrics(edits, every_n_steps=5, show=False, max_new_tokens=8)
    stop = StopWhenEdited(reliability=1.0)
    _, step = batches(edits, [metrics, stop], 60, 3e-3)
    assert step < 60
    assert stop.reason == "reliability 1 is at least 1"


@pytest.mark.parametrize("host", ["Trainer", "Lightning"])
def test_trainers_stop_there(host: str) -> None:
    edits = EditDataset(world.edits(n=2))
    model, tokenizer = world.load()
    metrics = EditMetrics(edits, every_n_steps=1, show=False, max_new_tokens=4)
    stop = StopWhenEdited(None, smallest_probability=1e-9)
    HOSTS[host](model, tokenizer, edits, [metrics, stop], 5)
    assert metrics.report is not None
    assert metrics.report.meta["steps"] == 1
    assert stop.reason is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StopWhenEdited(None), "every rule is None"),
        (lambda: StopWhenEdited(smallest_probability=1.0), r"smallest_probability=1.0 is none in \(0, 1\)"),
        (lambda: StopWhenEdited(kl_budget=0.0), "kl_budget=0.0 is no divergence"),
        (lambda: StopWhenEdited(idle_steps=0), "idle_steps=0 is no number of steps"),
        (lambda: StopWhenEdited(loss=0.1, loss_steps="day"), "loss_steps='day' is no number of steps"),
        (lambda: StopWhenEdited(loss=0.0), "loss=0.0 is none to end at"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(make: Any, message: str) -> None:
    with pytest.raises(EditError, match=message):
        make()


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        (StopWhenEdited(), "reliability reads what EditMetrics measures during training; add EditMetrics"),
        (StopWhenEdited(None, smallest_probability=0.5), "smallest_probability reads what EditMetrics measures"),
        (
            StopWhenEdited(None, kl_budget=0.5),
            "kl_budget needs a callback that measures the divergence; add KLLocality",
        ),
        (StopWhenEdited(None, idle_steps=3), "idle_steps counts active tokens; add TokenSmoothing"),
    ],
)
def test_a_rule_without_what_it_reads_is_refused_before_the_first_step(stop: StopWhenEdited, message: str) -> None:
    with pytest.raises(EditError, match=message):
        stopped_at([stop])


def test_a_budget_needs_metrics_that_measure_it() -> None:
    edits = EditDataset(world.edits(n=2))
    metrics = EditMetrics(edits, every_n_steps=1, show=False, max_new_tokens=4)
    with pytest.raises(EditError, match="a callback that measures the divergence"):
        batches(edits, [metrics, TokenSmoothing(), StopWhenEdited(None, kl_budget=0.5)], 1, 1e-3)


class EpochPublisher(Publisher):
    """Ten steps with nothing to learn but in the second."""

    def __init__(self) -> None:
        quiet, loud = ({"edit/tokens/active_now": n, "edit/tokens/loss_now": n / 10} for n in (0, 3))
        super().__init__([quiet, loud, *[quiet] * 8])


@pytest.mark.parametrize(("window", "step"), [(1, 5), (2, 4)])
@pytest.mark.parametrize("host", ["Trainer", "SFTTrainer", "Lightning"])
def test_an_epoch_is_what_the_trainer_makes_of_it(host: str, window: int, step: int) -> None:
    """Nine edits in batches of 4 are 3 steps, and 2 where two batches make one."""
    model, tokenizer = world.load()
    stop = StopWhenEdited(None, idle_steps="epoch")
    name = "accumulate_grad_batches" if host == "Lightning" else "gradient_accumulation_steps"
    callbacks = [EpochPublisher(), stop]
    HOSTS[host](model, tokenizer, EditDataset(world.edits(n=9)), callbacks, 10, **{name: window})
    assert stop.run is not None
    assert (stop.run.host.epoch_steps, stop.run.step) == (4 - window, step)
    assert stop.reason == f"no active token in {4 - window} steps"


def test_the_loss_of_an_epoch_is_its_mean() -> None:
    model, tokenizer = world.load()
    stop = StopWhenEdited(None, loss=0.05)
    HOSTS["Trainer"](model, tokenizer, EditDataset(world.edits(n=9)), [EpochPublisher(), stop], 10)
    assert stop.run is not None
    assert stop.run.step == 5  # (0 + 0.3 + 0) / 3 is above


def test_a_loop_says_how_long_its_epochs_are() -> None:
    model, tokenizer = world.load()
    edits = world.edits(n=3)
    with pytest.raises(EditError, match=r"idle_steps='epoch'.*plain loop does not say .*editing\(epoch_steps=...\)"):
        stopped_at([EpochPublisher(), StopWhenEdited(None, idle_steps="epoch")])
    with editing(model, [stop := StopWhenEdited(None, idle_steps="epoch"), EpochPublisher()], epoch_steps=4) as edit:
        edit.before_step()
        assert stop._enough_idle == 4
        model.zero_grad()
    stop = StopWhenEdited(None, idle_steps="epoch")
    TrainLoop(tokenizer, [EpochPublisher(), stop], batch_size=2, epochs=5, stop_loss=0.0)(model, edits)
    assert stop.reason == "no active token in 2 steps"
