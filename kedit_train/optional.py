"""Import optional packages, with an error that says what to install."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kedit_train.errors import EditError


@contextmanager
def require(package: str, *, extra: str | None = None) -> Iterator[None]:
    """Context manager: turn a failed import in the ``with`` block into an error that says what to install.

    Args:
        package: the pip name of the package that the block imports.
        extra: the extra of kedit-train that installs the package, such as "trl". The error contains the command that
            installs this extra. If ``extra`` is None, the error contains the command that installs ``package``.

    Raises:
        EditError: the package or one of its dependencies is not installed.

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
        raise EditError(f"{package} cannot be imported ({error}); install its dependencies with {command}") from error
