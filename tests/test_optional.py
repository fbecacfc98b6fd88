"""Optional packages: a failed import is one line that says what to install."""

from __future__ import annotations

import pytest

from kedit_train.errors import EditError
from kedit_train.optional import require


def test_a_missing_package_names_the_extra_that_contains_it():
    with (
        pytest.raises(
            EditError, match=r"^no-such is not installed; install it with pip install 'kedit-train\[report\]'$"
        ),
        require("no-such", extra="report"),
    ):
        import no_such  # pyright: ignore[reportMissingImports]  # noqa: F401


def test_a_package_without_extra_is_installed_on_its_own():
    with pytest.raises(EditError, match=r"install it with pip install no_such$"), require("no_such"):
        import no_such.inner  # pyright: ignore[reportMissingImports]  # noqa: F401


def test_a_package_that_lacks_one_of_its_own_is_reported_as_such():
    with pytest.raises(EditError, match=r"^torch cannot be imported \(.*'no_such'\)"), require("torch"):
        import no_such  # pyright: ignore[reportMissingImports]  # noqa: F401


def test_other_errors_pass_through():
    with pytest.raises(ZeroDivisionError), require("torch"):
        _ = 1 / 0
