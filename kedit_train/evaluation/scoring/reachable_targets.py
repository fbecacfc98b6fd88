"""Warn about targets that a protocol never counts as right, because it ends the answer inside the target."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from kedit_train.arguments import cut
from kedit_train.edit import Edit
from kedit_train.errors import warn
from kedit_train.evaluation.scoring.probe_results import Judge
from kedit_train.evaluation.scoring.protocols import Protocols, is_right

# Where a protocol ends an answer. The other protocols do not end an answer at a text.
_ENDS = {
    "leading": "first line break",
    "exact": "first line break",
    "wild": "first full stop or line break",
}


def warn_unreachable(edits: Sequence[tuple[str, Edit]], protocols: Protocols, judge: Judge) -> None:
    """Warn for each protocol that does not count an edit as right if the model generates exactly the edit's target.

    Args:
        edits: pairs of a name and an edit.
        protocols: the protocols of the evaluation.
        judge: the function that decides under the protocol "exact".
    """
    for protocol in protocols.names:
        if protocol not in _ENDS:
            continue
        wrong = [
            edit.target
            for _, edit in edits
            if ("\n" in edit.target or "." in edit.target)
            and not is_right(
                protocol, SimpleNamespace(answer=edit.target, accepted=(edit.target, *edit.aliases)), judge
            )
        ]
        if wrong:
            warn(
                f'the protocol "{protocol}" ends each answer at the {_ENDS[protocol]}, so {len(wrong)} of {len(edits)} '
                f"edits never count as right (the first target is {cut(repr(wrong[0]), 100)}); shorten these targets, "
                'or set protocol="contains" in EvaluationOptions.'
            )
