"""Warn about targets with a line break, which some protocols never count as right."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from kedit_train.arguments import cut
from kedit_train.edit import Edit
from kedit_train.errors import warn
from kedit_train.evaluation.scoring.probe_results import Judge
from kedit_train.evaluation.scoring.protocols import Protocols, is_right

# The protocols that end an answer at the first line break.
_FIRST_LINE = ("leading", "exact", "wild")


def warn_unreachable(edits: Sequence[tuple[str, Edit]], protocols: Protocols, judge: Judge) -> None:
    """Warn if a protocol ends answers at a line break and therefore never counts an edit as right.

    There is at most one warning per protocol. The protocol "wild" also ends answers at a full stop. This is part of its
    definition, so there is no warning about full stops.

    Args:
        edits: pairs of a name and an edit.
        protocols: the protocols of the evaluation.
        judge: function that decides under the protocol "exact" whether an answer is right.
    """
    for protocol in (name for name in protocols.names if name in _FIRST_LINE):
        wrong = [edit.target for _, edit in edits if "\n" in edit.target and not is_right(protocol, _own(edit), judge)]
        if wrong:
            warn(
                f'the protocol "{protocol}" ends each answer at the first line break. Therefore, {len(wrong)} of '
                f"{len(edits)} edits never count as right: their targets contain a line break (first target: "
                f"{cut(repr(wrong[0]), 100)}). Remove the line breaks from the targets, or set "
                'protocol="contains" in EvaluationOptions.'
            )


def _own(edit: Edit) -> SimpleNamespace:
    """Return a stand-in for the result of a probe. Its answer is the edit's target."""
    return SimpleNamespace(answer=edit.target, accepted=(edit.target, *edit.aliases))
