"""HTML reports: the same data as the other displays, every text escaped, no scripts, no requests."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kedit_train.data import Edit, Probe
from kedit_train.evaluation import EvaluationOptions, Report, Score, evaluate
from kedit_train.evaluation.reporting.html_report import LONGEST
from kedit_train.evaluation.reporting.layer_drift import drift_by_layer
from kedit_train.evaluation.reporting.report_lines import format_interval, format_number, score_lines
from kedit_train.evaluation.reporting.svg_plots import interval_bar
from kedit_train.evaluation.reporting.word_diff import mark_changes
from kedit_train.evaluation.scoring.weight_drift import BY_TENSOR

ATTACKS = (
    "<script>alert(1)</script>",
    '"><img src="http://evil.example/x.png" onerror="alert(1)">',
    "' onmouseover='alert(1)",
    "</style></title></svg></bdi></table><iframe src=//evil.example>",
    "<!-- &lt;b&gt; ]]> \u202eabc",
)
VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """Records the elements, the attributes and the text of a page, and checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: Counter[str] = Counter()
        self.text, self.open, self.rows = "", list[str](), list[list[str]]()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.update(name for name, _ in attrs)
        self.open += [] if tag in VOID else [tag]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.update(name for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def edits(texts: tuple[str, ...]) -> list[Edit]:
    """One edit per text, which stands in every field that a report shows."""
    return [
        Edit(
            f"Q{i} {text}",
            f"new {text}",
            id=str(i),
            old_target=f"old {text}",
            locality={f"kind {text}": (Probe(f"L{i} {text}", (f"right {text}",)),)},
        )
        for i, text in enumerate(texts)
    ]


def report(scripted_model: Any, texts: tuple[str, ...]) -> Report:
    data = edits(texts)
    old = {edit.prompt: f" {edit.old_target}" for edit in data} | {
        f"L{i} {t}": f" right {t}" for i, t in enumerate(texts)
    }
    new = {edit.prompt: f" {edit.target}" for edit in data} | {f"L{i} {t}": f" wrong {t}" for i, t in enumerate(texts)}
    options = EvaluationOptions(max_new_tokens=150, protocol="exact")
    before = evaluate(*scripted_model(old), data, options=options, progress=False)
    after = evaluate(*scripted_model(new), data, options=options, unedited=before, progress=False)
    names = {f"model.layers.{i}.{text}": {"change": 3.0, "before": 4.0} for i, text in enumerate(texts)}
    meta = {"model": texts[0], "data_name": texts[1], "callbacks": list(texts), BY_TENSOR: names}
    return replace(after, meta={**after.meta, **meta})


@pytest.fixture
def plain(scripted_model: Any) -> Report:
    return report(scripted_model, ("one", "two words", "three", "four", "five"))


def test_no_text_of_a_model_or_of_the_data_becomes_html(scripted_model: Any) -> None:
    attacked = report(scripted_model, ATTACKS)
    # A token is a byte here, and the page has a table with a row per token of the targets.
    lengths = [len(attack.encode()) for attack in ATTACKS]
    harmless = report(scripted_model, tuple(f"{i}{'w' * (length - 1)}" for i, length in enumerate(lengths)))
    for render in (Report.html, Report._repr_html_):
        expected, found = Page(render(harmless)), Page(render(attacked))
        # Word marks depend on the words. All other elements and all attributes are those of a harmless report.
        for marks in ("del", "ins"):
            assert found.tags.pop(marks) >= 1
            expected.tags.pop(marks)
        assert found.tags == expected.tags
        assert found.attributes == expected.attributes
        for attack in ATTACKS:
            assert f"new {attack}" in found.text
            assert f"Q0 {ATTACKS[0]}" in found.text


def test_the_page_needs_no_other_file_and_runs_nothing(plain: Report, tmp_path: Path) -> None:
    text = plain.save(tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert text == plain.html() + "\n"
    assert text.startswith("<!doctype html>")
    assert not {"script", "link", "iframe", "object", "embed", "img", "base", "form", "a"} & page.tags.keys()
    assert not {"src", "href", "srcset", "action"} & page.attributes.keys()
    assert not [name for name in page.attributes if name.startswith("on")]
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert "color-scheme: light dark" in text
    assert 'name="viewport"' in text


def test_the_page_has_the_scores_of_the_other_displays(plain: Report) -> None:
    rows = Page(plain.html()).rows
    for line in score_lines(plain):
        numbers = [line.unedited.value, line.edited.value]
        expected = [*map(format_number, numbers), format_interval(line.basis), str(line.basis.n)]
        assert [line.label, *expected, format_number(line.teacher_forced.value)] in rows
    assert "Did it work?" in plain.html()
    assert ["✓", "Q0 one", "old one", "new one", "new one"] in rows
    assert ["✗", "L1 two words", "right two words", "wrong two words"] in rows
    assert ["callback", "two words"] in rows
    assert "<del>old</del> one" in plain.html()
    assert "<ins>wrong</ins> two words" in plain.html()


def test_long_lists_and_long_texts_are_cut(plain: Report) -> None:
    page = Page(plain.html(answers=2))
    assert "Edits (2 of 5)" in page.text
    assert "3 more answers are in Report.answers" in page.text
    assert "Edits (" not in plain.html(answers=0)
    long = replace(plain.answers[0], answer="x" * 5000, ended=False)
    text = Page(replace(plain, answers=[long, *plain.answers[1:]]).html()).text
    assert "x" * (LONGEST - 1) + "…" in text
    assert "x" * LONGEST not in text


def test_a_report_of_one_model_has_one_column(scripted_model: Any) -> None:
    data = edits(("one",))
    found = evaluate(*scripted_model({"Q0 one": "", "L0 one": " right one"}), data, progress=False)
    rows = Page(found.html()).rows
    assert ["", "prompt", "answer", "target"] in rows
    assert ["✗", "Q0 one", "(empty)", "new one"] in rows
    assert "How far did the weights move?" not in found.html()


def test_the_repr_is_one_line(plain: Report) -> None:
    assert repr(plain) == "Report(5 edits, reliability 1.000, locality 0.000)"
    assert plain._repr_html_().count("<style>") == 1


def words(generator: random.Random) -> str:
    parts = ["Rome", "is", "a", "city,", "<b>", "&amp;", "東京", "é", "  ", "\n", "don't", "'", '"', "3.5"]
    return " ".join(generator.choice(parts) for _ in range(generator.randrange(0, 12)))


@pytest.mark.parametrize("seed", range(30))
def test_marked_texts_are_the_texts(seed: int) -> None:
    generator = random.Random(seed)
    before, after = words(generator), words(generator)
    left, right = mark_changes(before, after)
    assert unescape(re.sub("</?del>", "", left)) == before.strip()
    assert unescape(re.sub("</?ins>", "", right)) == after.strip()
    # What is not marked is the same in both texts, apart from white space.
    kept = [
        re.sub(r"\s", "", re.sub(f"<{tag}>.*?</{tag}>", "", text, flags=re.DOTALL))
        for tag, text in (("del", left), ("ins", right))
    ]
    assert kept[0] == kept[1]
    assert mark_changes(before, before) == (escape(before.strip()),) * 2


def test_words_are_marked_as_a_whole() -> None:
    assert mark_changes("toy piano", "steel guitar") == ("<del>toy piano</del>", "<ins>steel guitar</ins>")
    assert mark_changes("in Paris, France", "in Lyon, France") == (
        "in <del>Paris</del>, France",
        "in <ins>Lyon</ins>, France",
    )
    assert mark_changes("東京です", "大阪です") == ("<del>東京</del>です", "<ins>大阪</ins>です")
    assert mark_changes("", "Bern") == ("", "<ins>Bern</ins>")


def test_the_drift_of_a_layer_is_the_norm_of_its_tensors_together() -> None:
    norms = {
        "lm_head.weight": {"change": 1.0, "before": None},
        "model.layers.10.a.weight": {"change": 3.0, "before": 5.0},
        "model.layers.10.b.weight": {"change": 4.0, "before": 12.0},
        "model.layers.9.a.weight": {"change": 0.5, "before": 2.0},
    }
    found = [(d.label, d.tensors, d.change, d.relative) for d in drift_by_layer(norms)]
    assert found == [("no layer", 1, 1.0, None), ("layer 9", 1, 0.5, 0.25), ("layer 10", 2, 5.0, pytest.approx(5 / 13))]


def test_the_drift_is_shown_per_layer(plain: Report) -> None:
    text = Page(plain.html()).text
    assert "How far did the weights move?" in text
    assert "layer 4" in text
    assert "75.00%" in text
    unknown = {name: {**norms, "before": None} for name, norms in plain.meta[BY_TENSOR].items()}
    text = Page(replace(plain, meta={**plain.meta, BY_TENSOR: unknown}).html()).text
    assert "75.00%" not in text
    assert "Per layer: norm of the change." in text


def test_an_interval_is_drawn_to_scale() -> None:
    svg = interval_bar(Score(0.5, n=4, low=0.25, high=1.0), Score(0.0, n=4))
    # 0 is at x = 4 and 1 at x = 116.
    assert 'x1="32.0" x2="116.0"' in svg
    assert '<circle cx="60.0" cy="5" r="3.5"' in svg
    assert '<circle cx="4.0" cy="5" r="3" fill="none"' in svg
    assert "circle" not in interval_bar(Score(None, n=0), Score(None, n=0))


def test_a_notebook_displays_the_report_that_is_printed(plain: Report, ipython: list[Any], monkeypatch: Any) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    plain.print(answers=1)
    (shown,) = ipython
    assert "Edits (1 of 5)" in shown
