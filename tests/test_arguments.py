"""The rules of constructor arguments."""

from __future__ import annotations

from typing import Any

import pytest

from kedit_train.arguments import check_arguments, integer_from, optional
from kedit_train.errors import EditError


@pytest.mark.parametrize("value", [2.0, 2.5, True, False, float("nan"), float("inf"), "2", None, [2], 0])
def test_an_integer_is_an_int_in_its_range(value: Any) -> None:
    with pytest.raises(EditError) as error:
        check_arguments("Example", steps=(value, integer_from(1)))
    assert str(error.value) == f"Example: steps must be an integer >= 1, got {value!r}."


@pytest.mark.parametrize("value", [1, 2, pytest.param(10**400, id="huge")])
def test_an_int_is_accepted(value: int) -> None:
    check_arguments("Example", steps=(value, integer_from(1)), limit=(None, optional(integer_from(1))))
