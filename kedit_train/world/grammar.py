"""Prose from a small grammar: texts without facts, to measure whether the model still writes as before."""

from __future__ import annotations

from random import Random

from kedit_train.world.facts import pick


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    "old new quiet heavy bright narrow early late warm cold broken empty little tall green grey white red "
    "simple gentle careful hungry tired proud dusty wet dry distant hidden golden"
)
ANIMATE = _words(
    "farmer sailor child widow soldier doctor nurse cook hunter dancer priest thief guard pilot poet student "
    "dog horse cat crow fox goat king queen stranger neighbour"
)
THINGS = _words(
    "lamp table letter basket window door mirror ladder blanket coin ring knife hammer rope kettle candle "
    "picture box hat chair bell stone apple loaf barrel lantern"
)
PLACES = _words(
    "forest market kitchen valley garden harbour tower church cellar field mill road bridge island meadow "
    "village inn station yard library"
)
ACTIONS = _words("carried lost found mended hid painted dropped kept stole cleaned wanted bought forgot lifted watched")
MOVES = _words("walked ran drove crept hurried returned wandered climbed rode slipped")
MOODS = (
    "slowly", "happily", "in silence", "without a word", "at dawn", "after supper", "in the rain", "before winter",
    "every Sunday", "at night",
)  # fmt: skip
LINKS = ("but", "and", "while", "because", "so")
SENTENCES = (
    "the {adjective} {animate} {action} the {thing}",
    "the {animate} {move} {mood} to the {place}",
    "{mood} the {animate} {action} a {adjective} {thing}",
    "the {thing} in the {place} was {adjective}",
    "nobody in the {place} {action} the {adjective} {thing}",
    "the {animate} of the {adjective} {place} {action} the {thing} {mood}",
    "there was a {adjective} {thing} near the {place}",
    "the {animate} and the {animate} {move} {mood} from the {place}",
)
WORDS: dict[str, tuple[str, ...]] = {
    "adjective": ADJECTIVES,
    "animate": ANIMATE,
    "thing": THINGS,
    "place": PLACES,
    "action": ACTIONS,
    "move": MOVES,
    "mood": MOODS,
}
HELD_OUT_EVERY = 10


def paragraphs(n: int, *, seed: int = 0, held_out: bool) -> list[str]:
    """Return ``n`` different paragraphs of two or three sentences.

    The checksum of a paragraph's text decides whether the paragraph is in the held-out part or in the training part. So
    the two parts never overlap, for any ``seed`` and ``n``.

    Args:
        n: number of paragraphs.
        seed: seed of the random choice.
        held_out: True returns paragraphs of the held-out part. False returns paragraphs of the training part.
    """
    rng = Random(f"prose {seed}")
    made: dict[str, None] = {}
    while len(made) < n:
        text = " ".join(_sentence(rng) for _ in range(2 + int(rng.random() * 2)))
        if (sum(text.encode()) % HELD_OUT_EVERY == 0) == held_out:
            made[text] = None
    return list(made)


def _clause(rng: Random) -> str:
    words = pick(rng, SENTENCES).split(" ")
    return " ".join(pick(rng, WORDS[word[1:-1]]) if word.startswith("{") else word for word in words)


def _sentence(rng: Random) -> str:
    clause = _clause(rng)
    if rng.random() < 0.3:
        clause = f"{clause} {pick(rng, LINKS)} {_clause(rng)}"
    return f"{clause[0].upper()}{clause[1:]}."
