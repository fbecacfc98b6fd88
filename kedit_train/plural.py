"""Write a number together with its noun."""

from __future__ import annotations


def plural(number: int, noun: str) -> str:
    """Return the number with the noun in the singular or in the plural.

    Example:
        >>> plural(1, "tensor"), plural(2, "tensor")
        ('1 tensor', '2 tensors')
    """
    return f"{number} {noun}{'s' * (number != 1)}"
