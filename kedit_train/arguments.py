"""Check constructor arguments, with the same wording in every error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from kedit_train.errors import EditError

T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """A condition on an argument.

    Args:
        expected: completes the sentence "<argument> must be ...".
        holds: returns True for a valid value. A ``TypeError`` counts as False.
    """

    expected: str
    holds: Callable[[Any], bool]


def check_arguments(component: object, **arguments: tuple[Any, Rule]) -> None:
    """Raise an :class:`EditError` for the first argument that breaks its rule.

    Args:
        component: the object whose arguments are checked, or a name. The error message starts with the class name of
            the object, or with the given name.
        arguments: the arguments to check, as keyword arguments. Each keyword argument is a tuple ``(value, rule)``.

    Raises:
        EditError: an argument breaks its rule. An example of the message is
            ``StopWhenEdited: loss must be > 0, got -1.``

    Example:
        >>> check_arguments("NormBall", radius=(0.5, above(0)), norm=("l2", one_of(("l2", "linf"))))
    """
    name = component if isinstance(component, str) else type(component).__name__
    for argument, (value, rule) in arguments.items():
        try:
            valid = rule.holds(value)
        except TypeError:
            valid = False
        if not valid:
            # The bound alone does not say what is wrong with an infinite number.
            infinite = isinstance(value, float) and math.isinf(value) and rule.expected.startswith(">")
            expected = f"finite and {rule.expected}" if infinite else rule.expected
            # In Python, True > 0 holds. A text such as '0.1' looks like a valid value.
            if isinstance(value, bool | str) and expected.startswith((">", "finite", "in ")):
                expected = f"a number {expected}"
            raise EditError(f"{argument} must be {expected}, got {cut(repr(value))}.", component=name)


def cut(text: str, width: int = 300) -> str:
    """Shorten a text for a message to at most ``width`` characters, by leaving out its middle.

    Example:
        >>> cut("abcdefghijklmnopqrstuvwxyz", 15)
        'abcdefg ... yz'
    """
    half = width // 2
    return text if len(text) <= width else f"{text[:half]} ... {text[len(text) - half + 5 :]}"


def from_mapping(kind: type[T], values: Mapping[str, Any]) -> T:
    """Create a dataclass instance from a mapping of arguments, for example from a section of a YAML file.

    Args:
        kind: the dataclass.
        values: a mapping from argument name to value.

    Raises:
        EditError: a key is not an argument of ``kind``.
    """
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if unknown := [name for name in values if name not in known]:
        raise EditError(
            f"unknown argument {cut(repr(unknown[0]))}; use only {', '.join(known)}.", component=kind.__name__
        )
    return kind(**values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def above(bound: float) -> Rule:
    """Return a rule that accepts finite numbers greater than ``bound``."""
    return Rule(f"> {bound:g}", lambda value: _is_number(value) and value > bound)


def at_least(bound: float) -> Rule:
    """Return a rule that accepts finite numbers greater than or equal to ``bound``."""
    return Rule(f">= {bound:g}", lambda value: _is_number(value) and value >= bound)


def integer_from(bound: int) -> Rule:
    """Return a rule that accepts integers greater than or equal to ``bound``."""
    return Rule(f"an integer >= {bound}", lambda value: _is_integer(value) and value >= bound)


def within(interval: str) -> Rule:
    """Return a rule that accepts numbers in an interval such as ``"[0, 1]"``, ``"(0, 1]"`` or ``"(0, 1)"``."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))

    def holds(value: Any) -> bool:
        above_low = value >= low if interval[0] == "[" else value > low
        return _is_number(value) and above_low and (value <= high if interval[-1] == "]" else value < high)

    return Rule(f"in {interval}", holds)


def one_of(choices: Iterable[Any]) -> Rule:
    """Return a rule that accepts the listed values."""
    listed = tuple(choices)
    shown = [f'"{choice}"' if isinstance(choice, str) else repr(choice) for choice in listed]
    expected = shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"
    return Rule(expected, lambda value: any(type(value) is type(choice) and value == choice for choice in listed))


def optional(rule: Rule) -> Rule:
    """Return a rule that accepts None and everything that ``rule`` accepts."""
    return Rule(f"{rule.expected}, or None", lambda value: value is None or rule.holds(value))


BOOLEAN = one_of((True, False))
