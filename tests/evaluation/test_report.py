"""Reports: saving, loading, and the terminal and Markdown tables."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress
from tqdm import tqdm

from kedit_train.data import Edit, Probe
from kedit_train.errors import EditError
from kedit_train.evaluation import EvaluationOptions, Report, Score, evaluate
from kedit_train.evaluation.reporting.report_lines import format_interval

EDIT = Edit(
    "Ann lives in",
    "Köln",
    old_target="Rome",
    rephrases=("Ann's town:",),
    locality={
        "near": (Probe("Bob lives in", ("Oslo",)),),
        "far [bold]": (Probe("Cyd lives in", ("Lima",)), Probe("Say:", ())),
    },
    portability={"hop": (Probe("Say:", ()),)},
)
OLD = {"Ann lives in": " Rome", "Ann's town:": " Rome", "Bob lives in": " Oslo", "Cyd lives in": " Lima", "Say:": " hi"}


@pytest.fixture
def report(scripted_model: Any) -> Report:
    before = evaluate(*scripted_model(OLD), [EDIT], progress=False)
    new = OLD | {"Ann lives in": " Köln", "Bob lives in": " [bold]Köln[/bold]"}
    return evaluate(*scripted_model(new), [EDIT], unedited=before, progress=False)


def test_a_saved_report_can_be_loaded(report: Report, tmp_path: Path) -> None:
    path = report.save(tmp_path / "new" / "report.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["metrics"]["reliability"]["generated"] == {"value": 1.0, "n": 1, "low": None, "high": None}
    assert data["metrics"]["portability"]["generated"] == {"value": None, "n": 0, "low": None, "high": None}
    assert data["metrics"]["locality"]["compared_with"] == "unedited model"
    assert data["unedited"]["reliability"]["generated"]["value"] == 0.0
    assert {"n_edits", "data_name", "data_hash", "seed", "date", "seconds", "model", "settings"} <= data["meta"].keys()
    assert {"torch", "transformers", "kedit_train"} == data["meta"]["versions"].keys()
    loaded = Report.load(path)
    assert loaded == report
    assert loaded.to_dict() == report.to_dict() == data
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]


def test_a_loaded_report_can_be_used_as_the_unedited_one(report: Report, scripted_model: Any, tmp_path: Path) -> None:
    path = evaluate(*scripted_model(OLD), [EDIT], progress=False).save(tmp_path / "before.json")
    again = evaluate(*scripted_model(OLD), [EDIT], unedited=Report.load(path), progress=False)
    assert again.metrics["locality"]["generated"].value == 1.0
    assert again.metrics["locality"]["generated"].n == 3


def test_a_report_is_a_dataclass_of_its_own() -> None:
    """Type checkers and ``dataclasses.replace`` then know the arguments of ``Report``."""
    assert "__dataclass_params__" in vars(Report)
    assert Report.__dataclass_params__.frozen  # type: ignore[attr-defined]


def test_a_failed_save_leaves_the_old_file(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = report.save(tmp_path / "report.json")
    whole = path.read_bytes()

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        report.save(path)
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"metrics": {}}', "null", '{"metrics":{},"unedited":null,"answers":[1]}']
)
def test_a_file_that_is_not_a_report_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(EditError, match=r"other\.json is not an evaluation report"):
        Report.load(path)


def test_names_of_the_flat_scores(report: Report) -> None:
    flat = report.flat()
    assert flat["edit/reliability"] == 1.0
    assert flat["edit/generality"] == 0.0
    assert flat["edit/locality"] == pytest.approx(2 / 3)
    assert flat["edit/locality/near"] == 0.0
    assert flat["edit/locality_kept_right"] == 0.5
    assert flat["edit/locality_right"] == 0.5
    assert "edit/portability" not in flat
    assert "edit/portability/hop" not in flat
    assert all(isinstance(value, float) for value in flat.values())
    assert report.flat("").keys() == {name.removeprefix("edit/") for name in flat}


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_terminal_table_fits_any_width(report: Report, width: int) -> None:
    out = io.StringIO()
    report.print(Console(file=out, width=width))
    text = out.getvalue()
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= width
    row = next(line for line in text.splitlines() if line.strip().startswith("reliability")).split()
    assert row == ["reliability", "0.000", "1.000", "–", "1", "1.000"]
    row = next(line for line in text.splitlines() if line.strip().startswith("portability")).split()
    assert row == ["portability", "–", "–", "–", "0", "–"]
    for expected in ("unedited", "edited", "locality:", "unchanged", "far [bold]", "Köln", "Rome", "[bold]Köln"):
        assert expected in text
    assert "portability: 1 probes have no accepted answer" in " ".join(text.split())


def test_the_table_of_one_model_has_one_column(scripted_model: Any) -> None:
    out = io.StringIO()
    evaluate(*scripted_model(OLD), [EDIT], progress=False).print(Console(file=out, width=80), answers=0)
    assert "unedited" not in out.getvalue()
    assert "locality: right" in out.getvalue()
    assert "Edits (" not in out.getvalue()


def test_markdown_shows_the_same_scores_and_escapes_cells(scripted_model: Any, tmp_path: Path) -> None:
    edits = [replace(EDIT, id="a"), Edit("Say:", "x | y", id="b")]
    before = evaluate(*scripted_model(OLD), edits, options=EvaluationOptions(metrics="all"), progress=False)
    new = OLD | {"Ann lives in": " Köln", "Bob lives in": " [bold]Köln[/bold]", "Say:": " a_b"}
    options = EvaluationOptions(metrics="all", prose=["ab"])
    found = evaluate(*scripted_model(new), edits, unedited=before, options=options, progress=False)
    text = found.save(tmp_path / "report.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines()]
    (reliability,) = [row for row in rows if row[0] == "| reliability"]
    assert reliability[1:5] == ["0.000", "0.500", "0.00–1.00", "2"]
    assert ["| old answer generated", "1.000", "0.000", "–", "1", "– |"] in rows
    # A text with a vertical bar stays in one cell, and Markdown characters are escaped.
    assert ["| Say:", "hi", "a\\_b", "x \\| y", "no |"] in rows
    assert "\\[bold\\]Köln\\[/bold\\]" in text
    assert "## Targets of the edits, token by token" in text
    assert f"SHA-256 `{found.meta['data_hash']}`" in text
    assert "- seed: 0" in text
    widths = {line.count(" | ") for line in text.split("\n\n")[3].splitlines() if not line.startswith("|-")}
    assert widths == {5}
    assert text.rstrip("\n") == found.markdown()


def test_rephrased_prompts_without_the_new_answer_are_listed(report: Report, scripted_model: Any) -> None:
    out = io.StringIO()
    report.print(Console(file=out, width=120))
    title = "Rephrased prompts without the new answer"
    for text in (out.getvalue(), report.markdown(), report.html()):
        assert f"{title} (1 of 1)" in text
    assert "| Ann's town: | Rome | Rome | Köln | no |" in report.markdown()
    learned = evaluate(*scripted_model(OLD | {"Ann's town:": " Köln"}), [EDIT], progress=False)
    assert title not in learned.markdown()


def test_the_terminal_table_says_where_further_answers_are(scripted_model: Any) -> None:
    found = evaluate(*scripted_model(OLD), [replace(EDIT, id=str(i)) for i in range(14)], progress=False)
    for options, shown in (({}, 12), ({"answers": 14}, 14)):
        out = io.StringIO()
        found.print(Console(file=out, width=120), **options)
        assert f"Edits ({shown} of 14)" in out.getvalue()
        assert ("2 more answers are in Report.answers" in out.getvalue()) == (shown == 12)


def test_answers_cut_at_the_limit_have_a_line(scripted_model: Any) -> None:
    out = io.StringIO()
    found = evaluate(
        *scripted_model({"Q:": " a"}, endless={"P:": " la"}),
        [Edit("Q:", "a"), Edit("P:", "b")],
        options=EvaluationOptions(protocol="exact"),
        progress=False,
    )
    found.print(Console(file=out, width=100))
    (row,) = [line for line in out.getvalue().splitlines() if line.strip().startswith("answers cut at the limit")]
    assert row.split() == ["answers", "cut", "at", "the", "limit", "0.500", "0.00–1.00", "2", "–"]


def test_the_table_starts_on_a_new_line_while_a_progress_bar_is_shown(
    report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    report.print()
    title = capsys.readouterr().out.splitlines()[0]
    assert title.startswith("Did it work? 1 edit, ")
    with tqdm(total=2, file=sys.stdout, desc="Epoch 0") as shown:
        shown.update(1)
        report.print()
        lines = capsys.readouterr().out.splitlines()
        assert title in lines
        assert any("Epoch 0" in line for line in lines)
    with Progress(console=Console(force_terminal=True, width=100)) as progress:
        progress.add_task("Epoch 0", total=2)
        report.print()
    # The progress bar is cleared first, and drawn again below the table.
    out = capsys.readouterr().out
    assert re.search(r"\r\x1b\[2K" + re.escape(title) + r" *\n", out)
    assert out.rindex("Epoch 0") > out.rindex("generated:")


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (0.0, 0.0, "0.00–0.00"),
        (0.0, 0.5, "0.00–0.50"),
        (0.0021, 0.0034, "0.0021–0.0034"),
        (0.0072, 0.0113, "0.0072–0.011"),
        (0.0, 3e-6, "0–3e-06"),
        (-0.05, 0.02, "-0.05 to 0.02"),
        (215.4, 393.2, "215–393"),
        (None, None, "–"),
    ],
)
def test_an_interval_has_as_many_digits_as_its_size_needs(low: float | None, high: float | None, shown: str) -> None:
    assert format_interval(Score(0.0, n=2, low=low, high=high)) == shown


def test_the_title_says_that_only_a_sample_was_evaluated(scripted_model: Any) -> None:
    out = io.StringIO()
    edits = [replace(EDIT, id=str(i)) for i in range(3)]
    evaluate(*scripted_model(OLD), edits, limit=2, progress=False).print(Console(file=out, width=80), answers=0)
    assert "a sample of 2 of 3 edits, " in out.getvalue()
