"""YAML that a stranger wrote: every problem is one line, and nothing takes unbounded time."""

from __future__ import annotations

import time

import pytest

from kedit_train.cli.yaml_text import MAX_EXPANDED, InvalidYAML, load_yaml


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("&x [*x]", "the alias at line 1 contains itself"),
        ("a: 1\nb: &x {c: {d: [*x]}}", "the alias at line 2 contains itself"),
        ("a: &x\n  <<: *x", "the alias at line 2 contains itself"),
        ("[" * 60 + "]" * 60, "the text has more than 50 levels at line 1"),
        ("[" * 100_000, ""),
        ("- " * 100_000, ""),
        ("{a: " * 100_000, ""),
        ("a: " + "9" * 101, "the number at line 1 has more than 100 digits"),
        ("a: 0x" + "f" * 101, "the number at line 1 has more than 100 digits"),
        ("a: " + "1:" * 2000 + "1", "the number at line 1 has more than 100 digits"),
        ("a: !!int x", "a value does not fit its type"),
        ("a: !!bool x", "a value does not fit its type"),
        ("a: !!timestamp x", "a value does not fit its type"),
        ("a: 1\nb: [", "while parsing a flow node: did not find expected node content at line 3, column 1"),
        ("a: !!python/object:os.system x", "could not determine a constructor for the tag"),
        ("a: !%0ab x", "could not determine a constructor for the tag '!\\nb'"),
        ("a: !" + "x" * 5000, "could not determine a constructor for the tag"),
        ("--- a\n--- b", "expected a single document in the stream but found another document at line 2, column 1"),
        ("a: *x", "found undefined alias at line 1, column 4"),
        ("? " + ".".join("a" * 50_000) + "\n: 1\nb: [", "while parsing a flow node"),
        ("\n".join(f"a.k{i}: 1" for i in range(10_000)) + "\nb: [", "while parsing a flow node"),
        ("? [a]\n: 1", "found unhashable key"),
        ("{1: }", "a value does not fit its type"),
        ("\x00", "unacceptable character"),
        ("a: 1\nb: 2\na: 3", "the key 'a' is given twice, at line 1 and at line 3; keep only one of them"),
        ("t:\n- x\n- c:\n    k: 1\n    'k': 2", "the key 'k' is given twice, at line 4 and at line 5"),
        ("{a: {}, b: [], a: {}}", "the key 'a' is given twice, at line 1 and at line 1"),
        ("&k a: 1\n*k : 2", "the key 'a' is given twice, at line 1 and at line 2"),
        ("t:\n  c: [1]\n  c+: [2]", "the keys 'c' and 'c+' set the same value, at line 2 and at line 3"),
        ("m.n: 1\nm: {n: 2}", "the keys 'm.n' and 'm' set the same value, at line 1 and at line 2"),
        ("m:\n  n: 2\nm.n: 1", "the keys 'm' and 'm.n' set the same value, at line 1 and at line 3"),
    ],
)
def test_every_problem_is_one_short_line(text: str, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(InvalidYAML) as error:
        load_yaml(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 301
    assert time.monotonic() - began < 2


def test_aliases_may_repeat_values_but_not_without_bound() -> None:
    assert load_yaml("a: &x [1, 2]\nc: {<<: {d: *x}, e: 3}") == {"a": [1, 2], "c": {"d": [1, 2], "e": 3}}
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 30)]
    assert load_yaml("\n".join(levels[:3]))["a2"] == [[["x"] * 8] * 8] * 8
    for text in ("\n".join(levels), "a: &x " + "x" * 5000 + f"\nb: [{', '.join(['*x'] * 100)}]"):
        with pytest.raises(InvalidYAML, match="the aliases expand to more than 100,000 characters"):
            load_yaml(text)
    merged = ["a0: &a0 {k: v}", *(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}], k{i}: v}}" for i in range(1, 40))]
    with pytest.raises(InvalidYAML, match="the aliases expand to more than 100,000 characters"):
        load_yaml("\n".join(merged))


def test_keys_that_differ_and_merged_keys_are_read() -> None:
    text = (
        "a: &x {k: 1, l: &k m}\nb: {<<: *x, k: 2}\nc: {<<: *x, <<: {n: 1}, *k : 3}\nd: [{k: 1}, {k: 1}]\ne.a: 1\ne.b: 2"
    )
    assert load_yaml(text) == {
        "a": {"k": 1, "l": "m"},
        "b": {"k": 2, "l": "m"},
        "c": {"k": 1, "l": "m", "n": 1, "m": 3},
        "d": [{"k": 1}, {"k": 1}],
        "e.a": 1,
        "e.b": 2,
    }


def test_a_long_text_without_aliases_is_read() -> None:
    assert len(load_yaml("a: " + "x" * 2 * MAX_EXPANDED)["a"]) == 2 * MAX_EXPANDED
