"""What differs between the installed versions of other packages, for the tests."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version


def older(package: str, needed: str) -> bool:
    """Return whether the installed version of a package is older than the given one."""
    return Version(version(package)) < Version(needed)


def needs(package: str, needed: str) -> pytest.MarkDecorator:
    """Skip a test if the installed version of a package is older than the given one."""
    return pytest.mark.skipif(older(package, needed), reason=f"needs {package} {needed} or later")


# The name of the key-value cache in the arguments and the outputs of models.
CACHE = "past_key_values" if older("transformers", "5.24") else "cache"
