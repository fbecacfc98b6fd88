"""Split the edits, plan the rounds of successive halving, and pick a setting. No function here needs a model."""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kedit_train.data.visible import fold
from kedit_train.edit import Edit
from kedit_train.errors import EditError
from kedit_train.modes.tuning.settings import RECOMMENDED, TuneSetting

# A setting with at least this reliability is preferred to settings with a lower reliability.
RELIABILITY = 0.95
RULE = f"reliability of at least {RELIABILITY}, then the highest harmonic mean of generality and locality"
# The settings of kedit_default are kept if no other score is higher than theirs by at least this much.
MARGIN = 0.05
# Each rung keeps the best third of the settings, and has three times as many edits as the rung before it.
KEPT = 3
# Scores on fewer edits are too coarse to compare settings.
FEWEST_EDITS = 4
Key = TypeVar("Key", bound=Hashable)
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One round (rung) of successive halving.

    Args:
        settings: number of settings to measure.
        edits: number of edits to train and evaluate. They are the first edits of the tuning half (see
            :func:`split_edits`).
    """

    settings: int
    edits: int


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The scores of one setting. The model was trained and evaluated on the same edits.

    Args:
        setting: the setting.
        edits: number of edits.
        reliability: the reliability. If answers are judged by several protocols, the first protocol is used here and
            for ``generality``. None if the run failed.
        generality: the generality. None if the edits have no rephrases.
        locality: the fraction of the first answer tokens that do not change, as a mean over the locality probes (see
            ``ProbeResult.tokens_kept``). None if there are no probes.
        seconds: time of training and evaluation.
        error: why the run failed. Empty if it did not fail.
    """

    setting: TuneSetting
    edits: int
    reliability: float | None
    generality: float | None = None
    locality: float | None = None
    seconds: float = 0.0
    error: str = ""

    @property
    def score(self) -> float:
        """The harmonic mean of generality and locality. If only one of them was measured, this is its value."""
        values = self._measured
        return len(values) / sum(1 / value for value in values) if values and all(values) else 0.0

    @property
    def mean(self) -> float:
        """The arithmetic mean of generality and locality. :func:`rank` uses it to break ties."""
        return sum(self._measured) / max(1, len(self._measured))

    @property
    def _measured(self) -> list[float]:
        return [value for value in (self.generality, self.locality) if value is not None]

    @property
    def reliable(self) -> bool:
        """Whether the reliability is at least ``RELIABILITY``."""
        return self.reliability is not None and self.reliability >= RELIABILITY


def split_edits(edits: Sequence[Edit], seed: int = 0) -> tuple[list[int], list[int]]:
    """Split edits at random into a tuning half and a held-out half.

    Edits with the same subject are put into the same half. For edits without a subject, the prompt is used instead of
    the subject. Each half is in random order.

    Args:
        edits: the edits.
        seed: seed of the random order.

    Returns:
        The indices of the tuning half and of the held-out half. The halves have about the same size, unless many edits
        have the same subject.

    Raises:
        EditError: all edits are about one subject.

    Example:
        >>> edits = [Edit(f"{name} lives in", "Bern", subject=name) for name in ("Ada", "Ben", "Ada")]
        >>> sorted(map(sorted, split_edits(edits)))
        [[0, 2], [1]]
    """
    groups: dict[str, list[int]] = {}
    for number, edit in enumerate(edits):
        subject = f"subject {edit.subject}" if edit.subject else f"prompt {edit.prompt}"
        groups.setdefault(fold(subject), []).append(number)
    if len(groups) < 2:
        raise EditError(
            f"edits must be about at least two subjects, so that some edits can be held out, got {len(edits)} edits "
            f"about {len(groups)} subject(s); give edits about more subjects."
        )
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)
    halves: tuple[list[int], list[int]] = ([], [])
    for group in shuffled:
        min(halves, key=len).extend(group)
    return halves


def plan_rungs(n_settings: int, n_edits: int) -> list[Rung]:
    """Plan the rounds (rungs) of successive halving.

    The first round tries all settings on few edits. The second round tries the best third of the settings on more
    edits. The last round tries the best ninth on all edits.

    With two or three settings, there are only two rounds, and the last round tries only the best setting. With one
    setting, there is only one round, on all edits. If there are few edits, a round may have the same number of edits as
    the round before it. Such a round is left out.

    Args:
        n_settings: number of settings.
        n_edits: number of edits in the tuning half.

    References:
        Non-stochastic Best Arm Identification and Hyperparameter Optimization (successive halving), arXiv 1502.07943.

    Example:
        >>> [(rung.settings, rung.edits) for rung in plan_rungs(16, 50)]
        [(16, 6), (6, 17), (2, 50)]
        >>> [(rung.settings, rung.edits) for rung in plan_rungs(16, 8)]
        [(16, 4), (2, 8)]
    """
    last = 0 if n_settings == 1 else 1 if n_settings <= KEPT else 2
    rungs: list[Rung] = []
    for number in range(last + 1):
        edits = min(n_edits, max(FEWEST_EDITS, math.ceil(n_edits / KEPT ** (last - number))))
        if not rungs or edits > rungs[-1].edits:
            rungs.append(Rung(settings=math.ceil(n_settings / KEPT**number), edits=edits))
    return rungs


def rank(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials from best to worst.

    Trials with the required reliability (:attr:`Trial.reliable`) come first. They are sorted by the harmonic mean of
    generality and locality. The other trials follow. They are sorted by reliability, then by the harmonic mean. In both
    groups, the arithmetic mean of generality and locality breaks ties. Trials that are still equal keep their order.
    """

    def key(trial: Trial) -> tuple[bool, float, float, float]:
        reliability = -1.0 if trial.reliability is None else trial.reliability
        return trial.reliable, trial.score if trial.reliable else reliability, trial.score, trial.mean

    return sorted(trials, key=key, reverse=True)


def pick(trials: Sequence[Trial]) -> tuple[Trial, str]:
    """Return the best trial and the rule by which it was picked. All trials must be on the same edits.

    The first trial of :func:`rank` is picked, with one exception. If the trial with the setting of the recipe
    ``kedit_default`` is reliable (:attr:`Trial.reliable`), this trial is picked, unless the score of the first trial is
    higher by at least ``MARGIN``. On few edits, smaller differences are often random.

    Args:
        trials: at least one trial.

    Example:
        >>> setting = TuneSetting(layers=0.7, modules="mlp", step_size=0.01, energy=0.9, kl_weight=0.0)
        >>> pick([Trial(setting=setting, edits=4, reliability=0.75)])[1]
        'the most reliable setting, because no setting has a reliability of at least 0.95'
    """
    best = rank(trials)[0]
    default = next((trial for trial in trials if trial.setting == RECOMMENDED), best)
    if best is not default and default.reliable and best.score < default.score + MARGIN:
        reason = f"no other setting has a score that is higher by at least {MARGIN}"
        return default, f"the settings of kedit_default, because {reason}"
    if best.reliable:
        return best, RULE
    return best, f"the most reliable setting, because no setting has a reliability of at least {RELIABILITY}"


def front(trials: Sequence[Trial]) -> list[Trial]:
    """Return the Pareto front: the trials that no other trial beats.

    Only trials on the same number of edits are compared. A trial beats another trial if it is at least as good in
    reliability, generality and locality, and better in one of them.
    """
    return [t for t in trials if t.reliability is not None and not any(_beats(other, t) for other in trials)]


def _beats(one: Trial, other: Trial) -> bool:
    if one.edits != other.edits or one.reliability is None:
        return False
    scores: list[tuple[Any, Any]] = [
        (one.reliability, other.reliability),
        (one.generality, other.generality),
        (one.locality, other.locality),
    ]
    pairs = [(a, b) for a, b in scores if a is not None and b is not None]
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def covering(scopes: Mapping[Key, frozenset[Name]]) -> dict[Key, Key]:
    """Map each scope (a set of weights) to the largest scope that contains it.

    K-FAC factors that were computed for a scope can also be used for all scopes that it contains.

    Args:
        scopes: dict from the key of each scope to the names of its weights. The keys are chosen by the caller.

    Returns:
        A dict from the key of each scope to the key of the largest scope. If no larger scope contains a scope, its key
        is mapped to itself.

    Example:
        >>> covering({"late": frozenset({"b"}), "most": frozenset({"a", "b"})})
        {'late': 'most', 'most': 'most'}
    """
    largest = sorted(scopes, key=lambda key: len(scopes[key]), reverse=True)
    return {key: next(other for other in largest if names <= scopes[other]) for key, names in scopes.items()}
