"""Marks for tests that need a newer version of a package than the oldest one that kedit-train supports."""

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
