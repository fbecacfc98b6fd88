"""Checks of ``EvaluationOptions``."""

from __future__ import annotations

from typing import Any

import pytest

from kedit_train.errors import EditError
from kedit_train.evaluation import EvaluationOptions
from kedit_train.evaluation.options import EXTRA_METRICS


def test_all_means_every_extra_metric():
    assert EvaluationOptions(metrics="all").extra_metrics == set(EXTRA_METRICS)
    assert EvaluationOptions().extra_metrics == frozenset()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"metrics": ["fluncy"]},
            r'metrics must be "all", or a list such as \["kl"\] with names from "prefixes", "format"',
        ),
        ({"metrics": "kl"}, 'metrics must be "all", or a list such as'),
        (
            {"prompt_format": "quiz"},
            'prompt_format must be "plain", "chat", "question" or a ChatFormat, or None, got \'quiz\'',
        ),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
    ],
)
def test_a_wrong_argument_is_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(EditError, match=f"^EvaluationOptions: {message}"):
        EvaluationOptions(**arguments)
