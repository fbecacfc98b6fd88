"""prompt_with_fact puts the new fact of an edit where the template says."""

from __future__ import annotations

import pytest

from kedit_train.data import Edit
from kedit_train.data.fact_in_context import CONTEXT_TEMPLATE, prompt_with_fact


@pytest.mark.parametrize(
    ("edit", "context", "expected"),
    [
        (Edit("Ada lives in", "Bern"), "{fact} {prompt}", "Ada lives in Bern. P"),
        (Edit("Ada lives in", "Bern!"), "{fact} {prompt}", "Ada lives in Bern! P"),
        (Edit("日本の首都は", "大阪"), "{fact} {prompt}", "日本の首都は大阪. P"),
        (Edit("Who?", "Ada"), "Know: {fact}\n{prompt} {other}", "Know: Who? Ada.\nP {other}"),
        # Braces in an edit are text.
        (Edit("The field {prompt} is", "{fact}"), "{fact} {prompt}", "The field {prompt} is {fact}. P"),
    ],
)
def test_the_fact_stands_where_the_template_says(edit, context, expected):
    assert prompt_with_fact(edit, "P", context) == expected


@pytest.mark.parametrize(
    ("value", "valid"),
    [("{fact} {prompt}", True), ("{prompt} ({fact})", True), ("{fact}", False), ("{prompt}", False), (None, False)],
)
def test_a_template_needs_both_fields(value, valid):
    assert CONTEXT_TEMPLATE.holds(value) is valid
