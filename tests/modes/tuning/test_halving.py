"""The split, the rungs, the ranking and the front, each by its properties on random input."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from kedit_train.edit import Edit
from kedit_train.errors import EditError
from kedit_train.modes.tuning.halving import (
    RULE,
    Trial,
    covering,
    front,
    pick,
    plan_rungs,
    rank,
    split_edits,
)
from kedit_train.modes.tuning.settings import EPOCHS, RECOMMENDED, STOP_LOSS, TuneGrid, TuneSetting

RECIPE = Path(__file__).resolve().parents[3] / "recipes" / "kedit_default.yaml"


def setting(step: float = 0.01) -> TuneSetting:
    return TuneSetting(layers=0.7, modules="mlp", step_size=step, energy=0.9, kl_weight=0.0)


def trial(reliability: float | None, generality: Any = None, locality: Any = None, **rest: Any) -> Trial:
    scores = {"reliability": reliability, "generality": generality, "locality": locality}
    return Trial(setting=rest.pop("setting", setting()), **{"edits": 8, **scores, **rest})


def some_trials(seed: int, n: int = 12) -> list[Trial]:
    draw = random.Random(seed)
    levels = [0.0, 0.25, 0.5, 0.9, 0.95, 1.0]
    return [
        trial(*(draw.choice(levels) for _ in range(3)), setting=setting(i / 100), edits=draw.choice([4, 8]))
        for i in range(1, n + 1)
    ]


@pytest.mark.parametrize("seed", range(30))
def test_subjects_stay_on_one_side_and_the_halves_are_balanced(seed: int) -> None:
    draw = random.Random(seed)
    subjects = [draw.choice(["Ada", "ada ", "Ben", "Cem", "Dia", None, None]) for _ in range(draw.randint(5, 40))]
    edits = [Edit(f"{subject} {i} lives in", "Bern", subject=subject) for i, subject in enumerate(subjects)]
    halves = split_edits(edits, seed)
    assert sorted(halves[0] + halves[1]) == list(range(len(edits)))
    assert halves == split_edits(edits, seed)
    named = [{(subjects[i] or "").strip().lower() for i in half} - {""} for half in halves]
    assert not named[0] & named[1]
    folded = [(s or f"{i}").strip().lower() for i, s in enumerate(subjects)]
    assert abs(len(halves[0]) - len(halves[1])) <= max(map(folded.count, folded))


def test_another_seed_gives_another_split_and_one_subject_is_refused() -> None:
    edits = [Edit(f"{i} lives in", "Bern", subject=str(i)) for i in range(30)]
    assert split_edits(edits, 0) != split_edits(edits, 1)
    with pytest.raises(EditError, match=r"at least two subjects, .* got 2 edits about 1 subject"):
        split_edits([Edit("Ada lives in", "Bern", subject="Ada"), Edit("Ada works in", "Bonn", subject="ADA")])


@pytest.mark.parametrize("n_edits", [1, 3, 4, 8, 9, 25, 100, 1000])
@pytest.mark.parametrize("n_settings", [1, 2, 3, 4, 16, 24, 100])
def test_rungs_measure_all_settings_first_and_end_with_all_edits(n_settings: int, n_edits: int) -> None:
    rungs = plan_rungs(n_settings, n_edits)
    assert 1 <= len(rungs) <= 3
    assert rungs[0].settings == n_settings
    assert rungs[-1].edits == n_edits
    for one, other in pairwise(rungs):
        assert one.settings > other.settings >= 1
        assert 4 <= one.edits < other.edits
        # No rung costs more than about twice the first one, in settings times edits.
        if n_edits >= 36:
            assert other.settings * other.edits <= 3 * one.settings * one.edits


@pytest.mark.parametrize("seed", range(30))
def test_the_ranking_follows_the_rule(seed: int) -> None:
    trials = some_trials(seed)
    ranked = rank(trials)
    assert sorted(map(id, ranked)) == sorted(map(id, trials))
    for better, worse in pairwise(ranked):
        assert better.reliable >= worse.reliable
        if better.reliable and worse.reliable:
            assert better.score >= worse.score
        elif not better.reliable:
            assert (better.reliability, better.score) >= (worse.reliability, worse.score)
    best, rule = pick(trials)
    assert best is ranked[0]
    assert (rule == RULE) == any(t.reliability >= 0.95 for t in trials)


@pytest.mark.parametrize(("other", "kept"), [(0.50, True), (0.54, True), (0.56, False)])
def test_the_recommended_settings_are_replaced_only_by_a_clearly_better_score(other: float, kept: bool) -> None:
    own = Trial(setting=RECOMMENDED, edits=8, reliability=1.0, generality=0.5, locality=0.5)
    rival = Trial(setting=setting(), edits=8, reliability=1.0, generality=other, locality=other)
    best, rule = pick([rival, own])
    assert best is (own if kept else rival)
    assert (rule == RULE) == (best is rival)


def test_an_unreliable_recommendation_is_not_kept() -> None:
    own = Trial(setting=RECOMMENDED, edits=8, reliability=0.9, generality=0.5, locality=0.5)
    rival = Trial(setting=setting(), edits=8, reliability=1.0, generality=0.1, locality=0.1)
    assert pick([own, rival])[0] is rival


def test_settings_without_generality_are_ranked_by_locality() -> None:
    low, high = trial(1, 0.0, 0.4), trial(1, 0.0, 0.6)
    assert rank([low, high]) == [high, low]
    assert rank([high, trial(1, 0.1, 0.1)])[1] is high


def test_the_score_is_the_harmonic_mean_of_what_was_measured() -> None:
    assert trial(1, 0.5, 1.0).score == pytest.approx(2 / 3)
    assert trial(1, 0.0, 1.0).score == 0.0
    assert trial(1, None, 0.4).score == pytest.approx(0.4)
    assert trial(1, 0.4).score == pytest.approx(0.4)
    assert trial(1).score == 0.0


def test_equal_trials_keep_their_order_and_failed_ones_are_last() -> None:
    first, second = trial(1.0, 0.5, 0.5), trial(1.0, 0.5, 0.5)
    failed, useless = trial(None, error="the loss is nan"), trial(0.0, 0.0, 0.0)
    ranked = rank([failed, first, useless, second])
    assert [id(t) for t in ranked] == [id(t) for t in (first, second, useless, failed)]


@pytest.mark.parametrize("seed", range(30))
def test_the_front_is_what_nothing_beats(seed: int) -> None:
    trials = [*some_trials(seed), trial(None, error="failed")]
    found = front(trials)

    def scores(one: Trial) -> tuple[float, ...]:
        return (one.reliability, one.generality, one.locality)  # type: ignore[return-value]

    for one in trials[:-1]:
        others = [scores(o) for o in trials[:-1] if o.edits == one.edits and scores(o) != scores(one)]
        beaten = any(all(a >= b for a, b in zip(other, scores(one), strict=True)) for other in others)
        assert any(one is t for t in found) == (not beaten)
    assert not any(t.error for t in found)


def test_a_covering_scope_contains_its_scopes() -> None:
    scopes = {"one": frozenset("a"), "some": frozenset("ab"), "most": frozenset("abc"), "other": frozenset("cd")}
    assert covering(scopes) == {"one": "most", "some": "most", "most": "most", "other": "other"}


def test_the_grid_has_every_combination_once_and_cheap_ones_first() -> None:
    grid = TuneGrid(layers=[0.7, "4-6"], step_sizes=[0.01, 0.02, 0.01], energies=[0.9], kl_weights=[20, 0])
    settings = grid.settings()
    assert len(settings) == len(set(settings)) == 8
    assert [s.kl_weight for s in settings] == [0.0] * 4 + [20.0] * 4
    assert [(s.layers, s.step_size) for s in settings[:4]] == [(0.7, 0.02), (0.7, 0.01), ("4-6", 0.02), ("4-6", 0.01)]
    names = [[name for name, _ in s.callback_arguments("texts")] for s in (settings[0], settings[-1])]
    assert names[1] == [*names[0], "KLLocality"]


def test_the_recommended_settings_are_those_of_kedit_default_and_come_first() -> None:
    assert TuneGrid().settings()[0] == RECOMMENDED
    config = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    arguments = {
        each["class_path"].rsplit(".", 1)[1]: each.get("init_args", {}) for each in config["trainer"]["callbacks"]
    }
    for name, ours in RECOMMENDED.callback_arguments("world"):
        assert {key: arguments[name][key] for key in ours} == ours, name
    assert arguments["StopWhenEdited"] == {"loss": STOP_LOSS}
    assert config["trainer"]["max_epochs"] == EPOCHS


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"layers": "0.7"}, "layers must be a list with at least one value, each an index, a fraction or a range"),
        ({"layers": [None]}, "layers must be a list"),
        ({"step_sizes": []}, r"step_sizes must be a list with at least one value, each in \(0, 1\], got \[\]"),
        ({"step_sizes": [2.0]}, "step_sizes must be"),
        ({"energies": [0]}, r"energies must be a list with at least one value, each in \(0, 1\]"),
        ({"kl_weights": [-1]}, "kl_weights must be a list with at least one value, each >= 0"),
        ({"kl_weights": 0}, "kl_weights must be a list"),
    ],
)
def test_a_wrong_grid_is_refused(wrong: dict[str, Any], expected: str) -> None:
    with pytest.raises(EditError, match=f"TuneGrid: {expected}"):
        TuneGrid(**wrong)
