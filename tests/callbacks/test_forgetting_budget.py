"""ForgettingBudget: the weight follows the formula, the budget holds at the end, and wrong uses are errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kedit_train import EditCollator, EditDataset, world
from kedit_train.callbacks import (
    BatchAnchor,
    ForgettingBudget,
    KLLocality,
    ParameterScope,
    TokenLoss,
    editing,
)
from kedit_train.errors import EditError

TEXTS = ["w1 w2 w3 w4 w5", "w9 w3", "w20 w21 w22 w23", "w7 w7 w7"]


def steps(
    model: Any, words: Any, ids: Tensor, callbacks: Sequence[Any], count: int, *, rate: float = 1e-2, state: Any = None
) -> tuple[list[dict[str, Any]], Any]:
    """Train, and return the logged rows and the state of the run after the last step."""
    with editing(model, [ParameterScope(1), *callbacks], tokenizer=words, log_every_n_steps=1) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=rate)
        if state is not None:
            edit.load_state_dict(state)
        for _ in range(count):
            if edit.should_stop:
                break
            edit.before_step()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        saved = edit.state_dict()
    return edit.history, saved


def weights_by_hand(divergences: Sequence[float], budget: float, start: float, step_size: float) -> list[float]:
    """Return the weight after each step, from the formula on the docs page."""
    multiplier, average, weights = start, None, []
    for divergence in divergences:
        average = divergence if average is None else 0.5 * average + 0.5 * divergence
        ratio = average / (0.9 * budget)
        limited = min(max(ratio, 1 / math.e), math.e)
        multiplier = min(max(multiplier * limited**step_size, 0.01), 1000.0)
        weights.append(min(multiplier * max(1.0, limited) ** 0.5, 1000.0))
    return weights


PENALTIES: dict[str, Any] = {
    "edit/locality/batch_kl": lambda: BatchAnchor(2.0),
    "edit/locality/kl": lambda: KLLocality(TEXTS, weight=2.0, batch_size=4),
}


@pytest.mark.filterwarnings("ignore:ForgettingBudget. the divergence is")
@pytest.mark.parametrize("key", PENALTIES)
def test_the_weight_follows_the_formula(make, words, ids, key):
    torch.manual_seed(0)
    budget = ForgettingBudget(0.02, step_size=0.3)
    history, _ = steps(make(), words, ids, [budget, PENALTIES[key]()], 12, rate=0.2)
    divergences = [row[key] for row in history]
    # The divergence crosses the budget, so both directions are tested.
    assert min(divergences) < 0.01
    assert max(divergences) > 0.03
    expected = weights_by_hand(divergences, 0.02, 2.0, 0.3)
    assert [row["edit/locality/budget_weight"] for row in history] == pytest.approx(expected, rel=1e-4)
    assert budget.weight == history[-1]["edit/locality/budget_weight"]
    average = divergences[0]
    for divergence, row in zip(divergences, history, strict=True):
        average = 0.5 * average + 0.5 * divergence
        assert row["edit/locality/budget_kl"] == pytest.approx(average, rel=1e-4, abs=1e-9)


def test_the_adapted_weight_multiplies_the_penalty(make, words, ids):
    for penalty, measured_on in ((KLLocality(TEXTS, weight=3.0, batch_size=4), "texts"), (BatchAnchor(3.0), "batch")):
        torch.manual_seed(0)
        model = make()
        with editing(model, [ParameterScope(1), penalty], tokenizer=words) as edit:
            edit.before_step()
            with torch.no_grad():
                for parameter in edit.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            (found,) = edit.run.penalties
            assert (found.measured_on, found.weight) == (measured_on, 3.0)
            values = []
            for weight in (0.0, 3.0, 30.0):
                found.weight = weight
                own = penalty.penalty(edit.run).item() if measured_on == "texts" else None
                values.append(model(input_ids=ids, labels=ids).loss.item() if own is None else own)
            assert values[1] > values[0]
            assert values[2] - values[0] == pytest.approx(10 * (values[1] - values[0]), rel=1e-4)


def train_world(
    callbacks: Sequence[Any], *, rate: float = 4e-3, epochs: int = 60, edits: int = 12
) -> tuple[Any, float, list[dict[str, Any]]]:
    """Train edits of the bundled model; return the model, the cross-entropy at the end, and the logged rows."""
    torch.manual_seed(0)
    model, tokenizer = world.load()
    examples = EditDataset(world.edits(edits)).encode(tokenizer, model=model)
    batch = EditCollator(tokenizer)(examples)
    scope = ParameterScope("0.3-1.0", modules="mlp.down_proj")
    used = [scope, TokenLoss("cross_entropy"), *callbacks]
    with editing(model, used, tokenizer=tokenizer, log_every_n_steps=1) as edit:
        optimizer = torch.optim.AdamW(edit.parameters(), lr=rate, weight_decay=0.0)
        for _ in range(epochs):
            edit.before_step()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        return model, float(model(**batch).loss), edit.history


@torch.no_grad()
def divergence(model: Any, texts: Sequence[str] | None = None, edits: int = 12) -> float:
    """Return the mean KL(before || now) per token: on texts, or at the targets of the edits."""
    before, tokenizer = world.load()
    if texts is None:
        batch = dict(EditCollator(tokenizer)(EditDataset(world.edits(edits)).encode(tokenizer, model=before)))
        where = batch.pop("labels")[:, 1:] != -100
    else:
        batch = dict(tokenizer(list(texts), return_tensors="pt", padding=True, return_token_type_ids=False))
        where = batch["attention_mask"][:, 1:].bool()
    p, q = (one(**batch).logits[:, :-1][where].log_softmax(-1) for one in (before, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("start", [0.5, pytest.param(50.0, marks=pytest.mark.slow)])
def test_the_budget_on_the_training_data_holds_and_is_used_up(start):
    plain, _, _ = train_world([])
    assert divergence(plain) > 1.5
    losses = []
    for budget in (0.5, 0.1):
        model, loss, _ = train_world([BatchAnchor(start), ForgettingBudget(budget)])
        # With a larger divergence, the loss would fall further. So a run that leaves much of the budget unused is wrong
        # too.
        assert 0.6 * budget < divergence(model) < 1.1 * budget
        losses.append(loss)
    assert losses[0] < 0.6 * losses[1]


@pytest.mark.slow
def test_the_budget_on_texts_holds(tmp_path):
    texts = world.locality_texts(exclude=world.edits(12), n=64, seed=0)
    plain, _, _ = train_world([])
    budget = divergence(plain, texts) / 5
    found = []
    for kl in (budget, budget / 4):
        model, loss, _ = train_world([KLLocality(texts, weight=0.02, batch_size=16), ForgettingBudget(kl)])
        assert loss < 0.05
        found.append(divergence(model, texts))
        assert found[-1] < 1.1 * kl
    assert found[1] < found[0]
    # Without the budget, the same start value does not keep the divergence low.
    fixed, _, _ = train_world([KLLocality(texts, weight=0.02, batch_size=16)])
    assert divergence(fixed, texts) > 2 * budget


@pytest.mark.filterwarnings("ignore:ForgettingBudget. the divergence is")
@pytest.mark.parametrize("key", PENALTIES)
def test_a_resumed_run_has_the_same_weights_bit_for_bit(make, words, ids, key):
    def run(model: Any, count: int, state: Any = None) -> tuple[Any, Any, float]:
        budget = ForgettingBudget(0.005, step_size=0.3, stop_after=100)
        _, saved = steps(model, words, ids, [budget, PENALTIES[key]()], count, rate=0.2, state=state)
        return {n: p.detach().clone() for n, p in model.named_parameters()}, saved, budget.weight

    torch.manual_seed(0)
    initial = make().state_dict()
    whole, parts = make(), make()
    whole.load_state_dict(initial)
    parts.load_state_dict(initial)
    expected, state, weight = run(whole, 9)
    _, middle, early = run(parts, 5)
    assert early != weight
    resumed, last, weight_again = run(parts, 4, middle)
    assert weight_again == weight
    name = next(one for one in state["callbacks"] if one.startswith("ForgettingBudget"))
    assert last["callbacks"][name] == state["callbacks"][name]
    assert state["callbacks"][name]["steps_above"] > 0
    assert [n for n in expected if not torch.equal(expected[n].view(torch.int32), resumed[n].view(torch.int32))] == []


def test_training_ends_when_the_budget_cannot_be_held(make, words, ids, capsys):
    torch.manual_seed(0)
    budget = ForgettingBudget(1e-4, stop_after=3)
    history, _ = steps(make(), words, ids, [budget, BatchAnchor()], 50, rate=0.2)
    above = [row["edit/locality/budget_kl"] > 1e-4 for row in history]
    # The first step measures a divergence of 0.
    assert above == [False, True, True, True]
    assert "above the budget of 0.0001 in 3 consecutive steps" in budget.reason
    assert capsys.readouterr().out.startswith(f"stopped at step 4: {budget.reason}")


def test_a_divergence_above_the_budget_at_the_end_gives_a_warning(make, words, ids):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="at the end of training, above the budget of 0.0001 .* train for more steps"):
        steps(make(), words, ids, [ForgettingBudget(1e-4), BatchAnchor()], 4, rate=0.2)
    with pytest.warns(UserWarning, match=r"above the budget of 0.0001 \(weight of the penalty: 2\); use a lower learn"):
        steps(make(), words, ids, [ForgettingBudget(1e-4, max_weight=2.0), BatchAnchor()], 4, rate=0.2)


def test_the_weight_of_the_penalty_is_not_compared_with_the_loss(make, words, ids):
    """A fixed weight this large gives a warning, but the user does not choose an adapted weight."""
    torch.manual_seed(0)
    fixed, adapted = ([KLLocality(TEXTS, weight=1e4, batch_size=4)] for _ in range(2))
    model = make()
    with pytest.warns(UserWarning, match=r"KLLocality: the mean penalty .* was larger than the mean training loss"):
        steps(model, words, ids, fixed, 6, rate=0.01)
    torch.manual_seed(0)
    steps(make(), words, ids, [*adapted, ForgettingBudget(1e3, max_weight=1e4)], 6, rate=0.01)


def both(**texts: Any) -> list[Any]:
    return [KLLocality(TEXTS, **texts), BatchAnchor()]


def test_nothing_is_recorded_for_the_comparison_of_penalty_and_loss(make, words, ids):
    """The comparison would keep tensors of each step, and nothing would remove them."""
    locality = KLLocality(TEXTS, weight=2.0, batch_size=4)
    steps(make(), words, ids, [ForgettingBudget(0.02), locality], 3)
    assert locality._balance is None


def test_a_weight_below_the_smallest_weight_changes_by_the_same_factor(make, words, ids):
    budget = ForgettingBudget(10.0, step_size=0.1)
    steps(make(), words, ids, [budget, BatchAnchor(0.001)], 3)
    assert budget.weight == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([ForgettingBudget()], r"no callback .* adds a penalty whose weight can be adapted; add KLLocality\(texts\)"),
        (
            [ForgettingBudget(), *both()],
            r"only one penalty can be adapted, but this run has 2: .*; set measured_on=",
        ),
        (
            [ForgettingBudget(measured_on="texts"), KLLocality(TEXTS), KLLocality(TEXTS, weight=1.0)],
            r"only one penalty can be adapted, but this run has 2: .*; keep only one of the penalties",
        ),
        ([ForgettingBudget(measured_on="batch"), KLLocality(TEXTS)], 'measured_on="batch" needs BatchAnchor'),
        ([ForgettingBudget(measured_on="texts"), BatchAnchor()], 'measured_on="texts" needs KLLocality'),
        (
            [ForgettingBudget(0.1), ForgettingBudget(0.2), BatchAnchor()],
            "another ForgettingBudget already adapts the penalty with measured_on='batch'",
        ),
        ([ForgettingBudget(), BatchAnchor(0.0)], "the weight of BatchAnchor must be > 0, got 0"),
    ],
)
def test_wrong_combinations_are_errors_before_the_first_step(make, words, ids, callbacks, message):
    with pytest.raises(EditError, match=rf"^ForgettingBudget: {message}") as error:
        steps(make(), words, ids, callbacks, 1)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 250


def test_two_budgets_may_adapt_the_two_penalties(make, words, ids):
    torch.manual_seed(0)
    texts, batch = ForgettingBudget(9.0, measured_on="texts"), ForgettingBudget(9.0, measured_on="batch")
    history, _ = steps(make(), words, ids, [texts, batch, *both(weight=5.0)], 2)
    assert (texts.weight, batch.weight) == (pytest.approx(5.0 * math.exp(-0.2)), pytest.approx(math.exp(-0.2)))
    assert {"edit/locality/budget_weight", "edit/locality/budget_weight#2"} <= history[-1].keys()


def test_a_second_run_begins_with_the_weight_of_the_penalty(make, words, ids):
    budget, anchor = ForgettingBudget(9.0), BatchAnchor(4.0)
    for _ in range(2):
        torch.manual_seed(0)
        steps(make(), words, ids, [budget, anchor], 3)
        assert budget.weight == pytest.approx(4.0 * math.exp(-0.3))
    assert anchor.weight == 4.0


@pytest.mark.parametrize(
    "arguments",
    [{"kl": 0.0}, {"kl": True}, {"step_size": 0.0}, {"measured_on": "prose"}, {"max_weight": 0.0}, {"stop_after": 0}],
)
def test_arguments_out_of_range_are_errors(arguments):
    with pytest.raises(EditError, match=f"^ForgettingBudget: {next(iter(arguments))} must be "):
        ForgettingBudget(**arguments)
