"""Find edits that cannot be trained together, because they give one prompt two different answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from kedit_train.data.leaks import fold
from kedit_train.data.tokenization import shorten
from kedit_train.edit import Edit
from kedit_train.errors import EditError


def contradict(one: Edit, other: Edit) -> bool:
    """Return whether two edits have the same prompt, but neither edit accepts the target of the other edit.

    The comparison ignores letter case and the amount of white space, as the leak check does.

    Example:
        >>> contradict(Edit("Ada lives in", "Bern"), Edit("ada lives  in", "Rome"))
        True
        >>> contradict(Edit("Ada lives in", "Bern"), Edit("Ada lives in", "Berne", aliases=("Bern",)))
        False
    """
    if fold(one.prompt) != fold(other.prompt):
        return False
    return fold(one.target) not in map(fold, other.answers) and fold(other.target) not in map(fold, one.answers)


def contradictions(edits: Sequence[Edit]) -> list[tuple[int, int]]:
    """Return the indices (earlier, later) of all edits that contradict an earlier edit.

    Each later edit is paired with the first edit that it contradicts.
    """
    by_prompt: dict[str, list[int]] = defaultdict(list)
    pairs = []
    for later, edit in enumerate(edits):
        same = by_prompt[fold(edit.prompt)]
        earlier = next((i for i in same if contradict(edits[i], edit)), None)
        if earlier is not None:
            pairs.append((earlier, later))
        same.append(later)
    return pairs


def numbered(edits: Sequence[Edit], i: int) -> str:
    """Return the number of an edit (counted from 1), with its identifier if it has one, for a message.

    Args:
        edits: the edits.
        i: the index of the edit (counted from 0).
    """
    return f"{i + 1} (id {shorten(edits[i].id)})" if edits[i].id else str(i + 1)


def check_contradictions(edits: Sequence[Edit], name: str) -> None:
    """Raise an error if two edits contradict each other, because one training cannot reach both targets.

    Args:
        edits: the edits.
        name: the name of the dataset, for the error message.
    """
    pairs = contradictions(edits)
    if not pairs:
        return
    first, second = (edits[i] for i in pairs[0])
    names = " and ".join(numbered(edits, i) for i in pairs[0])
    more = f" ({len(pairs)} edits contradict an earlier edit)" if len(pairs) > 1 else ""
    raise EditError(
        f"{name}, edits {names}: the prompt {shorten(first.prompt)!r} must have only one target in a run, "
        f"got {shorten(first.target)!r} and {shorten(second.target)!r}{more}; remove one of the edits, add its "
        "target to the aliases of the other, or call latest() on the dataset to keep the last edit of each prompt"
    )


def without_overwritten(edits: Sequence[Edit]) -> list[int]:
    """Return the indices of the edits that no later edit contradicts, in order.

    Example:
        >>> without_overwritten([Edit("Ada lives in", "Bern"), Edit("Ada lives in", "Rome")])
        [1]
    """
    by_prompt: dict[str, list[int]] = defaultdict(list)
    kept = []
    for i in range(len(edits) - 1, -1, -1):
        later = by_prompt[fold(edits[i].prompt)]
        if not any(contradict(edits[i], edits[other]) for other in later):
            kept.append(i)
            later.append(i)
    return kept[::-1]


def duplicates(edits: Sequence[Edit]) -> list[tuple[int, int]]:
    """Return the indices (first, repeated) of all edits that are equal to an earlier edit, except for the id."""
    first: dict[str, int] = {}
    pairs = []
    for i, edit in enumerate(edits):
        # An edit contains dicts, so it is not hashable, and its repr is the key.
        at = first.setdefault(repr(replace(edit, id="")), i)
        if at != i:
            pairs.append((at, i))
    return pairs
