"""Multiple-choice items for four general abilities: arithmetic, grammar, copying and reading.

The items are made from templates, so they need no dataset and no network. They are easy, because small models
should pass many of them before an edit. Their purpose is to show what an edit destroys, and not to rank models.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from kedit_train.evaluation.asking.teacher_forced import teacher_forced
from kedit_train.evaluation.scoring.bootstrap import Score, mean_score

ITEMS = 60
CHOICES = 4
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Helen", "Jack", "Laura", "Martin", "Nora", "Peter")
THINGS = ("book", "key", "letter", "coin", "ring", "phone", "pen", "watch", "map", "ticket", "photo", "knife")
PLACES = ("box", "bag", "drawer", "car", "kitchen", "garden", "basket", "cupboard", "office", "pocket")
WORDS = ("river", "apple", "stone", "lamp", "horse", "window", "paper", "cloud", "bread", "chair", "road", "snow")
# Singular and plural.
VERBS = (("is", "are"), ("was", "were"))
ADJECTIVES = ("old", "new", "small", "heavy", "red", "clean")
STARTS_WITH_VOWEL = ("apple", "egg", "orange", "umbrella", "island", "engine")
STARTS_WITH_CONSONANT = ("book", "car", "tree", "house", "lamp", "dog")
# The past form that is right after "yesterday", and a form that is wrong there.
PAST = (
    ("went home.", "go home."), ("ate bread.", "eat bread."), ("wrote a letter.", "write a letter."),
    ("came late.", "come late."), ("saw the river.", "see the river."), ("took the car.", "take the car."),
)  # fmt: skip
MEN, WOMEN = ("David", "Frank", "Jack", "Peter"), ("Anna", "Clara", "Emma", "Helen")


@dataclass(frozen=True)
class AbilityItem:
    """A prompt with one right and several wrong continuations.

    Args:
        ability: "arithmetic", "grammar", "copying" or "reading".
        prompt: what the model reads.
        choices: the continuations. The first one is right.
    """

    ability: str
    prompt: str
    choices: tuple[str, ...]


def ability_items(count: int = ITEMS, seed: int = 0) -> list[AbilityItem]:
    """Return ``count`` different items for each of the four abilities. Equal seeds give equal items.

    Example:
        >>> from kedit_train.evaluation.scoring.abilities import ability_items
        >>> items = ability_items(count=2)
        >>> [item.ability for item in items]
        ['arithmetic', 'arithmetic', 'grammar', 'grammar', 'copying', 'copying', 'reading', 'reading']
        >>> len(items[0].choices)
        4
    """
    return [AbilityItem(name, *item) for name, make in _MAKERS.items() for item in _distinct(name, make, count, seed)]


def ability_scores(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[AbilityItem],
    *,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Score]:
    """Return the fraction of right choices for each ability.

    The model's choice is the most probable continuation of the prompt. If the right continuation and a wrong one are
    equally probable, the item counts as wrong.

    Args:
        model: a causal language model. It is left unchanged.
        tokenizer: the model's tokenizer.
        items: the items. :func:`ability_items` returns built-in items.
        batch_size: choices per forward pass.
        seed: seed of the bootstrap.
        progress: show a progress bar in a terminal.

    Returns:
        A dict from "ability/<name>" to score, with a 95 % bootstrap interval over the items. Random guesses reach 0.5
        in grammar and 0.25 in the other abilities.
    """
    pairs = [(item.prompt, choice) for item in items for choice in item.choices]
    results = iter(teacher_forced(model, tokenizer, pairs, batch_size=batch_size, progress=progress))
    right: dict[str, list[bool]] = {}
    for item in items:
        first, *others = (sum(next(results).log_probs) for _ in item.choices)
        right.setdefault(item.ability, []).append(first > max(others))
    return {f"ability/{name}": mean_score(values, seed) for name, values in right.items()}


Made = tuple[str, tuple[str, ...]]


def _distinct(name: str, make: Callable[[random.Random], Made], count: int, seed: int) -> list[Made]:
    draw = random.Random(f"{name} {seed}")
    made: dict[Made, None] = {}
    while len(made) < count:
        made.setdefault(make(draw))
    return list(made)


def _arithmetic(draw: random.Random) -> Made:
    solved = [_sum(draw) for _ in range(3)]
    question, result = _sum(draw)
    wrong = draw.sample([n for n in range(max(0, result - 5), result + 6) if n != result], CHOICES - 1)
    shown = [f"{text} {value}" for text, value in solved]
    return "\n".join([*shown, question]), tuple(str(value) for value in (result, *wrong))


def _sum(draw: random.Random) -> tuple[str, int]:
    first, second = draw.randint(1, 20), draw.randint(1, 9)
    if draw.random() < 0.5:
        return f"{first} + {second} =", first + second
    return f"{first + second} - {second} =", first


def _grammar(draw: random.Random) -> Made:
    thing, other = draw.sample(THINGS[:7], 2)
    adjective = draw.choice(ADJECTIVES)
    kind = draw.randrange(5)
    if kind == 0:
        # The verb agrees with the first noun, and not with the noun before the verb.
        one, several = draw.choice(VERBS)
        plural = draw.random() < 0.5
        subject, near = (f"{thing}s", other) if plural else (thing, f"{other}s")
        forms = (several, one) if plural else (one, several)
        return f"The {subject} near the {near}", tuple(f"{form} {adjective}." for form in forms)
    if kind == 1:
        number = draw.choice(("two", "three", "four", "many"))
        return f"{draw.choice(NAMES)} bought {number} {adjective}", (f"{thing}s.", f"{thing}.")
    if kind == 2:
        vowel = draw.random() < 0.5
        noun = draw.choice(STARTS_WITH_VOWEL if vowel else STARTS_WITH_CONSONANT)
        articles = ("an", "a") if vowel else ("a", "an")
        return f"{draw.choice(NAMES)} saw", tuple(f"{article} {noun}." for article in articles)
    if kind == 3:
        return f"Yesterday {' and '.join(draw.sample(NAMES, 2))}", draw.choice(PAST)
    man = draw.random() < 0.5
    pronouns = ("himself", "herself") if man else ("herself", "himself")
    name = draw.choice(MEN if man else WOMEN)
    return f"{name} looked in the {adjective} mirror and saw", tuple(f"{pronoun}." for pronoun in pronouns)


def _copying(draw: random.Random) -> Made:
    words = draw.sample(WORDS, 6)
    asked = draw.randrange(2, 6)
    wrong = draw.sample([word for word in words if word != words[asked]], CHOICES - 1)
    again = ", ".join(words[:asked])
    return f"The words are: {', '.join(words)}.\nOnce more, the words are: {again},", (words[asked], *wrong)


def _reading(draw: random.Random) -> Made:
    names, things, places = draw.sample(NAMES, 2), draw.sample(THINGS, 2), draw.sample(PLACES, CHOICES)
    story = [f"{n} put the {t} into the {p}." for n, t, p in zip(names, things, places[:2], strict=True)]
    asked = draw.randrange(2)
    wrong = [place for i, place in enumerate(places) if i != asked]
    return f"{' '.join(story)} So the {things[asked]} is now in the", tuple(f"{p}." for p in (places[asked], *wrong))


_MAKERS: dict[str, Callable[[random.Random], Made]] = {
    "arithmetic": _arithmetic,
    "grammar": _grammar,
    "copying": _copying,
    "reading": _reading,
}
