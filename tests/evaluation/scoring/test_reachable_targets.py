"""A warning about targets that a protocol never counts as right."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from kedit_train import world
from kedit_train.edit import Edit
from kedit_train.evaluation import EvaluationOptions, evaluate
from kedit_train.evaluation.scoring.normalize import exact_match
from kedit_train.evaluation.scoring.protocols import PROTOCOLS, Protocols
from kedit_train.evaluation.scoring.reachable_targets import warn_unreachable

LINES = Edit("Ada lives in", "Bern\nBasel")
REACHED = (Edit("Ada lives in", "Bern"), Edit("Ada owns", "3.5 cats."), Edit("Ada says", "Yes\n"))
ALIAS = Edit("Ada lives in", "Bern\nBasel", aliases=("Bern",))


def messages(protocol: str, *edits: Edit, judge: Any = exact_match) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_unreachable([(str(i), edit) for i, edit in enumerate(edits)], Protocols.parse(protocol), judge)
    return [str(warning.message) for warning in found]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_target_with_a_line_break_is_a_warning_if_the_protocol_ends_answers_there(protocol: str) -> None:
    found = messages(protocol, *REACHED, LINES, ALIAS)
    if protocol in ("contains", "teacher_forced", "probability"):
        assert found == []
        return
    (message,) = found
    assert f'"{protocol}" ends each answer at the first' in message
    assert "Therefore, 1 of 5 edits never count as right: their targets contain a line break" in message
    assert "(first target: 'Bern\\nBasel')" in message
    assert "\n" not in message


def test_the_full_stop_of_the_protocol_wild_is_no_warning() -> None:
    assert messages("wild,exact,leading", Edit("Ada lives in", "St. Louis"), *REACHED) == []


def test_a_judge_decides_for_itself() -> None:
    assert messages("exact", LINES, judge=lambda answer, accepted: accepted[0].startswith(answer)) == []


def test_evaluate_warns_once_about_the_unedited_model() -> None:
    model, tokenizer = world.load()
    options = EvaluationOptions(protocol="exact", max_new_tokens=2)
    with pytest.warns(UserWarning, match='^evaluate: the protocol "exact" ends each answer'):
        unedited = evaluate(model, tokenizer, [LINES], options=options)
    # Warnings are errors in these tests.
    evaluate(model, tokenizer, [LINES], options=options, unedited=unedited)
