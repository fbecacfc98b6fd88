"""Rewards that need no reward model. They measure the length of a response, or search it for a pattern or a fact."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from kedit_train.arguments import Rule, check_arguments, cut, integer_from
from kedit_train.data import Edit, EditDataset
from kedit_train.data.leaks import contains_words
from kedit_train.data.tokenization import shorten
from kedit_train.data.visible import fold
from kedit_train.errors import EditError


class Reward:
    """The base class of rewards. A recipe (a YAML file) can use any subclass as its reward.

    Any function ``reward(prompts, completions)`` is also a reward. TRL's ``GRPOTrainer`` calls its reward functions
    with the same argument names.
    """

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Return one number per response: the higher, the better.

        Args:
            prompts: the prompt of each response.
            completions: the responses.
        """
        raise NotImplementedError

    def check(self, prompts: Sequence[str]) -> None:
        """Raise an ``EditError`` if the responses to a prompt cannot be scored. By default, nothing is checked."""


class ShortAnswer(Reward):
    """Reward short responses: 1 for no words, falling linearly to 0 for ``words`` words or more.

    Example:
        >>> ShortAnswer(words=4)(prompts=["How are you?"], completions=["I am fine."])
        [0.25]
    """

    def __init__(self, words: int = 40) -> None:
        check_arguments(self, words=(words, integer_from(1)))
        self.words = words

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        return [max(0.0, 1.0 - len(text.split()) / self.words) for text in completions]


class PatternReward(Reward):
    """Reward responses in which a regular expression is found: 1 if it is found, else 0. Case is ignored.

    Example:
        >>> PatternReward("please|thank you")(prompts=["Hi", "Hi"], completions=["Thank you!", "What?"])
        [1.0, 0.0]
    """

    def __init__(self, pattern: str) -> None:
        check_arguments(self, pattern=(pattern, Rule("a text", lambda given: isinstance(given, str))))
        try:
            self.pattern: re.Pattern[str] = re.compile(pattern, re.IGNORECASE)
        except re.error as error:
            raise EditError(
                f"pattern must be a regular expression, got {cut(repr(pattern), 100)} ({error}).", "PatternReward"
            ) from error

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        return [float(self.pattern.search(text) is not None) for text in completions]


class FactReward(Reward):
    """Reward responses that state the new fact, and responses to locality prompts that keep the old answer.

    A response to the prompt or to a rephrase of an edit gets 1 if it contains the target or an alias of the target. It
    gets -1 if it contains only the old target. A response to a locality prompt gets 1 if it contains one of the answers
    of this prompt. Every other response gets 0. Only whole words count.

    Args:
        edits: a file of edits, or a list of edits.

    Example:
        >>> from kedit_train import world
        >>> edit = world.edits(1)[0]
        >>> FactReward([edit])(prompts=[edit.prompt], completions=[f" {edit.target}."])
        [1.0]
    """

    def __init__(self, edits: str | Path | Sequence[Edit]) -> None:
        if isinstance(edits, str | Path):
            loaded: list[Edit] = list(EditDataset.load(edits))
        else:
            loaded = list(edits) if isinstance(edits, Iterable) else [edits]
        if wrong := [edit for edit in loaded if not isinstance(edit, Edit)]:
            raise EditError(f"edits must be a file or a list of Edit, got {cut(repr(wrong[0]), 80)}.", "FactReward")
        if not loaded:
            raise EditError("edits must not be empty; pass at least one edit.", "FactReward")
        self._good: dict[str, tuple[str, ...]] = {}
        self._bad: dict[str, tuple[str, ...]] = {}
        for edit in loaded:
            for probe in (probe for probes in edit.locality.values() for probe in probes):
                self._good.setdefault(probe.prompt, probe.answers)
        for edit in loaded:
            for prompt in (edit.prompt, *edit.rephrases):
                self._good[prompt] = edit.answers
                self._bad[prompt] = (edit.old_target,) if edit.old_target else ()

    @property
    def prompts(self) -> list[str]:
        """All prompts whose responses this reward can score."""
        return list(self._good)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        self.check(prompts)
        return [self._score(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]

    def check(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            if prompt not in self._good:
                raise EditError(
                    f"the edits must contain {shorten(prompt)!r} as a prompt, a rephrase or a locality prompt; "
                    "add this prompt to the edits, or use another reward.",
                    "FactReward",
                )

    def _score(self, prompt: str, text: str) -> float:
        if _contains(text, self._good[prompt]):
            return 1.0
        return -1.0 if _contains(text, self._bad.get(prompt, ())) else 0.0


def _contains(text: str, answers: Sequence[str]) -> bool:
    return any(contains_words(fold(text), fold(answer)) for answer in answers if fold(answer))


def compute_rewards(
    reward: Callable[..., Sequence[float]], prompts: Sequence[str], completions: Sequence[str]
) -> torch.Tensor:
    """Call a reward, and return its numbers as a tensor [responses] in fp32.

    Raises:
        EditError: the reward raises an error, or does not return one finite number per response.
    """
    try:
        found = reward(prompts=list(prompts), completions=list(completions))
    except EditError:
        raise
    except Exception as error:
        reason = cut(" ".join(str(error).split()), 100)
        raise EditError(
            f"reward must be a function reward(prompts, completions), but it raised {type(error).__name__} ({reason}); "
            "correct the function."
        ) from error
    try:
        rewards = torch.as_tensor([float(value) for value in found], dtype=torch.float32)
    except (TypeError, ValueError):
        rewards = torch.empty(0)
    if len(rewards) != len(completions) or not bool(rewards.isfinite().all()):
        raise EditError(
            f"reward must return {len(completions)} finite numbers, one per response, got {cut(repr(found), 100)}."
        )
    return rewards


def check_reward(reward: Callable[..., Sequence[float]], prompts: Sequence[str], completions: Sequence[str]) -> None:
    """Test a reward before an expensive computation, so that an error of the reward is raised early.

    ``Reward.check`` receives all prompts. The reward itself is called only once, with two responses.

    Args:
        reward: the reward.
        prompts: all prompts whose responses will be scored.
        completions: a response to each prompt. An empty text stands for a response that is not known yet.

    Raises:
        EditError: for the same reasons as in :func:`compute_rewards`, or because the reward cannot score the responses
            to a prompt.
    """
    if isinstance(reward, Reward):
        reward.check(prompts)
    compute_rewards(reward, [*prompts, prompts[0]][:2], [*completions, completions[0]][:2])
