"""Protocols: the rules that decide whether an answer is right, and whether the edit changed it.

A protocol defines how many tokens are generated, where an answer ends, and how the answer is compared:

- ``leading``: the generated text begins with an accepted answer, followed by a word boundary. Use it for completions of
  a model that does not end its answers. Benchmarks of completions usually judge portability and locality in this way.
- ``exact``: the whole answer, until the model ends it, equals an accepted answer after normalization.
- ``contains``: the first ``max_new_tokens`` tokens contain an accepted answer. Use it for chats.
- ``wild``: the text before the first full stop or line break equals an accepted answer after normalization (Yang et
  al., "The Mirage of Model Editing", arXiv 2502.11177, with 50 tokens; "Fine-tuning Done Right in Model Editing",
  arXiv 2509.22072, with 32 tokens).
- ``teacher_forced``: the fraction of the answer's tokens that the model ranks first when it is given all earlier tokens
  (Wang et al., "EasyEdit", arXiv 2308.07269).
- ``probability``: the edit's new answer is more probable per token than the old answer. For a locality probe, which
  asks about another fact, the true answer is more probable per token than the edit's new answer (Meng et al., "Locating
  and Editing Factual Associations in GPT", arXiv 2202.05262).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kedit_train.evaluation.scoring.normalize import contains, exact_match, normalize

Protocol = Literal["leading", "exact", "contains", "wild", "teacher_forced", "probability"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)

# Protocols that judge a whole answer, of up to ``max_new_tokens`` tokens. All other protocols need only the first
# tokens.
_WHOLE_ANSWER = {"exact", "contains", "wild"}
# Number of tokens that are generated in addition to the length of the longest accepted answer. They leave room for an
# article, and show whether the last word of an answer goes on.
MARGIN = 3
# If locality compares the first tokens of two answers, it compares at least this many tokens.
MINIMUM_KEPT = 3
# The number that is stored for the end of an answer among its first tokens. Different tokens can end an answer, and
# this number stands for all of them.
END = -1
# A hyphen, a dash, an apostrophe or a slash between two letters is a word boundary, as in "Paris-based" and "Paris's".
_INNER_BOUNDARY = re.compile(r"(?<=[^\W\d_])['\u2019/\u2010-\u2015-](?=[^\W\d_])")


@dataclass(frozen=True)
class Protocols:
    """The protocols of one evaluation.

    Args:
        names: the protocols. The first one gives the headline scores.
        reason: why these protocols were chosen. Reports show it after the words "chosen because". Empty if the user
            chose the protocols.
    """

    names: tuple[Protocol, ...] = ("exact",)
    reason: str = ""

    @classmethod
    def parse(cls, text: str) -> Protocols:
        """Parse the names of protocols, separated by commas, such as "leading" or "leading,wild"."""
        return cls(tuple(text.split(",")))  # type: ignore[arg-type]

    def __str__(self) -> str:
        return ",".join(self.names)

    @property
    def headline(self) -> Protocol:
        """The first protocol, which gives the headline scores of a report."""
        return self.names[0]

    @property
    def whole_answers(self) -> bool:
        """True if whole answers are generated (up to ``max_new_tokens`` tokens), False if their beginning is enough."""
        return bool(_WHOLE_ANSWER & set(self.names))

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer, in addition to end-of-text.

        All protocols judge the same generated text. Generation therefore stops only where no protocol needs more text.
        """
        if "contains" in self.names:
            return ()
        return ("\n", ".") if "wild" in self.names and not {"leading", "exact"} & set(self.names) else ("\n",)


# The protocol of models that end their answers.
EXACT = Protocols()


def starts_with(answer: str, accepted: Sequence[str]) -> bool:
    """Return True if ``answer`` begins with one of the ``accepted`` answers, followed by a word boundary.

    All answers are normalized first. A hyphen or an apostrophe between two letters is a word boundary too.

    Args:
        answer: the generated text.
        accepted: the answers that count as right.

    Example:
        >>> starts_with("Paris, the capital", ["Paris"]), starts_with("Parisian", ["Paris"]), starts_with("3.5", ["3"])
        (True, False, False)
    """
    text = _words(answer)
    return any(other and f"{text} ".startswith(f"{other} ") for other in map(_words, accepted))


def _words(text: str) -> str:
    return normalize(_INNER_BOUNDARY.sub(" ", text))


def first_line(answer: str) -> str:
    """Return the answer up to the first line break."""
    return answer.split("\n", 1)[0].strip()


def wild_answer(answer: str) -> str:
    """Return the answer up to the first full stop or line break."""
    return first_line(answer).split(".", 1)[0].strip()


def is_right(protocol: str, result: Any, judge: Callable[[str, Sequence[str]], bool] = exact_match) -> bool | None:
    """Return whether a probe counts as right. None if the probe cannot be judged.

    Args:
        protocol: the name of the protocol.
        result: a :class:`~kedit_train.evaluation.scoring.probe_results.ProbeResult`.
        judge: function that decides under the protocol "exact" whether an answer is right.
    """
    if protocol == "probability":
        own, rival = result.log_prob, result.rival_log_prob
        return None if own is None or rival is None else own > rival
    if not result.accepted:
        return None
    if protocol == "teacher_forced":
        return all(result.tokens_right) if result.tokens_right else None
    if protocol == "contains":
        return contains(result.answer, result.accepted)
    if protocol == "leading":
        return starts_with(first_line(result.answer), result.accepted)
    if protocol == "wild":
        return exact_match(wild_answer(result.answer), result.accepted)
    return bool(judge(first_line(result.answer), result.accepted))


def is_unchanged(protocol: str, result: Any) -> bool:
    """Return whether an answer is the unedited model's answer to the same prompt.

    The protocol decides what must be equal for both models:

    - "exact": the first line of the answer, after normalization;
    - "wild": the text before the first full stop or line break, after normalization;
    - "teacher_forced": the token that the model ranks first at each position of the preferred answer. If the probe has
      no preferred answer, the rule of "leading" applies;
    - "leading", "contains" and "probability": the first generated tokens. Their number is the length of the preferred
      answer in tokens, but at least 3. If ``result`` does not contain these tokens, the rule of "exact" applies.

    Args:
        protocol: the name of the protocol.
        result: a :class:`~kedit_train.evaluation.scoring.probe_results.ProbeResult` with the unedited model's answer.
    """
    if protocol == "wild":
        return normalize(wild_answer(result.before)) == normalize(wild_answer(result.answer))
    if protocol == "teacher_forced" and result.choices_kept is not None:
        return result.choices_kept == 1
    if protocol != "exact" and result.tokens_kept is not None:
        return result.tokens_kept == 1
    return normalize(first_line(result.before)) == normalize(first_line(result.answer))


def share_kept(before: Sequence[int], after: Sequence[int]) -> float | None:
    """Return the fraction of tokens in ``before`` that precede the first difference between ``before`` and ``after``.

    Args:
        before: the first tokens of the unedited model's answer.
        after: the first tokens of the edited model's answer.
    """
    if not before:
        return None
    kept = 0
    while kept < min(len(before), len(after)) and before[kept] == after[kept]:
        kept += 1
    return kept / len(before)


def agreement(before: Sequence[int], after: Sequence[int]) -> float | None:
    """Return the fraction of positions at which both models rank the same token first (the locality of EasyEdit)."""
    if not before or len(before) != len(after):
        return None
    return sum(a == b for a, b in zip(before, after, strict=True)) / len(before)
