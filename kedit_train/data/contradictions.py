"""Find edits that cannot be trained together, because they give one prompt two different answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from kedit_train.data.tokenization import shorten
from kedit_train.data.visible import fold, normalize
from kedit_train.edit import Edit
from kedit_train.errors import EditError


def contradict(one: Edit, other: Edit) -> bool:
    """Return whether two edits answer the same prompt, and neither edit accepts the target of the other edit.

    Two edits answer the same prompt if their prompts are equal, or if the prompt of one edit is a rephrase of the other
    edit. An edit accepts its own target and its aliases. The comparison ignores letter case, the amount of white space,
    invisible characters and Unicode forms (NFKC), as :class:`~kedit_train.data.leaks.LeakCheck` does.

    Only whole prompts are compared. For example, the edits "X is" -> "A B" and "X is A" -> "C" do not contradict each
    other. Still, the model cannot learn both of them well: "X is A" is followed by "B" in the first edit, and by "C" in
    the second edit.

    Example:
        >>> contradict(Edit("Ada lives in", "Bern"), Edit("ada lives  in", "Rome"))
        True
        >>> contradict(Edit("Ada lives in", "Bern", rephrases=("Ada's home is",)), Edit("Ada's home is", "Rome"))
        True
        >>> contradict(Edit("Ada lives in", "Bern"), Edit("Ada lives in", "Berne", aliases=("Bern",)))
        False
    """
    return _shared_prompt(one, other) is not None and _differ(one, other)


def _shared_prompt(one: Edit, other: Edit) -> str | None:
    """Return a prompt that the two edits share, in the spelling of one of them, or None if they share no prompt."""
    first, second = fold(one.prompt), fold(other.prompt)
    if first == second or first in map(fold, other.rephrases):
        return one.prompt
    return other.prompt if second in map(fold, one.rephrases) else None


def _differ(one: Edit, other: Edit) -> bool:
    return fold(one.target) not in map(fold, other.answers) and fold(other.target) not in map(fold, one.answers)


class _Answered:
    """An index of edits by their prompts and rephrases. It finds an edit in the index that contradicts a given edit."""

    def __init__(self) -> None:
        self._prompts: dict[str, list[int]] = defaultdict(list)
        self._rephrases: dict[str, list[int]] = defaultdict(list)

    def contradicted(self, edits: Sequence[Edit], i: int) -> int | None:
        """Return the index of an edit that was added and contradicts edit ``i``, or None.

        Edits with the same prompt are tried first, in the order in which they were added.
        """
        prompt = fold(edits[i].prompt)
        same = [self._prompts[prompt], self._rephrases[prompt]]
        same += [self._prompts[fold(rephrase)] for rephrase in edits[i].rephrases]
        return next((j for j in chain(*same) if _differ(edits[j], edits[i])), None)

    def add(self, edits: Sequence[Edit], i: int) -> None:
        """Add edit ``i`` to the index."""
        self._prompts[fold(edits[i].prompt)].append(i)
        for rephrase in edits[i].rephrases:
            self._rephrases[fold(rephrase)].append(i)


def contradictions(edits: Sequence[Edit]) -> list[tuple[int, int]]:
    """Return one pair of indices (earlier, later) for each edit that contradicts an earlier edit.

    If an edit contradicts several earlier edits, its pair contains only one of them. The first edit with the same
    prompt is preferred.
    """
    answered = _Answered()
    pairs = []
    for later in range(len(edits)):
        if (earlier := answered.contradicted(edits, later)) is not None:
            pairs.append((earlier, later))
        answered.add(edits, later)
    return pairs


def numbered(edits: Sequence[Edit], i: int) -> str:
    """Return the number of an edit (counted from 1), with its identifier if it has one, for a message.

    Args:
        edits: the edits.
        i: the index of the edit (counted from 0).
    """
    return f"{i + 1} (id {shorten(edits[i].id)!r})" if edits[i].id else str(i + 1)


def check_contradictions(edits: Sequence[Edit], name: str) -> None:
    """Raise an error if two edits contradict each other, because a model cannot learn both targets in one run.

    Args:
        edits: the edits.
        name: the name of the dataset, for the error message.
    """
    pairs = contradictions(edits)
    if not pairs:
        return
    first, second = (edits[i] for i in pairs[0])
    names = " and ".join(numbered(edits, i) for i in pairs[0])
    more = f". In total, {len(pairs)} edits contradict an earlier edit." if len(pairs) > 1 else ""
    prompt = _shared_prompt(first, second)
    assert prompt is not None
    raise EditError(
        f"{name}: edits {names} give the prompt {shorten(prompt)!r} two targets, {shorten(first.target)!r} and "
        f"{shorten(second.target)!r}, but a prompt must have only one target in a run; remove one of the edits, add "
        "the target of one edit to the aliases of the other, or call latest() on the dataset to keep the last edit of "
        f"each prompt{more}"
    )


def without_overwritten(edits: Sequence[Edit]) -> list[int]:
    """Return the indices of the edits that no later edit contradicts, in order.

    Example:
        >>> without_overwritten([Edit("Ada lives in", "Bern"), Edit("Ada lives in", "Rome")])
        [1]
    """
    answered = _Answered()
    kept = []
    for i in range(len(edits) - 1, -1, -1):
        if answered.contradicted(edits, i) is None:
            kept.append(i)
            answered.add(edits, i)
    return kept[::-1]


def duplicates(edits: Sequence[Edit]) -> list[tuple[int, int]]:
    """Return one pair of indices (first, repeated) for each edit that equals an earlier edit. The ids may differ.

    The comparison of prompts and targets ignores the amount of white space, invisible characters and Unicode forms
    (NFKC), but not letter case.
    """
    first: dict[str, int] = {}
    pairs = []
    for i, edit in enumerate(edits):
        same = replace(edit, id="", prompt=normalize(edit.prompt), target=normalize(edit.target))
        # An edit contains dicts, so it is not hashable, and its repr is the key.
        at = first.setdefault(repr(same), i)
        if at != i:
            pairs.append((at, i))
    return pairs
