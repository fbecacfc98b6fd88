"""Every protocol, computed by hand from the answers of scripted models. The tokens of these models are bytes."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kedit_train import world
from kedit_train.data import Edit, EditDataset, Probe
from kedit_train.errors import EditError
from kedit_train.evaluation import EvaluationOptions, Report, Score, evaluate
from kedit_train.evaluation.scoring.protocols import PROTOCOLS, Protocols, share_kept, starts_with

FIRST = 1 / (1 + 257 * math.exp(-10))
OTHER = math.exp(-10) * FIRST
EDIT = Edit(
    "Ann lives in",
    "Bern",
    old_target="Rome",
    aliases=("Berne",),
    rephrases=("Ann's town:",),
    locality={"near": (Probe("Bob lives in", ("Oslo",)), Probe("Say:"))},
    id="ann",
)
SECOND = Edit("Capital of it:", "St. Louis", old_target="Lima", id="second")
EDITS = [EDIT, SECOND]
WAS = {
    "Ann lives in": " Rome",
    "Ann's town:": " Rome",
    "Bob lives in": " Oslo, a city",
    "Say:": " hello there",
    "Capital of it:": " Lima",
}
NOW = {
    "Ann lives in": " Berne, a town in the Alps. It is",
    "Ann's town:": " the old town of Bern\nand so on",
    "Bob lives in": " Oslo. And",
    "Say:": " help me",
    "Capital of it:": " St. Louis.\nAnd",
}


def run(scripted_model: Any, protocol: Any, **kwargs: Any) -> Report:
    options = EvaluationOptions(protocol=protocol, max_new_tokens=40, **kwargs)
    before = evaluate(*scripted_model(WAS), EDITS, options=options, progress=False)
    return evaluate(*scripted_model(NOW), EDITS, options=options, unedited=before, progress=False)


def headlines(report: Report) -> list[float | None]:
    return [report.metrics[question]["generated"].value for question in ("reliability", "generality", "locality")]


def value_and_n(score: Score) -> tuple[float | None, int]:
    return score.value, score.n


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        ("Paris, the capital", "Paris", True),
        ("the Paris of the East", "Paris", True),
        ("Parisian", "Paris", False),
        ("Paris's mayor", "Paris", True),
        ("Paris-based", "Paris", True),
        ("“Paris”", "paris", True),
        ("in Paris", "Paris", False),
        ("St. Louis, Missouri", "St. Louis", True),
        ("3.5 metres", "3", False),
        ("3, or 4", "3", True),
        ("Paris2", "Paris", False),
        ("O'Brien", "O'Brien", True),
        ("C++ and more", "C", False),
        ("", "Paris", False),
        ("Paris", "", False),
        ("東京 です", "東京", True),
    ],
)
def test_an_answer_at_the_beginning_ends_at_a_word_boundary(answer: str, accepted: str, right: bool) -> None:
    assert starts_with(answer, ["something else", accepted]) == right


def test_each_protocol_judges_the_answers_by_its_own_rule(scripted_model: Any) -> None:
    # Reliability is over both edits. "Say:" has no right answer, so it counts in locality if answers are compared.
    # "Berne" and "St. Louis" stand at the beginning. The first 4 bytes of " Oslo" are kept, those of "Say:" too.
    assert headlines(run(scripted_model, "leading")) == [1.0, 0.0, 1.0]
    assert headlines(run(scripted_model, "exact")) == [0.5, 0.0, 0.0]
    assert headlines(run(scripted_model, "contains")) == [1.0, 1.0, 1.0]
    # "Berne, a town in the Alps" and "St" are wrong. "Oslo" was "Oslo, a city".
    assert headlines(run(scripted_model, "wild")) == [0.0, 0.0, 0.0]
    places = sum(a == b for a, b in zip(" the old", " Bern", strict=False)) / len(" Bern")
    assert headlines(run(scripted_model, "teacher_forced")) == [1.0, pytest.approx(places), 1.0]
    # Of " Bern", only the space is ranked first in the second prompt. " Rome" has the space too, but is shorter.
    assert headlines(run(scripted_model, "probability"))[0] == 1.0


def test_one_generation_gives_the_same_scores_as_one_generation_per_protocol(scripted_model: Any) -> None:
    together = run(scripted_model, list(PROTOCOLS))
    names = {"leading": "leading", "exact": "exact", "wild": "wild", "probability": "probability"}
    for protocol, name in names.items():
        alone = run(scripted_model, protocol)
        for question in ("reliability", "generality", "locality"):
            assert together.metrics[question][name] == alone.metrics[question]["generated"], (protocol, question)
        assert name not in run(scripted_model, "contains").metrics["reliability"]
    assert together.meta["settings"]["protocol"] == ",".join(PROTOCOLS)
    assert together.protocols == Protocols(PROTOCOLS)


def test_a_short_protocol_generates_few_tokens_and_wild_stops_at_a_full_stop(scripted_model: Any) -> None:
    answers = {result.prompt: result.answer for result in run(scripted_model, "leading").answers}
    # " Berne" has 6 bytes and the margin is 3. "Say:" has no right answer, so 3 bytes are generated.
    assert answers["Ann lives in"] == "Berne, a"
    assert answers["Say:"] == "he"
    answers = {result.prompt: result.answer for result in run(scripted_model, "wild").answers}
    assert answers["Ann lives in"] == "Berne, a town in the Alps"
    assert answers["Capital of it:"] == "St"
    answers = {result.prompt: result.answer for result in run(scripted_model, "contains").answers}
    assert answers["Ann's town:"] == "the old town of Bern\nand so on"


def test_whether_answers_end_is_not_measured_if_few_tokens_are_generated(scripted_model: Any) -> None:
    assert run(scripted_model, "leading").metrics["answers"]["ended"] == Score(None, n=0)
    assert run(scripted_model, ["leading", "exact"]).metrics["answers"]["ended"].value == 1.0


def test_locality_is_graded(scripted_model: Any) -> None:
    found = run(scripted_model, ["leading", "exact"]).metrics["locality"]
    # " Oslo" has five bytes, which are kept. " hello" became " help": the first three bytes are kept.
    assert value_and_n(found["tokens_kept"]) == (1.0, 2)
    assert value_and_n(found["same_answer"]) == value_and_n(found["exact"]) == (0.0, 2)
    assert value_and_n(found["kept_right"]) == (1.0, 1)
    assert run(scripted_model, "leading").metrics["locality"]["same_answer"].n == 0
    moved = NOW | {"Bob lives in": " Osaka"}
    options = EvaluationOptions(protocol="leading")
    before = evaluate(*scripted_model(WAS), EDITS, options=options, progress=False)
    m = evaluate(*scripted_model(moved), EDITS, options=options, unedited=before, progress=False).metrics["locality"]
    assert value_and_n(m["generated"]) == (0.5, 2)
    assert value_and_n(m["tokens_kept"]) == (pytest.approx((3 / 5 + 1) / 2), 2)
    assert m["compared_with"] == "unedited model"


@pytest.mark.parametrize(
    ("before", "after", "share"),
    [((1, 2, 3), (1, 2, 4), 2 / 3), ((1, -1), (1, 5), 0.5), ((1, 2, 3), (9, 2, 3), 0.0), ((), (1,), None)],
)
def test_tokens_after_the_first_difference_are_not_kept(before: Any, after: Any, share: float | None) -> None:
    assert share_kept(before, after) == share


def test_probabilities_of_both_answers(scripted_model: Any) -> None:
    edit = Edit("P:", "ab", old_target="ac", rephrases=("Q:",), locality={"n": (Probe("R:", ("xy",)),)})
    options = EvaluationOptions(protocol="probability")
    m = evaluate(*scripted_model({"P:": " ab", "Q:": " ac", "R:": " xy"}), [edit], options=options).metrics
    # The two answers share two of three bytes. One is ranked first at the third byte, the other is not.
    new, old = FIRST, math.exp((2 * math.log(FIRST) + math.log(OTHER)) / 3)
    assert value_and_n(m["reliability"]["generated"]) == value_and_n(m["locality"]["generated"]) == (1.0, 1)
    assert value_and_n(m["generality"]["generated"]) == (0.0, 1)
    assert m["reliability"]["magnitude"].value == pytest.approx(new - old, rel=1e-5)
    assert m["generality"]["magnitude"].value == pytest.approx(old - new, rel=1e-5)
    # After " xy", " ab" shares only the space.
    other = math.exp((math.log(FIRST) + 2 * math.log(OTHER)) / 3)
    assert m["locality"]["magnitude"].value == pytest.approx(new - other, rel=1e-5)
    assert m["locality"]["compared_with"] == "truth"
    assert value_and_n(m["probability"]["harmonic_mean"]) == (0.0, 3)
    m = evaluate(*scripted_model({"P:": " ab", "Q:": " ab", "R:": " xy"}), [edit], options=options).metrics
    assert m["probability"]["harmonic_mean"].value == 1.0


def test_agreement_of_the_top_tokens_as_in_easyedit(scripted_model: Any) -> None:
    edit = Edit("P:", "a", locality={"n": (Probe("R:", ("wxyz",)),)})
    options = EvaluationOptions(protocol="teacher_forced")
    before = evaluate(*scripted_model({"R:": " wxab"}), [edit], options=options, progress=False)
    report = evaluate(*scripted_model({"R:": " wxac"}), [edit], options=options, unedited=before, progress=False)
    # At the five positions of " wxyz", the two models differ in the last choice. Whether it is right does not matter.
    assert value_and_n(report.metrics["locality"]["generated"]) == (4 / 5, 1)


def endless(scripted_model: Any) -> Any:
    return scripted_model({"Bob lives in": " Oslo"}, endless={"Ann lives in": " Rome and", "Say:": " hello "})


def test_auto_chooses_by_the_unedited_models_own_answers(scripted_model: Any) -> None:
    ends = evaluate(*scripted_model(WAS), EDITS, progress=False)
    assert str(ends.protocols) == "exact"
    assert ends.protocols.reason == "the unedited model ends 3 of 3 sampled answers within 32 tokens"
    runs_on = evaluate(*endless(scripted_model), [EDIT], progress=False)
    assert runs_on.protocols.names == ("leading", "probability")
    assert "ends 1 of 2 sampled answers" in runs_on.protocols.reason
    lines = scripted_model({"Bob lives in": " Oslo"}, endless={"Ann lives in": " Rome\nand", "Say:": " hello "})
    assert evaluate(*lines, [EDIT], progress=False).protocols.names == ("leading", "probability")
    # The edited model is measured with the unedited model's protocol.
    after = evaluate(*scripted_model(NOW), [EDIT], unedited=runs_on, progress=False)
    assert after.protocols == runs_on.protocols
    assert evaluate(*endless(scripted_model), EDITS, unedited=ends, progress=False).protocols.headline == "exact"
    questions = EvaluationOptions(prompt_format="question")
    assert evaluate(*endless(scripted_model), [EDIT], options=questions, progress=False).protocols.headline == "exact"
    judged = evaluate(*endless(scripted_model), [EDIT], judge=lambda answer, accepted: True, progress=False)
    assert judged.protocols.headline == "exact"


def test_refusals(scripted_model: Any) -> None:
    options = EvaluationOptions(protocol="leading")
    leading = evaluate(*scripted_model(WAS), EDITS, options=options, progress=False)
    exact = EvaluationOptions(protocol="exact")
    with pytest.raises(EditError, match='made with protocol="leading", but the protocol is now "exact"'):
        evaluate(*scripted_model(WAS), EDITS, options=exact, unedited=leading, progress=False)
    with pytest.raises(EditError, match=r'judge needs protocol="exact".* got protocol="leading"'):
        evaluate(*scripted_model(WAS), EDITS, options=options, judge=lambda a, b: True, progress=False)
    expected = r'EvaluationOptions: protocol must be "auto", one of "leading", .*, or a list of these names without'
    for wrong in ("leading,exact", [], ["exact", "exact"], "squad"):
        with pytest.raises(EditError, match=expected):
            EvaluationOptions(protocol=wrong)  # type: ignore[arg-type]


def test_the_report_names_the_protocol(scripted_model: Any, tmp_path: Any) -> None:
    before = evaluate(*endless(scripted_model), [EDIT], progress=False)
    report = evaluate(*scripted_model(NOW), [EDIT], unedited=before, progress=False)
    text = report.markdown()
    assert "protocol: leading (chosen because the unedited model ends 1 of 2 sampled answers" in text
    assert "| locality: first tokens unchanged |" in text
    assert "answers cut at the limit" not in text
    flat = report.flat()
    assert flat["edit/reliability"] == flat["edit/reliability_leading"] == 1.0
    assert {"edit/reliability_probability", "edit/locality_tokens_kept", "edit/locality_probability"} <= flat.keys()
    loaded = Report.load(report.save(tmp_path / "report.json"))
    assert loaded == report
    assert loaded.protocols == report.protocols
    cut = evaluate(*endless(scripted_model), [EDIT], options=EvaluationOptions(protocol="exact"), progress=False)
    assert 'are cut at max_new_tokens, so scores of whole answers mean little; set protocol="leading"' in cut.markdown()


def test_the_retrieval_baseline_has_the_fact_in_the_prompt(scripted_model: Any) -> None:
    fact = "Ann lives in Bern. "
    answers = WAS | {f"{fact}{prompt}": " Bern" for prompt in ("Ann lives in", "Bob lives in")}
    answers |= {f"{fact}Ann's town:": " Basel", f"{fact}Say:": " hello there"}
    options = EvaluationOptions(metrics=["retrieval"])
    before = evaluate(*scripted_model(answers), [EDIT], options=options, progress=False)
    baseline = {name: value_and_n(score) for name, score in before.metrics["retrieval"].items()}
    assert baseline == {"reliability": (1.0, 1), "generality": (0.0, 1), "locality": (0.5, 2)}
    # The main scores are those without the fact.
    assert before.metrics["reliability"]["generated"].value == 0.0
    assert before.metrics["answers"]["ended"].n == 4
    report = evaluate(*scripted_model(NOW), [EDIT], options=options, unedited=before, progress=False)
    assert report.metrics["retrieval"] == before.metrics["retrieval"]
    assert report.flat()["edit/retrieval/reliability"] == 1.0
    rows = [line.split(" | ")[:5] for line in report.markdown().splitlines()]
    assert ["| fact in the prompt: reliability", "1.000", "–", "–", "1"] in rows


def test_prose_is_compared_with_the_unedited_model(scripted_model: Any) -> None:
    texts = ["Bob lives in Oslo, a city", "xyz"]
    options = EvaluationOptions(prose=texts)
    before = evaluate(*scripted_model(WAS), EDITS, options=options, progress=False)
    assert before.metrics["prose"] == {}
    same = evaluate(*scripted_model(WAS), EDITS, options=options, unedited=before, progress=False).metrics
    assert (same["prose"]["kl"].value, same["prose"]["agreement"].value) == (0.0, 1.0)
    assert same["perplexity"] == before.metrics["perplexity"]
    now = WAS | {"Bob lives in": " Oslo. A town"}
    m = evaluate(*scripted_model(now), EDITS, options=options, unedited=before, progress=False).metrics["prose"]
    moved = sum(a != b for a, b in zip(" Oslo, a city", " Oslo. A town", strict=True))
    n = len(texts[0]) - 1 + len(texts[1]) - 1
    assert value_and_n(m["agreement"]) == (pytest.approx(1 - moved / n), n)
    assert value_and_n(m["kl"]) == (pytest.approx(moved * 10 * (FIRST - OTHER) / n, rel=1e-4), n)
    loaded = evaluate(*scripted_model(WAS), EDITS, options=options, progress=False)
    loaded = Report(metrics=loaded.metrics, unedited=None, answers=loaded.answers, meta=loaded.meta)
    # A report from a file has no distributions.
    m = evaluate(*scripted_model(now), EDITS, options=options, unedited=loaded, progress=False).metrics
    assert m["prose"]["kl"].n == 0
    assert m["perplexity"].n == n


def test_the_bundled_model_ends_its_answers() -> None:
    report = evaluate(*world.load(), EditDataset.load("world", limit=1), progress=False)
    assert str(report.protocols) == report.meta["settings"]["protocol"] == "exact"
    assert "wild" not in report.metrics["reliability"]
