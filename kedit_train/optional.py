"""Imports of packages that an installation may lack."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kedit_train.errors import EditError


@contextmanager
def require(package: str, *, extra: str | None = None) -> Iterator[None]:
    """Turn a failed import inside the block into one line that says what to install.

    Args:
        package: the package that is imported, by the name that pip knows.
        extra: the extra of kedit-train that contains it. None: the package is installed on its own.

    Raises:
        EditError: the package, or a package that it needs, is not installed.

    Example:
        >>> with require("no-such-package", extra="trl"):
        ...     import no_such_package
        Traceback (most recent call last):
        ...
        kedit_train.errors.EditError: no-such-package is not installed; install it with pip install 'kedit-train[trl]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        command = f"pip install {package}" if extra is None else f"pip install 'kedit-train[{extra}]'"
        missing = (error.name or "").partition(".")[0]
        if missing == package.replace("-", "_"):
            raise EditError(f"{package} is not installed; install it with {command}") from error
        raise EditError(f"{package} cannot be imported ({error}); install what it needs with {command}") from error
