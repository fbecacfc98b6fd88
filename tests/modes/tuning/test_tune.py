"""``tune``: its flow with scripted scores, and a small run on the bundled model that is interrupted and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copy, copytree
from typing import Any

import pytest
import torch

from kedit_train import EditDataset, TrainLoop, evaluate, tune, world
from kedit_train.core.fingerprint import fingerprint
from kedit_train.edit import Edit
from kedit_train.errors import EditError
from kedit_train.modes import TuneGrid, TuneResult
from kedit_train.modes.train_loop import ExampleOptions
from kedit_train.modes.tuning.halving import RULE
from kedit_train.modes.tuning.runs import TuneRuns
from kedit_train.modes.tuning.settings import BATCH_SIZE, RECOMMENDED, STOP_LOSS, TuneSetting

EDITS = EditDataset.load("world", limit=10)
TEXTS = world.locality_texts(exclude=EDITS, n=24)
Tune = Callable[..., TuneResult]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any, str]:
    model, tokenizer = world.load()
    return model, tokenizer, fingerprint(model)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reports of the unedited model, which all tests share."""
    return tmp_path_factory.mktemp("reports")


@pytest.fixture
def scripted(loaded: tuple[Any, Any, str], reports: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tune:
    """``tune`` whose runs change the model and return the scores of a function of (setting, number of edits)."""

    def run(scores: Callable[[TuneSetting, int], Any], edits: Any = EDITS, **arguments: Any) -> TuneResult:
        def fake(runs: TuneRuns, setting: TuneSetting, part: EditDataset, factors: Path) -> dict[str, Any]:
            with torch.no_grad():
                next(runs.model.parameters()).add_(1.0)
            return dict(zip(("reliability", "generality", "locality"), scores(setting, len(part)), strict=True))

        monkeypatch.setattr(TuneRuns, "_train_and_evaluate", fake)
        monkeypatch.setattr(TuneRuns, "_factors", lambda *_: tmp_path)
        arguments = {"keep": TEXTS, "progress": False, **arguments}
        copytree(reports, tmp_path / "work", dirs_exist_ok=True)
        try:
            return tune(loaded[0], loaded[1], edits, folder=tmp_path / "work", **arguments)
        finally:
            assert fingerprint(loaded[0]) == loaded[2]
            for report in (tmp_path / "work").glob("unedited-*.json"):
                copy(report, reports)

    return run


GRID = TuneGrid(layers=[0.5, 0.7], step_sizes=[0.01, 0.02], energies=[0.9], kl_weights=[0])


def test_every_setting_runs_on_few_edits_and_the_best_on_all(scripted: Tune) -> None:
    best = GRID.settings()[2]
    calls: list[tuple[TuneSetting, int]] = []

    def scores(setting: TuneSetting, n: int) -> tuple[float, float, float]:
        calls.append((setting, n))
        return 1.0, 0.9 if setting == best else 0.5, 0.8

    result = scripted(scores, grid=GRID)
    # The tuning half has 5 edits. The last call is on the held-out half.
    assert calls == [*((setting, 4) for setting in GRID.settings()), (best, 5), (best, 5)]
    assert (result.picked.setting, result.rule, result.held_out.edits) == (best, RULE, 5)
    assert not {e.prompt for e in result.halves[0]} & {e.prompt for e in result.halves[1]}
    assert result.cut_off == []
    assert [row[-1] for row in result.rows()] == ["", "", "front", "", "picked", "held out"]
    # Everything is known now.
    again = scripted(lambda *_: pytest.fail("a finished run was repeated"), grid=GRID)
    assert (again.trials, again.held_out) == (result.trials, result.held_out)
    assert json.loads(json.dumps(again.to_dict()))["picked"] == best.to_dict()
    assert "picked" in again.markdown()
    page = again.html()
    # Four points on four edits, one on all of the tuning half, and the held-out run.
    assert page.count('r="4"') == 6
    assert page.count('r="8"') == 1
    # Locality 0.8 and generality 0.9, in a frame of 316 x 178 whose corner is at (34, 8).
    assert page.count(f'cx="{34 + 316 * 0.8:.1f}" cy="{8 + 178 * 0.1:.1f}" r="4"') == 3
    assert f'<td class="number" data-label="layers">{best.layers}</td>' in page
    assert again._repr_html_() in page
    assert repr(again) == (
        f"TuneResult(5 trials, picked: {best}, held out: reliability 1.000, generality 0.900, locality 0.800)"
    )
    # With another seed, nothing is known.
    scripted(scores, grid=GRID, seed=1)
    assert len(calls) == 12


def test_a_spent_budget_cuts_off_all_but_the_first_run_and_the_held_out_edits(scripted: Tune) -> None:
    calls: list[int] = []

    def scores(_: TuneSetting, n: int) -> tuple[float, float, float]:
        calls.append(n)
        return 0.5, 0.5, 0.5

    result = scripted(scores, grid=GRID, budget=1e-9)
    assert calls == [4, 5]
    first, *others = GRID.settings()
    assert result.cut_off == [*((4, setting) for setting in others), (5, first)]
    assert (result.picked.edits, result.held_out.edits) == (4, 5)
    assert "no setting has a reliability of at least 0.95" in result.rule
    notes = "\n".join(result.notes())
    share = "the time of their round (an equal share of the budget of 1e-09 s) was spent"
    assert f"4 runs were not started, because {share}:\n  4 edits: layers 0.5, step 0.01" in notes


def test_every_round_has_an_equal_share_of_the_budget(scripted: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    now = 0.0

    def scores(_: TuneSetting, n: int) -> tuple[float, float, float]:
        nonlocal now
        now += 4.0
        calls.append(n)
        return 1.0, 0.5, 0.5

    monkeypatch.setattr("kedit_train.modes.tuning.tuner.time.perf_counter", lambda: now)
    result = scripted(scores, grid=GRID, budget=30.0)
    # The first round ends at 10 s, the second at 20 s. A run takes 4 s.
    assert calls == [4, 4, 4, 5, 5]
    assert [edits for edits, _ in result.cut_off] == [4]


def test_the_recommended_settings_stay_in_every_round(scripted: Tune) -> None:
    calls: list[tuple[TuneSetting, int]] = []

    def scores(setting: TuneSetting, n: int) -> tuple[float, float, float]:
        calls.append((setting, n))
        # These settings are the worst on few edits, and the best on the tuning half.
        return (1.0, 0.5, 0.5) if (setting == RECOMMENDED) == (n > 4) else (1.0, 0.1, 0.1)

    grid = TuneGrid(layers=["0.5-0.8", 0.7], step_sizes=[0.03, 0.05], kl_weights=[0.0])
    result = scripted(scores, grid=grid)
    assert [n for setting, n in calls if setting == RECOMMENDED] == [4, 5, 5]
    assert len(calls) == 4 + 2 + 1
    assert result.picked.setting == RECOMMENDED


def test_a_setting_that_fails_is_listed_and_measured_again_next_time(scripted: Tune) -> None:
    def scores(setting: TuneSetting, n: int) -> tuple[float, float, float]:
        if setting.layers == 0.5:
            raise EditError("the loss is nan")
        return 0.5, 0.5, 0.5

    result = scripted(scores, grid=GRID)
    assert [trial.error for trial in result.trials] == ["the loss is nan"] * 2 + [""] * 3
    assert result.picked.setting.layers == 0.7
    assert [row[-1] for row in result.rows()][:2] == ["failed: the loss is nan"] * 2
    calls = []
    scripted(lambda *call: calls.append(call) or (1.0, 1.0, 1.0), grid=GRID)
    assert {setting.layers for setting, _ in calls} == {0.5}


def test_if_all_settings_fail_the_first_message_is_raised(scripted: Tune) -> None:
    def scores(*_: Any) -> Any:
        raise EditError("the loss is nan")

    with pytest.raises(EditError, match=r"^tune: all runs failed.* first failed run is: the loss is nan"):
        scripted(scores, grid=GRID)


BARE = [Edit(f"{name} lives in", "Bern", subject=name) for name in ("Ada", "Ben")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"edits": BARE}, "edits must have rephrases or locality probes, got neither"),
        ({"edits": BARE[:1]}, "at least two subjects"),
        ({"budget": 0}, "budget must be > 0, or None, got 0"),
        ({"grid": TuneGrid(modules="mlp.nothing")}, "modules='mlp.nothing' matches no parameter"),
        ({"keep": []}, "contains no text"),
    ],
)
def test_wrong_arguments_are_refused_before_the_first_run(scripted: Tune, arguments: Any, message: str) -> None:
    with pytest.raises(EditError, match=f"tune: .*{message}"):
        scripted(lambda *_: pytest.fail("a run was started"), **{"grid": GRID, **arguments})


def test_an_interrupted_run_is_resumed_and_the_scores_are_those_of_a_run_by_hand(
    loaded: tuple[Any, Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, weights = loaded
    grid = TuneGrid(layers=["0.5-0.7", 0.7], step_sizes=[0.1], energies=[0.9], kl_weights=[1])
    few = EditDataset([replace(e, rephrases=e.rephrases[:1], portability={}) for e in EDITS[:6]])
    arguments: dict[str, Any] = {"keep": TEXTS, "grid": grid, "folder": tmp_path, "progress": False}
    run, calls = TuneRuns._train_and_evaluate, []

    def interrupted(*given: Any) -> Any:
        calls.append(given[1])
        scores = run(*given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return scores

    monkeypatch.setattr(TuneRuns, "_train_and_evaluate", interrupted)
    monkeypatch.setattr("kedit_train.modes.tuning.runs.EPOCHS", 10)
    with pytest.raises(KeyboardInterrupt):
        tune(model, tokenizer, few, **arguments)
    assert fingerprint(model) == weights
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 1
    # The scopes share one file of factors, and no text is read again.
    monkeypatch.setattr("kedit_train.core.drift.factors_of_texts.kfac_factors", None)
    result = tune(model, tokenizer, few, **arguments)
    assert fingerprint(model) == weights
    # The first run was known. The interrupted one and the held-out run follow.
    assert len(calls) == 2 + 1 + 1
    assert (tmp_path / "results.jsonl").read_text().splitlines()[:1] == lines
    assert result.trials[0].seconds == json.loads(lines[0])["seconds"]
    assert result.meta["append_eos"] is True

    part = result.halves[0]
    before = evaluate(model, tokenizer, part, progress=False)
    factors = next(tmp_path.glob("factors-*.safetensors"))
    callbacks = result.picked.setting.build_callbacks(TEXTS, factors, None)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    options: dict[str, Any] = {"epochs": 10, "batch_size": BATCH_SIZE, "stop_loss": STOP_LOSS}
    torch.manual_seed(0)
    TrainLoop(tokenizer, callbacks=callbacks, examples=ExampleOptions(append_eos=True), **options)(model, part)
    after = evaluate(model, tokenizer, part, unedited=before, progress=False).metrics
    model.load_state_dict(start)
    expected = (after["reliability"]["generated"], after["generality"]["generated"], after["locality"]["tokens_kept"])
    picked = result.picked
    assert (picked.reliability, picked.generality, picked.locality) == tuple(score.value for score in expected)
