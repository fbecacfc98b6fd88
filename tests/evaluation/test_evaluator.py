"""Every number of a report, computed by hand from the answers of scripted models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kedit_train.data import Edit, EditDataset, Probe
from kedit_train.errors import EditError
from kedit_train.evaluation import EvaluationOptions, Score, evaluate
from kedit_train.evaluation.scoring.bootstrap import NO_SCORE

EDITS = [
    Edit(
        prompt="Ann lives in",
        target="St. Louis",
        old_target="Rome",
        aliases=("Saint Louis",),
        rephrases=("Home of Ann:", "Ann's town:"),
        portability={"country": (Probe("Ann's country:", ("USA", "United States")),)},
        locality={
            "neighbour": (Probe("Bob lives in", ("Oslo",)), Probe("Cyd lives in", ("Lima",))),
            "other": (Probe("Two plus two:", ("4",)),),
        },
        id="ann",
    ),
    Edit(
        prompt="Half of seven:",
        target="3.5",
        rephrases=("7/2 is",),
        portability={"double": (Probe("Twice that:", ()),)},
        locality={"other": (Probe("Say something:", ()),)},
    ),
]
OLD = {
    "Ann lives in": " Rome",
    "Home of Ann:": " Rome",
    "Ann's town:": " Rome",
    "Ann's country:": " Italy",
    "Bob lives in": " Oslo",
    "Cyd lives in": " Quito",
    "Two plus two:": " 4.",
    "Half of seven:": " 35",
    "7/2 is": " 3",
    "Twice that:": " 70",
    "Say something:": " Hello",
}
NEW = OLD | {
    "Ann lives in": " Saint Louis",
    "Home of Ann:": " st. louis\nand more",
    "Ann's country:": " the United States.",
    "Bob lives in": "",
    "Half of seven:": " 3.5.",
    "Say something:": " hello!",
}
ENDLESS = {"Ann's town:": " St"}


def value_and_n(score: Score) -> tuple[float | None, int]:
    """Return a score without its interval, which has its own tests."""
    return score.value, score.n


def test_scores_of_the_unedited_model(scripted_model: Any) -> None:
    report = evaluate(*scripted_model(OLD), EDITS, progress=False)
    m = report.metrics
    assert value_and_n(m["reliability"]["generated"]) == (0.0, 2)
    # " Rome" and " St. Louis" share only the space. " 35" and " 3.5" share the space and the 3.
    assert m["reliability"]["teacher_forced"].value == pytest.approx((1 / 10 + 2 / 4) / 2)
    assert value_and_n(m["reliability"]["teacher_forced_exact"]) == (0.0, 2)
    assert value_and_n(m["generality"]["generated"]) == (0.0, 3)
    assert value_and_n(m["portability"]["generated"]) == (0.0, 1)
    assert value_and_n(m["portability"]["by_kind"]["double"]["generated"]) == (None, 0)
    assert m["locality"]["compared_with"] == "truth"
    assert value_and_n(m["locality"]["generated"]) == value_and_n(m["locality"]["right"]) == (pytest.approx(2 / 3), 3)
    assert value_and_n(m["locality"]["by_kind"]["neighbour"]["generated"]) == (0.5, 2)
    assert value_and_n(m["locality"]["by_kind"]["other"]["generated"]) == (1.0, 1)
    assert value_and_n(m["locality"]["kept_right"]) == (None, 0)
    assert report.unedited is None
    assert report.meta["unscored"] == {"portability": 1, "locality": 1}
    assert report.answers_table()[0] == {
        "prompt": "Ann lives in",
        "target": "St. Louis",
        "old_target": "Rome",
        "before": None,
        "after": "Rome",
        "right": False,
    }


def test_scores_of_the_edited_model_against_the_unedited(scripted_model: Any) -> None:
    before = evaluate(*scripted_model(OLD), EDITS, progress=False)
    edited = {prompt: answer for prompt, answer in NEW.items() if prompt not in ENDLESS}
    report = evaluate(*scripted_model(edited, ENDLESS), EDITS, unedited=before, progress=False)
    m = report.metrics
    assert value_and_n(m["reliability"]["generated"]) == (1.0, 2)
    # The generated alias counts as right. Teacher forcing compares with the target " St. Louis", position by position.
    places = sum(a == b for a, b in zip(" Saint Louis", " St. Louis", strict=False)) / len(" St. Louis")
    assert m["reliability"]["teacher_forced"].value == pytest.approx((places + 1) / 2)
    assert value_and_n(m["reliability"]["teacher_forced_exact"]) == (0.5, 2)
    assert value_and_n(m["generality"]["generated"]) == (pytest.approx(1 / 3), 3)
    assert value_and_n(m["portability"]["generated"]) == (1.0, 1)
    assert value_and_n(m["portability"]["by_kind"]["country"]["generated"]) == (1.0, 1)
    # Bob's answer changed. Cyd's is as wrong as before, 4 is unchanged, and "Hello" equals "hello!".
    assert m["locality"]["compared_with"] == "unedited model"
    assert value_and_n(m["locality"]["generated"]) == (0.75, 4)
    assert value_and_n(m["locality"]["by_kind"]["neighbour"]["generated"]) == (0.5, 2)
    assert value_and_n(m["locality"]["by_kind"]["other"]["generated"]) == (1.0, 2)
    assert value_and_n(m["locality"]["kept_right"]) == (0.5, 2)
    assert value_and_n(m["locality"]["right"]) == (pytest.approx(1 / 3), 3)
    # " Oslo" and an empty answer share 0 of 5 bytes, " Quito" and " Lima" share the space, and " 4." starts with " 4".
    assert value_and_n(m["locality"]["teacher_forced"]) == (pytest.approx((0 + 1 / 5 + 1) / 3), 3)
    assert report.unedited == before.metrics
    assert report.meta["unscored"] == {"portability": 1}
    never_ends = next(result for result in report.answers if result.prompt == "Ann's town:")
    assert (never_ends.ended, never_ends.right, never_ends.before) == (False, False, "Rome")
    assert [row["right"] for row in report.answers_table()] == [True, True]
    assert [row["before"] for row in report.answers_table()] == ["Rome", "35"]


def test_the_unedited_model_has_full_locality_against_itself(scripted_model: Any) -> None:
    before = evaluate(*scripted_model(OLD), EDITS, progress=False)
    m = evaluate(
        *scripted_model(OLD), EDITS, unedited=before, options=EvaluationOptions(batch_size=1), progress=False
    ).metrics
    assert value_and_n(m["locality"]["generated"]) == (1.0, 4)
    assert value_and_n(m["locality"]["kept_right"]) == (1.0, 2)
    assert m["reliability"] == before.metrics["reliability"]


def test_a_question_without_probes_has_no_score(scripted_model: Any) -> None:
    report = evaluate(*scripted_model(NEW), [Edit("Half of seven:", "3.5")], progress=False)
    for question in ("generality", "portability", "locality"):
        assert report.metrics[question]["generated"] == NO_SCORE
        assert report.metrics[question]["teacher_forced"] == NO_SCORE
    flat = report.flat()
    assert flat.pop("edit/reliability_smallest_token_probability") == pytest.approx(1 / (1 + 257 * math.exp(-10)))
    assert flat == {"edit/reliability": 1.0, "edit/reliability_teacher_forced": 1.0, "edit/answers/ended": 1.0}


def test_limit_draws_a_sample_with_the_seed(scripted_model: Any) -> None:
    names = [f"edit {i:03d}:" for i in range(50)]
    edits = EditDataset([Edit(name, "yes", id=str(i)) for i, name in enumerate(names)], name="fifty")
    model, tokenizer = scripted_model(dict.fromkeys(names, " yes"))

    def sample(seed: int) -> list[str]:
        report = evaluate(
            model, tokenizer, edits, limit=10, seed=seed, options=EvaluationOptions(max_new_tokens=5), progress=False
        )
        assert (report.meta["n_edits"], report.meta["n_edits_in_data"], report.meta["seed"]) == (10, 50, seed)
        assert (report.meta["data_name"], report.meta["data_hash"]) == ("fifty", edits.hash)
        return [result.edit for result in report.answers]

    assert sample(1) == sample(1) != sample(2)
    assert evaluate(model, tokenizer, edits, limit=99, progress=False).meta["n_edits"] == 50


def test_refusals(scripted_model: Any) -> None:
    model, tokenizer = scripted_model(OLD)
    before = evaluate(model, tokenizer, EDITS[1:], progress=False)
    with pytest.raises(EditError, match="no answer to the prompt 'Ann lives in'"):
        evaluate(model, tokenizer, EDITS, unedited=before, progress=False)
    with pytest.raises(EditError, match="unedited= was made with max_new_tokens=32, but"):
        evaluate(
            model, tokenizer, EDITS[1:], unedited=before, options=EvaluationOptions(max_new_tokens=8), progress=False
        )
    with pytest.raises(EditError, match="evaluate: edits is empty"):
        evaluate(model, tokenizer, [], progress=False)
    with pytest.raises(EditError, match="limit must be >= 1 or None, got 0"):
        evaluate(model, tokenizer, EDITS, limit=0, progress=False)


def test_a_trained_model_knows_the_old_facts_and_not_the_new_ones(factlm: Path) -> None:
    torch.set_num_threads(1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(factlm), AutoTokenizer.from_pretrained(factlm)
    edits = [
        Edit(
            prompt=r["prompt"],
            target=r["target_new"],
            old_target=r["ground_truth"],
            locality={"neighbour": (Probe(r["locality_prompt"], (r["locality_ground_truth"],)),)},
            portability={"old": (Probe(r["prompt"], (r["ground_truth"],)),)},
        )
        for r in json.loads((factlm / "records.json").read_text())[:60]
    ]
    report = evaluate(model, tokenizer, edits, progress=False)
    assert report.metrics["reliability"]["generated"].value <= 0.02
    assert report.metrics["portability"]["generated"].value >= 0.97
    assert report.metrics["portability"]["teacher_forced_exact"].value >= 0.97
    assert report.metrics["locality"]["generated"].value >= 0.95
    tokenizer.padding_side = "right" if tokenizer.padding_side == "left" else "left"
    again = evaluate(model, tokenizer, edits, unedited=report, options=EvaluationOptions(batch_size=13), progress=False)
    assert [r.answer for r in again.answers] == [r.answer for r in report.answers]
    assert value_and_n(again.metrics["locality"]["generated"]) == (1.0, 60)
    for name, score in report.metrics["reliability"].items():
        now = again.metrics["reliability"][name]
        # Scores that count tokens are equal bit for bit. Probabilities differ by the rounding in other batches.
        exact = name not in ("target_loss", "target_probability", "smallest_token_probability")
        assert value_and_n(now) == (score.value if exact else pytest.approx(score.value, rel=1e-4), score.n), name
