"""The modes on a model that learns and forgets by a rule that is written here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from modes.teacher import N, Teacher, facts, says
from torch import nn

from kedit_train import run_edits, survey
from kedit_train.callbacks import KLLocality
from kedit_train.data import Edit
from kedit_train.errors import EditError
from kedit_train.evaluation import EvaluationOptions, evaluate
from kedit_train.evaluation.scoring.bootstrap import Score
from kedit_train.evaluation.scoring.capability import CapabilityProbe
from kedit_train.modes import TrainLoop, make_schedule, retention_curve


def test_sequential_evaluates_all_previous_edits(learner: Any) -> None:
    model, tokenizer = learner()
    teacher = Teacher(forgets=3)
    probe = CapabilityProbe([f"L{i}: near{i}" for i in range(N)], prompts=[f"L{i}:" for i in range(N)])
    result = run_edits(
        model,
        tokenizer,
        facts(),
        mode="sequential",
        train=teacher,
        checkpoints=(1, 3, 7),
        capability=probe,
        progress=False,
    )
    assert teacher.calls == [[i] for i in range(N)]
    assert [c.edits for c in result.checkpoints] == [1, 3, 7, N]
    for checkpoint in result.checkpoints:
        t = checkpoint.edits
        knows = [max(0, t - 3) <= i < t for i in range(N)]
        generated = says(knows)
        report = checkpoint.report
        assert {r.edit for r in report.answers} == {str(i) for i in range(t)}
        assert {r.prompt: r.answer for r in report.answers} == {
            p: generated[p].strip() for i in range(t) for p in (f"P{i}:", f"R{i}:", f"L{i}:")
        }
        scores = checkpoint.scores()
        assert scores["reliability"].value == sum(knows) / t
        assert scores["generality"].value == sum(k for k in knows[::2]) / t
        hurt = sum(known and i % 5 == 0 for i, known in enumerate(knows))
        assert scores["locality"].value == (t - hurt) / t
        assert scores["latest"] == Score(1.0, n=1)
        # The capability probe uses the same prompts at every checkpoint.
        assert scores["agreement"].value == pytest.approx(1 - hurt / N)
        assert (scores["agreement"].n, scores["perplexity"].n > N) == (N, True)
        assert report.unedited is not None
        assert report.unedited["reliability"]["generated"].n == t
    curve = result.curve()
    assert [row["edits"] for row in curve] == [1, 3, 7, N]
    assert curve[-1]["reliability"].value == 0.25
    # The sum over all terms equals the difference of the first and the last accuracy.
    accuracy = [min(t, 3) / t for t in range(1, N + 1)]
    steps = [after - before for before, after in pairwise(accuracy)]
    by_hand = sum(steps) / (N - 1)
    found = survey(result)
    assert found.retainability.value == pytest.approx(by_hand) == pytest.approx((0.25 - 1) / 11)
    assert (found.accuracy.value, found.scalability.value, found.portability.n) == (0.25, None, 0)
    assert (found.sources["retainability"], found.sources["scalability"]) == ("sequential", "–")


def test_streaming_replays_previous_edits(learner: Any) -> None:
    teacher = Teacher(forgets=1)
    result = run_edits(
        *learner(), facts(), mode="streaming", train=teacher, edits_per_step=5, checkpoints=(1, 6), progress=False
    )
    assert teacher.calls == [list(range(5)), list(range(10)), list(range(12))]
    assert [c.edits for c in result.checkpoints] == [5, 10, 12]
    assert result.report.metrics["reliability"]["generated"].value == 1.0
    assert result.checkpoints[-1].latest.n == 2
    teacher = Teacher()
    run_edits(*learner(), facts(), mode="streaming", train=teacher, edits_per_step=5, replay=2, seed=7, progress=False)
    assert teacher.calls == [list(r.trained) for r in make_schedule("streaming", N, edits_per_step=5, replay=2, seed=7)]
    assert [len(call) for call in teacher.calls] == [5, 7, 4]
    assert survey(result).sources["retainability"] == "streaming"


def test_single_starts_from_the_unedited_model_each_time(learner: Any) -> None:
    model, tokenizer = learner()
    teacher = Teacher()
    result = run_edits(model, tokenizer, facts(), mode="single", train=teacher, progress=False)
    assert teacher.calls == [[i] for i in range(N)]
    assert all(not found.any() for found in teacher.found)
    assert not model.knows.any()
    assert [c.edits for c in result.checkpoints] == [N]
    metrics = result.report.metrics
    assert metrics["reliability"]["generated"].value == 1.0
    assert metrics["generality"]["generated"].value == 0.5
    assert metrics["locality"]["generated"].value == 9 / 12  # the neighbors of 0, 5 and 10 changed
    assert metrics["locality"]["compared_with"] == "unedited model"
    assert (metrics["perplexity"].n, result.report.meta["n_edits"], result.report.meta["n_probes"]) == (0, N, 3 * N)
    assert result.report.unedited == result.unedited.metrics


def test_results_are_saved_as_json_markdown_and_png(learner: Any, tmp_path: Path) -> None:
    probe = CapabilityProbe(["L0: near0"], prompts=["L0:", "L1:"])
    result = run_edits(
        *learner(), facts(), mode="sequential", train=Teacher(2), checkpoints=(1, 10), capability=probe, progress=False
    )
    data = json.loads(result.save(tmp_path / "new" / "run.json").read_text(encoding="utf-8"))
    assert [step["edits"] for step in data["checkpoints"]] == [1, 10, 12]
    assert data["checkpoints"][1]["metrics"]["reliability"]["generated"]["value"] == 0.2
    assert data["checkpoints"][1]["capability"]["agreement"]["value"] == 1.0
    assert data["checkpoints"][0]["capability"]["agreement"]["value"] == 0.5
    assert len(data["report"]["answers"]) == 3 * N
    assert data["meta"]["mode"] == "sequential"
    text = result.save(tmp_path / "run.md").read_text(encoding="utf-8")
    assert "| edits | reliability | latest | generality | locality | perplexity | kl | agreement | seconds |" in text
    assert "\n| 0 | – |" in text
    assert "\n| 10 | 0.200 (0.00–0.50) | 1.000 |" in text
    survey(result).save(tmp_path / "six.md")
    survey(result).save(tmp_path / "six.json")
    pytest.importorskip("matplotlib")
    assert result.save(tmp_path / "run.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    other = run_edits(*learner(), facts(), mode="batch", train=Teacher(), progress=False)
    both = retention_curve({"one at a time": result, "at once": other}, tmp_path / "both.png")
    assert both.stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "both.png", "new", "run.md", "run.png", "six.json", "six.md"
    ]  # fmt: skip


def test_edits_with_equal_ids_are_told_apart(learner: Any) -> None:
    edits = [Edit(f"P{i}:", f"new{i}", id="same") for i in range(3)]
    seen: list[str] = []

    def train(model: Any, given: Sequence[Edit]) -> None:
        seen.extend(edit.id for edit in given)
        with torch.no_grad():
            model.knows[len(seen) - 1] = 1.0

    result = run_edits(*learner(3), edits, mode="sequential", train=train, progress=False)
    assert seen == ["same", "same (1)", "same (2)"]
    assert result.report.metrics["reliability"]["generated"].n == 3
    assert result.report.metrics["reliability"]["generated"].low is not None


def test_a_checkpoint_compares_with_the_unedited_model_on_the_same_edits(learner: Any) -> None:
    model, tokenizer = learner()
    edits = [Edit(f"P{i}:", f"{'new' if i else 'old'}{i}") for i in range(N)]  # the model knows the first one already
    options = EvaluationOptions(prose=["L0: near0"])
    result = run_edits(
        model, tokenizer, edits, mode="sequential", train=Teacher(), checkpoints=(4,), options=options, progress=False
    )
    fresh = evaluate(*learner(), edits[:4], options=options, progress=False)
    assert result.checkpoints[0].report.unedited == fresh.metrics
    assert fresh.metrics["reliability"]["generated"].value == 0.25


def test_options_and_judge_reach_the_evaluation(learner: Any) -> None:
    options = EvaluationOptions(metrics=["kl", "fluency"])
    result = run_edits(
        *learner(2),
        facts(2),
        mode="sequential",
        train=lambda model, edits: None,
        checkpoints=(1,),
        options=options,
        judge=lambda answer, accepted: answer == "old1",
        progress=False,
    )
    for checkpoint in result.checkpoints:
        metrics = checkpoint.report.metrics
        assert metrics["locality"]["kl"].value == 0.0
        assert metrics["fluency"]["ended"].n == checkpoint.edits
    assert [c.scores()["reliability"].value for c in result.checkpoints] == [0.0, 0.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "together"}, "mode must be one of single, batch, sequential, streaming"),
        ({"mode": "batch", "edits_per_step": 3}, "edits_per_step must be None for mode 'batch'"),
        ({"mode": "single", "edits_per_step": 1}, "edits_per_step must be None for mode 'single'"),
        ({"mode": "sequential", "edits_per_step": 0}, "edits_per_step must be >= 1, got 0"),
        ({"mode": "sequential", "replay": 3}, "only .streaming. replays edits"),
        ({"mode": "streaming", "replay": -1}, "replay must be >= 0"),
        ({"mode": "batch", "options": EvaluationOptions(distributed=True)}, "options.distributed must be False"),
        ({"mode": "sequential", "checkpoints": (0, 3)}, "each value in checkpoints must be an integer >= 1"),
        (
            {"mode": "single", "options": EvaluationOptions(prose=["a b"])},
            "options.prose must be None for mode 'single'",
        ),
        ({"mode": "single", "capability": CapabilityProbe(["a b"])}, "capability must be None for mode 'single'"),
        ({"mode": "batch", "edits": []}, "edits is empty"),
        ({"mode": "batch", "train": lambda model, edits: nn.Linear(1, 1)}, "returned another model"),
    ],
)
def test_wrong_arguments_are_refused(learner: Any, arguments: dict[str, Any], message: str) -> None:
    model, tokenizer = learner()
    arguments = {"edits": facts(), "train": Teacher(), "progress": False} | arguments
    with pytest.raises(EditError, match=message) as error:
        run_edits(model, tokenizer, **arguments)
    assert "\n" not in str(error.value)


def test_single_refuses_sequential_callbacks(learner: Any) -> None:
    model, tokenizer = learner()
    train = TrainLoop(tokenizer, callbacks=[KLLocality(["a b"], sequential=True)])
    with pytest.raises(EditError, match="KLLocality must have sequential=False for mode 'single'"):
        run_edits(model, tokenizer, facts(), mode="single", train=train, progress=False)


def test_a_training_function_may_have_another_attribute_callbacks(learner: Any) -> None:
    class Own(Teacher):
        def callbacks(self) -> None: ...

    model, tokenizer = learner(2)
    assert run_edits(model, tokenizer, facts(2), mode="batch", train=Own(), progress=False).checkpoints


CONTRADICTORY = [*facts(3), Edit("p0:", "newest0", id="newest")]


@pytest.mark.parametrize(
    ("mode", "options", "trained"),
    [
        ("sequential", {}, [["new0"], ["new1"], ["new2"], ["newest0"]]),
        ("sequential", {"edits_per_step": 4}, [["new1", "new2", "newest0"]]),
        ("streaming", {"edits_per_step": 2}, [["new0", "new1"], ["new1", "new2", "newest0"]]),
    ],
)
def test_a_later_edit_may_overwrite_an_earlier_one(learner, mode: Any, options: Any, trained: list[list[str]]) -> None:
    model, tokenizer = learner(3)
    seen: list[list[str]] = []
    options |= {"mode": mode, "progress": False, "train": lambda _, edits: seen.append([e.target for e in edits])}
    with pytest.warns(UserWarning, match="1 of 4 edits contradict an earlier edit") as caught:
        run_edits(model, tokenizer, CONTRADICTORY, **options)
    assert seen == trained
    assert str(caught[0].message) == (
        "run_edits: 1 of 4 edits contradict an earlier edit (the first: 'newest' contradicts '0'). An earlier edit "
        "counts as wrong once the later edit is trained; to leave out the earlier edits, pass edits.latest()."
    )


def test_contradictory_edits_in_one_batch_are_refused_before_the_evaluation(learner) -> None:
    with pytest.raises(
        EditError, match=r"^run_edits: edits: edits 1 \(id '0'\) and 4 \(id 'newest'\) give the prompt 'P0:'"
    ):
        run_edits(*learner(3), CONTRADICTORY, mode="batch", progress=False)


def test_a_result_is_shown_as_html(learner: Any, tmp_path: Path) -> None:
    result = run_edits(
        *learner(), facts(), mode="sequential", train=Teacher(forgets=3), checkpoints=(1, 3), progress=False
    )
    page = result.save(tmp_path / "report.html").read_text(encoding="utf-8")
    shown = result._repr_html_()
    # The page also has the last report, with its answers.
    assert "Did it work?" in page
    assert "Did it work?" not in shown
    for row in result.rows():
        assert all(f">{cell}</t" in shown for cell in row)
    # One curve per score with probes, and one point per checkpoint.
    assert shown.count("<polyline") == 3
    assert shown.count('r="3"') == 3 * len(result.checkpoints)
    low, high = (8 + 178 * (1 - bound) for bound in (result.report.metrics["reliability"]["generated"].low or 0, 1.0))
    assert f'y1="{low:.1f}"' in shown
    assert high == 8
    last = result.report.metrics["reliability"]["generated"].value
    assert repr(result).startswith(f"ModeResult(sequential, 3 checkpoints, Report({N} edits, reliability {last:.3f}, ")
