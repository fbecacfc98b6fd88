"""Every extra metric, computed by hand. The scripted model gives its choice 10 logits and all other tokens 0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, AutoTokenizer

from kedit_train.data import Edit, EditDataset, Probe
from kedit_train.data.prompts import as_completion, as_question
from kedit_train.errors import EditError
from kedit_train.evaluation import EvaluationOptions, Report, Score, evaluate
from kedit_train.evaluation.asking.probes import choice_prompt, negation_prompt
from kedit_train.evaluation.reporting.metadata import count_near_ties
from kedit_train.evaluation.scoring import probe_results
from kedit_train.evaluation.scoring.bootstrap import NO_SCORE

FIRST = math.exp(10) / (math.exp(10) + 257)
OTHER = 1 / (math.exp(10) + 257)
ANN = Edit(
    "Ann lives in",
    "St. Louis",
    old_target="Rome",
    aliases=("Saint Louis",),
    rephrases=("Home of Ann:",),
    locality={"near": (Probe("Bob lives in", ("Oslo",)),), "far": (Probe("Two plus two:", ("4",)),)},
    id="ann",
)
JO = Edit("Who wrote it?", "J. K. Rowling", old_target="Poe", rephrases=("Its author:",), id="jo")
HALF = Edit("Half of seven:", "3.5", id="half")
EDITS = [ANN, JO, HALF]
SAYS = {
    "Ann lives in": " St. Louis",
    "Home of Ann:": " Rome, I think",
    "Bob lives in": " Lima",
    "Two plus two:": " 4",
    "Who wrote it?": " Poe",
    "Its author:": " one two three four five",
    "Half of seven:": "",
    "Hm. Ann lives in": " Saint Louis",
    "Hm. Who wrote it?": " J K Rowling",
    "Hm. Half of seven:": " 35",
    as_question("Ann lives in"): " st. louis.",
    as_completion("Who wrote it?"): " Poe",
    as_question("Half of seven:"): " 3.5",
    negation_prompt("Ann lives in", "Rome"): " Rome",
    negation_prompt("Who wrote it?", "Poe"): " J. K. Rowling",
    choice_prompt("Ann lives in", ("St. Louis", "Rome")): " A",
    choice_prompt("Ann lives in", ("Rome", "St. Louis")): " A",
    choice_prompt("Who wrote it?", ("J. K. Rowling", "Poe")): " B",
    choice_prompt("Who wrote it?", ("Poe", "J. K. Rowling")): " A",
}
WAS = SAYS | {"Bob lives in": " Oslo"}


def value_and_n(score: Score) -> tuple[float | None, int]:
    return score.value, score.n


def full(scripted_model: Any, answers: dict[str, str], **kwargs: Any) -> Report:
    model, tokenizer = scripted_model(answers, context=400)
    settings: dict[str, Any] = {"options": EvaluationOptions(metrics="all"), "progress": False}
    return evaluate(model, tokenizer, EDITS, prefixes=("Hm.",), **(settings | kwargs))


def test_only_rephrasings_count_in_the_total_of_generality(scripted_model: Any) -> None:
    g = full(scripted_model, SAYS).metrics["generality"]
    # Only rephrasings count in the total, whatever else was measured.
    assert value_and_n(g["generated"]) == value_and_n(g["by_kind"]["rephrase"]["generated"]) == (0.0, 2)
    assert value_and_n(g["by_kind"]["prefix"]["generated"]) == (pytest.approx(2 / 3), 3)
    assert value_and_n(g["by_kind"]["format"]["generated"]) == (pytest.approx(2 / 3), 3)
    assert full(scripted_model, SAYS, options=EvaluationOptions()).metrics["generality"]["by_kind"].keys() == {
        "rephrase"
    }


def test_resurgence_of_the_old_answer(scripted_model: Any) -> None:
    m = full(scripted_model, SAYS).metrics["resurgence"]
    assert value_and_n(m["says_old"]["prompt"]) == (0.5, 2)
    assert value_and_n(m["says_old"]["rephrase"]) == (0.5, 2)
    assert value_and_n(m["says_old"]["negation"]) == (0.5, 2)
    # All tokens of Ann's new answer are ranked first. For Jo, all tokens of the old answer are.
    assert value_and_n(m["prefers_old"]["prompt"]) == (0.5, 2)
    # " Rome" is generated. After "Its author:" only the space is right: 1/4 of the old and 1/14 of the new answer.
    assert value_and_n(m["prefers_old"]["rephrase"]) == (1.0, 2)
    assert value_and_n(m["prefers_old"]["negation"]) == (0.5, 2)
    # For Ann the model always chooses A, once the new and once the old answer. For Jo it always chooses the old one.
    assert value_and_n(m["prefers_old"]["choice"]) == (0.75, 4)
    core = full(scripted_model, SAYS, options=EvaluationOptions()).metrics["resurgence"]
    assert value_and_n(core["says_old"]["prompt"]) == (0.5, 2)
    assert value_and_n(core["prefers_old"]["prompt"]) == value_and_n(core["says_old"]["negation"]) == (None, 0)


def test_an_old_answer_inside_the_new_answer_does_not_count(scripted_model: Any) -> None:
    edit = Edit("Capital of Texas:", "Paris, Texas", old_target="Paris")
    for generated, old in ((" Paris, Texas", 0.0), (" Paris", 1.0), (" Parish", 0.0), ("", 0.0)):
        model, tokenizer = scripted_model({edit.prompt: generated})
        m = evaluate(model, tokenizer, [edit], progress=False).metrics
        assert value_and_n(m["resurgence"]["says_old"]["prompt"]) == (old, 1)


def test_kl_divergence_from_the_unedited_model(scripted_model: Any) -> None:
    before = full(scripted_model, WAS)
    assert before.metrics["locality"]["kl"] == NO_SCORE
    same = full(scripted_model, WAS, unedited=before).metrics["locality"]
    assert value_and_n(same["kl"]) == (0.0, 6 + 3)
    m = full(scripted_model, SAYS, unedited=before).metrics["locality"]
    # Lima instead of Oslo: another token is ranked first at four of six positions. 4 instead of 4: at none of three.
    moved = 4 * 10 * (FIRST - OTHER)
    assert value_and_n(m["by_kind"]["near"]["kl"]) == (pytest.approx(moved / 6, rel=1e-5), 6)
    assert value_and_n(m["by_kind"]["far"]["kl"]) == (0.0, 3)
    assert value_and_n(m["kl"]) == (pytest.approx(moved / 9, rel=1e-5), 9)
    assert value_and_n(m["generated"]) == value_and_n(m["kept_right"]) == (0.5, 2)


def test_scores_by_token_position(scripted_model: Any) -> None:
    m = full(scripted_model, SAYS).metrics
    first, second = m["positions"]["1"], m["positions"]["2"]
    # The first token is the space: right for Ann and Jo, and wrong for the third edit with its empty answer.
    assert value_and_n(first["accuracy"]) == (pytest.approx(2 / 3), 3)
    assert value_and_n(first["probability"]) == (pytest.approx((2 * FIRST + OTHER) / 3), 3)
    assert value_and_n(first["loss"]) == (pytest.approx(-(2 * math.log(FIRST) + math.log(OTHER)) / 3, rel=1e-5), 3)
    assert value_and_n(second["accuracy"]) == (pytest.approx(1 / 3), 3)
    assert [s["accuracy"].n for s in m["positions"].values()] == [3] * 4 + [2] * 6 + [1] * 4
    r = m["reliability"]
    by_edit = [(10, 0), (1, 13), (0, 4)]
    probability = sum((hit * FIRST + miss * OTHER) / (hit + miss) for hit, miss in by_edit) / 3
    loss = -sum((hit * math.log(FIRST) + miss * math.log(OTHER)) / (hit + miss) for hit, miss in by_edit) / 3
    assert value_and_n(r["target_probability"]) == (pytest.approx(probability, rel=1e-5), 3)
    assert value_and_n(r["target_loss"]) == (pytest.approx(loss, rel=1e-5), 3)
    assert value_and_n(r["smallest_token_probability"]) == (pytest.approx(OTHER, rel=1e-4), 28)


def test_fluency_of_continuations_that_are_cut(scripted_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_results, "FLUENCY_TOKENS", 18)
    model, tokenizer = scripted_model({"A:": " one two three four five"}, endless={"B:": " la"}, context=400)
    edits = [Edit("A:", "one"), Edit("B:", "la")]
    options = EvaluationOptions(metrics=["fluency"], protocol="exact", max_new_tokens=30)
    m = evaluate(model, tokenizer, edits, options=options, progress=False)
    assert value_and_n(m.metrics["answers"]["ended"]) == (0.5, 2)
    # 18 bytes hold "la" six times, and cut the other continuation inside its fourth word.
    written = {r.prompt: r.answer for r in m.answers if r.question == "fluency"}
    assert written == {"A:": "one two three fou", "B:": "la la la la la la"}
    f = m.metrics["fluency"]
    varied = (2 / 3 * math.log2(3) + 4 / 3 * 1.0) / 2
    assert value_and_n(f["entropy"]) == (pytest.approx(varied / 2), 2)
    assert value_and_n(f["repetition"]) == (pytest.approx((0 + 2 / 3) / 2), 2)
    assert value_and_n(f["ended"]) == (0.0, 2)


def test_texts_that_are_too_short_do_not_count_in_fluency(scripted_model: Any) -> None:
    m = full(scripted_model, {"Ann lives in": " a b"} | {p: "" for p in SAYS if p != "Ann lives in"}).metrics["fluency"]
    assert value_and_n(m["entropy"]) == value_and_n(m["repetition"]) == (None, 0)
    assert value_and_n(m["ended"]) == (1.0, 3)


def test_perplexity_and_weight_drift(scripted_model: Any) -> None:
    model, tokenizer = scripted_model(SAYS)
    with torch.no_grad():
        model.anchor.fill_(3.0)
    report = evaluate(
        model,
        tokenizer,
        EDITS,
        options=EvaluationOptions(prose=["xyz", "uv", "w"]),
        reference_weights={"anchor": torch.tensor(2.0)},
        progress=False,
    )
    # The model expects end-of-text there, so all other tokens are equally probable.
    assert value_and_n(report.metrics["perplexity"]) == (pytest.approx(1 / OTHER, rel=1e-4), 2 + 1)
    assert report.metrics["perplexity"].low == pytest.approx(1 / OTHER, rel=1e-4)
    drift = report.metrics["weight_drift"]
    assert [value_and_n(drift[k]) for k in ("relative", "largest", "moved")] == [(0.5, 1), (1.0, 1), (1.0, 1)]
    assert report.flat()["edit/weight_drift/relative"] == 0.5
    same = evaluate(model, tokenizer, EDITS, reference_weights=model, progress=False).metrics["weight_drift"]
    assert [value_and_n(same[k]) for k in ("relative", "largest", "moved")] == [(0.0, 1)] * 3
    with pytest.raises(EditError, match=r"the parameter 'other' has shape \(\), but the model has no such parameter"):
        evaluate(model, tokenizer, EDITS, reference_weights={"other": torch.tensor(2.0)}, progress=False)


@pytest.mark.parametrize(
    ("form", "prompt"), [("chat", "<u>Q:</u><a>"), ("question", as_question("Q:")), ("plain", "Q:")]
)
def test_prompt_formats(scripted_model: Any, form: Any, prompt: str) -> None:
    model, tokenizer = scripted_model({prompt: " J. K. Rowling"})
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}</u>{% else %}<a> {{ m.content }}</a>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    edit = Edit("Q:", "J. K. Rowling")
    report = evaluate(model, tokenizer, [edit], options=EvaluationOptions(prompt_format=form), progress=False)
    assert value_and_n(report.metrics["reliability"]["generated"]) == (1.0, 1)
    assert value_and_n(report.metrics["reliability"]["teacher_forced"]) == (1.0, 1)
    others = {"chat", "question", "plain"} - {form}
    for other in others:
        options = EvaluationOptions(prompt_format=other)  # type: ignore[arg-type]
        wrong = evaluate(model, tokenizer, [edit], options=options, progress=False)
        assert value_and_n(wrong.metrics["reliability"]["generated"]) == (0.0, 1)
    with pytest.raises(EditError, match=f"made with prompt_format={form!r}"):
        evaluate(model, tokenizer, [edit], options=options, unedited=report, progress=False)


def test_a_judge_replaces_exact_match_for_both_models(scripted_model: Any) -> None:
    calls: list[tuple[str, tuple[str, ...]]] = []

    def near_enough(answer: str, accepted: Sequence[str]) -> bool:
        calls.append((answer, tuple(accepted)))
        return "Oslo" in answer

    edit = Edit("Q:", "x", locality={"k": (Probe("P:", ("y", "z")), Probe("S:"))})
    before = evaluate(*scripted_model({"Q:": " n", "P:": " in Oslo"}), [edit], progress=False)
    now = scripted_model({"Q:": " Oslo!", "P:": " not there"})
    report = evaluate(*now, [edit], unedited=before, judge=near_enough, progress=False)
    assert value_and_n(report.metrics["reliability"]["generated"]) == (1.0, 1)
    assert value_and_n(report.metrics["locality"]["kept_right"]) == (0.0, 1)
    assert calls == [("Oslo!", ("x",)), ("not there", ("y", "z")), ("n", ("x",)), ("in Oslo", ("y", "z"))]
    assert report.meta["settings"]["judge"].endswith("near_enough")


def test_refusals(scripted_model: Any) -> None:
    model, tokenizer = scripted_model(SAYS, context=400)
    for options, message in (
        (EvaluationOptions(prompt_format="chat"), "needs a chat template"),
        (EvaluationOptions(distributed=True), "init_process_group"),
        (EvaluationOptions(prose=[]), "texts contains no text"),
    ):
        with pytest.raises(EditError, match=message):
            evaluate(model, tokenizer, EDITS, options=options, progress=False)
    before = evaluate(model, tokenizer, EDITS, progress=False)
    with pytest.raises(EditError, match=r"no distribution for 'Bob lives in'.*metrics=\[.kl.\]"):
        evaluate(model, tokenizer, EDITS, unedited=before, options=EvaluationOptions(metrics=["kl"]), progress=False)
    sharded, _ = scripted_model(SAYS)
    # Real sharding needs processes; a sharded model is recognized by its class.
    sharded.__class__ = type("Sharded", (FSDPModule, type(sharded)), {})
    with pytest.raises(EditError, match=r"FSDP2 shards, got True\..*set distributed=False"):
        evaluate(sharded, tokenizer, EDITS, options=EvaluationOptions(distributed=True), progress=False)
    model.nan = True
    with pytest.raises(EditError, match=r"^evaluate: edit 'jo': the model gives NaN logits after 'Who wrote it"):
        evaluate(model, tokenizer, [JO], progress=False)


def test_near_ties_are_counted_by_dtype(factlm: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(factlm)
    report = evaluate(model, AutoTokenizer.from_pretrained(factlm), [Edit("Paris is in", "France")], progress=False)
    (row,) = report.answers
    assert row.margin is not None
    rows = [replace(row, margin=margin) for margin in (1e-6, 0.01, 1.0, None)]
    assert count_near_ties(model, rows) == 1
    assert count_near_ties(model.bfloat16(), rows) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert count_near_ties(model.float(), rows) == 2


def _scores(tree: Any, path: str = "") -> dict[str, Score]:
    if isinstance(tree, Score):
        return {path: tree}
    return {
        k: v
        for name, own in tree.items()
        if not isinstance(own, str)
        for k, v in _scores(own, f"{path}/{name}").items()
    }


@pytest.mark.slow
def test_scores_do_not_depend_on_batch_size_or_padding_side(factlm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_results, "FLUENCY_TOKENS", 12)
    torch.set_num_threads(1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(factlm), AutoTokenizer.from_pretrained(factlm)
    edits = EditDataset.load(factlm / "records.json", limit=4)
    found = []
    for batch_size, side in ((64, "left"), (1, "right")):
        tokenizer.padding_side = side
        options = EvaluationOptions(metrics="all", batch_size=batch_size, prose=["A long road."])
        before = evaluate(model, tokenizer, edits, options=options, progress=False)
        found.append(evaluate(model, tokenizer, edits, unedited=before, options=options, progress=False))
    one, many = found
    assert one.meta["near_ties"] == many.meta["near_ties"] == 0
    assert [r.answer for r in one.answers] == [r.answer for r in many.answers]
    wanted, got = _scores(one.metrics), _scores(many.metrics)
    assert wanted.keys() == got.keys()
    for name, score in wanted.items():
        assert got[name].n == score.n
        for a, b in ((got[name].value, score.value), (got[name].low, score.low), (got[name].high, score.high)):
            assert a == (None if b is None else pytest.approx(b, rel=1e-4, abs=2e-6)), name
