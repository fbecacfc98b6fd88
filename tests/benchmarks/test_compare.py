"""What the comparison and the check of the recipes say about given figures; nothing is trained here."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from real_models import smollm2

HERE = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(HERE.parents[1] / "recipes"))
    monkeypatch.syspath_prepend(str(HERE))
    yield importlib.import_module
    for name in ("methods", "settings", "workload", "compare_report", "recipes_check", "paired", "one_by_one"):
        sys.modules.pop(name, None)


def row(reliability: float, generality: float, locality: float) -> list[dict[str, Any]]:
    return [{"reliability": reliability, "generality": generality, "locality": locality}]


def test_the_pareto_front(module: Any) -> None:
    report = module("compare_report")
    rows = {
        "best": row(1.0, 0.9, 0.9),
        "worse in one": row(1.0, 0.9, 0.8),
        "worse in all": row(0.5, 0.5, 0.5),
        "other trade": row(1.0, 0.5, 1.0),
        "equal": row(1.0, 0.9, 0.9),
    }
    assert report.front(rows) == {"best", "equal", "other trade"}


def test_a_cell_shows_the_mean_and_half_the_range_over_draws(module: Any) -> None:
    report = module("compare_report")
    draws = [{"locality": 0.5, "drift": None}, {"locality": 1.0, "drift": None}]
    assert report.cell(draws, "locality", 2) == "0.75 ± 0.25"
    assert report.cell(draws[:1], "locality", 2) == "0.50"
    assert report.cell(draws, "drift", 2) == "-"


def test_a_table_omits_constant_columns_except_those_of_the_front_and_counts_draws_that_differ(module: Any) -> None:
    report = module("compare_report")
    other = dict.fromkeys(("portability", "resurgence", "perplexity", "times", "memory")) | {"drift": 1.5}
    rows = {
        "one": [row(1.0, 0.5, 0.9)[0] | other, row(1.0, 0.7, 0.9)[0] | other],
        "two": [row(1.0, 0.4, 0.8)[0] | other],
    }
    assert report.table(rows).splitlines() == [
        "| recipe | reliability | generality | locality |",
        "|---|---:|---:|---:|",
        "| **one**, 2 | 1.00 ± 0.00 | 0.60 ± 0.10 | 0.90 ± 0.00 |",
        "| two, 1 | 1.00 | 0.40 | 0.80 |",
    ]
    del rows["one"][1]
    assert "| **one** | 1.00 | 0.50 | 0.90 |" in report.table(rows)


def test_the_table_of_smollm2_has_other_columns_and_names_rates_and_texts(module: Any) -> None:
    report = module("compare_report")
    one = {"reliability": 1.0, "generality": 0.1, "PS": 0.5, "others": 0.2, "NS": 0.4, "KL": 0.0123, "perplexity": 1.5}
    one |= {"times": 3.25, "PS before": 0.3, "NS before": 0.7, "locality": None}
    rows = {"ft_m": [one], "second_order": [one | {"others": 0.5, "texts": 1700}]}
    assert report.table(rows, "smollm2").splitlines() == [
        "| recipe | reliability | PS | others kept |",
        "|---|---:|---:|---:|",
        "| ft_m | 1.00 | 0.50 | 0.20 |",
        "| **second_order** | 1.00 | 0.50 | 0.50 |",
    ]
    assert report.table({"ft_m": [one]}, "smollm2").splitlines()[2] == (
        "| **ft_m** | 1.00 | 0.10 | 0.50 | 0.20 | 0.40 | 0.0123 | 1.50 | 3.2 |"
    )
    rates = module("methods").LEARNING_RATES["smollm2"]
    text = report.notes("smollm2", rows)
    assert text.startswith("Scores of the unedited model: PS 0.30, NS 0.70.")
    assert "Learning rates: `ft_m` " in text
    assert text.endswith("Number of texts: `second_order` 1,700.")
    assert f"`ft_m` {rates['ft_m'] / 5:g}" in report.notes("smollm2", rows, "single")
    assert report.notes("world", {"ft_m": row(1.0, 0.9, 0.8)}) == ""
    # Both recipes were measured on draw 1, and only one of them on draw 2.
    draws = [one | {"draw": 1}, one | {"draw": 2, "PS before": 0.4, "NS before": 0.5}]
    text = report.notes("smollm2", {"ft_m": draws, "second_order": draws[:1]})
    assert text.startswith("Scores of the unedited model: PS 0.35, NS 0.60.")


def test_times_are_relative_to_ft_m_on_the_same_machine_and_the_last_result_of_a_draw_counts(module: Any) -> None:
    report = module("compare_report")
    key = {"model": "world", "mode": "batch", "draw": 0, "perplexity": None}
    results = [
        key | {"recipe": "ft_m", "seconds": 2.0, "machine": "old", "reliability": 0.8},
        key | {"recipe": "overtone", "seconds": 3.0, "machine": "old"},
        key | {"recipe": "ft_m", "seconds": 0.5, "machine": "new", "reliability": 0.9},
        key | {"recipe": "kedit_default", "seconds": 1.0, "machine": "new"},
        key | {"recipe": "null_space", "seconds": 1.0, "machine": "third"},
    ]
    rows = report.grouped(results)["world", "batch"]
    assert [(name, [row["times"] for row in each]) for name, each in rows.items()] == [
        ("ft_m", [1.0]), ("overtone", [1.5]), ("null_space", [None]), ("kedit_default", [2.0]),
    ]  # fmt: skip
    assert rows["ft_m"][0]["reliability"] == 0.9


def test_expected_scores_are_written_read_and_checked(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = module("recipes_check")
    monkeypatch.setattr(check, "RECIPES", tmp_path)
    recipe = tmp_path / "some.yaml"
    recipe.write_text("# Some recipe.\n#\n# EXPECT\nseed_everything: 0\n")
    assert check.runnable() == []
    measured = [{"reliability": 1.0, "generality": 0.8, "locality": 0.5}]
    measured += [{"reliability": 0.96, "generality": 0.7, "locality": 0.5}]
    check.write("some.yaml", measured, [20.0, 30.0])
    assert check.runnable() == ["some.yaml"]
    assert check.expected_scores("some.yaml") == {
        "reliability": (0.91, 1.0),
        "generality": (0.60, 0.90),
        "locality": (0.45, 0.55),
    }
    assert all(check.failures("some.yaml", scores) == [] for scores in measured)
    assert check.failures("some.yaml", measured[0] | {"locality": 0.4}) == ["locality is 0.400, expected 0.45 to 0.55"]
    before = recipe.read_text()
    check.write("some.yaml", measured[:1], [20.0])
    assert recipe.read_text() != before
    assert recipe.read_text().endswith("seed_everything: 0\n")


@pytest.mark.parametrize("mode", ["batch", pytest.param("single", marks=pytest.mark.slow), "sequential"])
def test_a_method_uses_the_settings_of_its_recipe(module: Any, mode: str) -> None:
    methods, settings = module("methods"), module("settings")
    setting = settings.embedded()
    model, tokenizer = settings.load(setting.path)
    edits = setting.edits(45)
    script = module("one_by_one")
    for name in ("overtone", "kl_locality", "masked_fisher", "kedit_default", "one_by_one"):
        if mode not in methods.ONLY.get(name, (mode,)):
            continue
        config = methods.load_recipe(name)
        method = methods.Method(setting, model, tokenizer, name, config, edits, mode)
        own = edits if mode == "batch" else edits[:1]
        made = {type(callback).__name__: callback for callback in method.callbacks(own)}
        assert "EditMetrics" not in made
        stop = made["StopWhenEdited"]
        assert (stop.idle_steps, stop.loss_steps) == ("epoch" if name == "overtone" else None, "epoch")
        assert method.epochs == (script.EPOCHS if name == "one_by_one" else config.trainer.max_epochs)
        if name != "one_by_one":
            assert method.lr == pytest.approx(config.model.init_args.learning_rate * (1.0 if mode == "batch" else 0.2))
        if "KLLocality" in made:
            held = made["KLLocality"].texts
            assert held.nearest == (24 if mode == "single" else None)
            if mode == "single":
                # These are all texts of the world that are allowed with this edit. The nearest texts are chosen among
                # them.
                assert held.source == setting.texts(own)
                assert len(held.source) > 10_000
            else:
                assert held.source == setting.texts(edits)
            assert made["KLLocality"].sequential == (mode == "sequential")
        if name == "kedit_default":
            assert made["NullSpace"].texts.source == setting.texts(edits)
        if name == "one_by_one":
            constraints = script.constraints("world", 0.5)
            assert made["KLLocality"].weight == constraints[0].weight == 200.0
            rate = script.LEARNING_RATE
            assert method.lr == pytest.approx(rate if mode == "sequential" else rate / 2)
            if mode == "sequential":
                own_script = {repr(each) for each in (*script.learning(), *constraints)}
                assert {repr(each) for each in made.values()} == own_script
                assert made["KLLocality"].batch_size == constraints[0].batch_size
            else:
                assert "NormBall" not in made
        if name == "masked_fisher":
            assert made["GradientMask"].edits == own


def test_the_texts_of_factlm_contain_no_evaluation_prompt(module: Any, shared: Path) -> None:
    factlm = module("settings").factlm
    setting = factlm(1)
    edits = setting.edits(100)
    prompts = [r for e in edits for r in (e.prompt, *e.rephrases, *(p.prompt for k in e.locality.values() for p in k))]
    texts = setting.texts(edits)
    assert len(texts) > 1000
    assert not any(prompt in text for text in texts for prompt in prompts)
    assert not any(e.subject and e.subject in text for text in texts for e in edits)
    subjects = {f"{e.prompt} {e.old_target}.": e.subject for e in (*factlm(0).edits(1200), *factlm(100).edits(400))}
    assert not any(subjects[text] in prompt for text in texts if text in subjects for prompt in prompts)
    assert not {e.id for e in edits} & {e.id for e in factlm(100).edits(100)}


def test_methods_without_a_file_have_callbacks_of_their_own(module: Any) -> None:
    methods = module("methods")
    setting = module("settings").embedded()
    edits = setting.edits(4)
    kinds = {}
    for name in ("low_curvature", "plain_lora"):
        method = methods.Method(setting, None, None, name, methods.load_recipe(name), edits, "batch", 32)
        kinds[name] = [type(callback).__name__ for callback in method.callbacks(edits)]
        assert len(method.texts) == 32
    assert kinds["low_curvature"] == ["ParameterScope", "TokenLoss", "LowCurvature", "StopWhenEdited"]
    assert kinds["plain_lora"] == ["TokenLoss"]
    rates = methods.LEARNING_RATES["smollm2"]
    assert methods.load_recipe("ft_m", model="smollm2").model.init_args.learning_rate == rates["ft_m"]
    assert methods.load_recipe("subject_values_prefixes").data.init_args.augmentation.prefixes == 2
    given = methods.load_recipe("ft_m", "--model.learning_rate=0.5", model="smollm2")
    assert given.model.init_args.learning_rate == 0.5


def test_the_facts_of_smollm2_are_edited_or_kept_or_texts(module: Any, shared: Path) -> None:
    smollm2()
    setting = module("settings").smollm2(10)
    for count in (50, 20):
        edits = setting.edits(count)
        others = [probe.prompt for edit in edits for probe in edit.locality["others"]]
        assert (len(edits), len(others)) == (count, 100)
        texts = setting.texts(edits)
        assert len(texts) == 3300
        # A few facts are in the data twice. The callbacks leave such texts out when they read them.
        asked = (*(edit.prompt for edit in edits), *others)
        assert sum(text.startswith(asked) for text in texts) < 20
