"""The invented facts of the bundled model, about people, companies and cities, and documents that state the facts.

The same seed gives the same facts on every machine and Python version, because only ``random.Random.random`` is used.
Python guarantees that the random numbers of this function stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from kedit_train.errors import EditError
from kedit_train.world.templates import BY_NAME, RELATIONS, TWO_HOP

WORLD_SEED = 20
PEOPLE, COMPANIES, CITIES, COUNTRIES, RIVERS, LANGUAGES = 180, 30, 40, 12, 16, 14
HELD_OUT_ONE_IN = 20  # one in this many people appears in no two-hop training question

PROFESSIONS = (
    "baker", "carpenter", "librarian", "painter", "tailor", "surgeon", "lawyer", "miner", "gardener", "weaver",
    "stone mason", "lighthouse keeper", "ship builder", "school teacher", "train driver", "clock maker",
    "bee keeper", "map maker", "fire fighter", "bridge inspector",
)  # fmt: skip
INSTRUMENTS = (
    "violin", "cello", "trumpet", "organ", "harp", "oboe", "mandolin", "tuba", "bass drum", "steel guitar",
    "wooden flute", "glass harmonica", "snare drum", "grand piano", "silver horn", "toy piano",
)  # fmt: skip
PRODUCTS = (
    "furniture", "paper", "bicycles", "soap", "umbrellas", "chocolate", "steel pipes", "winter coats",
    "garden tools", "glass bottles", "sailing boats", "school books", "wall clocks", "orange juice", "leather shoes",
)  # fmt: skip
ONSETS = (*"bdfgklmnprstvz", "br", "dr", "kr", "tr", "st", "sh", "ch", "gl")
VOWELS = tuple("aeiou")
CODAS = ("", "", "", "n", "r", "l", "s", "m")

T = TypeVar("T")
Key = tuple[str, str]  # subject and name of the relation


@dataclass(frozen=True)
class Fact:
    """A fact: the ``relation`` of ``subject`` is ``object``."""

    subject: str
    relation: str
    object: str

    @property
    def key(self) -> Key:
        return self.subject, self.relation


@dataclass(frozen=True)
class World:
    """All people, companies and cities of the bundled model, and all facts about them.

    Attributes:
        pools: dict from type to all names of that type, in a fixed order.
        facts: dict from (subject, relation) to the one-hop fact.
        two_hop: dict from (subject, relation) to the two-hop fact, which follows from two one-hop facts.
        hops: dict from each two-hop fact to the two one-hop facts that it follows from, in order. Each fact is given
            as (subject, relation).
        held_out: people whose two-hop facts are not in the training data.
    """

    pools: dict[str, tuple[str, ...]]
    facts: dict[Key, Fact]
    two_hop: dict[Key, Fact]
    hops: dict[Key, tuple[Key, Key]]
    held_out: frozenset[str]

    @property
    def trained_two_hop(self) -> list[Fact]:
        return [fact for fact in self.two_hop.values() if fact.subject not in self.held_out]

    @property
    def untrained_two_hop(self) -> list[Fact]:
        return [fact for fact in self.two_hop.values() if fact.subject in self.held_out]


def pick(rng: Random, items: Sequence[T]) -> T:
    """Return one of ``items`` with equal probability. The result is the same in all Python versions."""
    return items[int(rng.random() * len(items))]


def shuffled(rng: Random, items: Sequence[T]) -> list[T]:
    """Return ``items`` in random order. Unlike ``rng.shuffle``, the result is the same in all Python versions."""
    return [items[i] for _, i in sorted((rng.random(), i) for i in range(len(items)))]


def build(seed: int = WORLD_SEED, *, people: int = PEOPLE, companies: int = COMPANIES, cities: int = CITIES) -> World:
    """Generate people, companies and cities, and all facts about them.

    With the default arguments, these are the facts that the bundled model was trained on.

    Args:
        seed: seed of the generator.
        people: number of people.
        companies: number of companies.
        cities: number of cities.

    Raises:
        EditError: the generator cannot find enough different names.
    """
    rng = Random(seed)
    pools = _pools(rng, people, companies, cities)
    facts: dict[Key, Fact] = {}
    for relation in RELATIONS:
        for subject, answer in zip(
            pools[relation.subject], _dealt(rng, pools[relation.object], len(pools[relation.subject])), strict=True
        ):
            facts[subject, relation.name] = Fact(subject, relation.name, answer)
    held_out = frozenset(shuffled(rng, pools["person"])[: people // HELD_OUT_ONE_IN])
    hops = _hops(facts, pools)
    two_hop = {key: Fact(*key, facts[second].object) for key, (_, second) in hops.items()}
    return World(pools, facts, two_hop, hops, held_out)


def documents(fact: Fact, wordings: Sequence[str]) -> list[str]:
    """Return one document for each wording: the prompt, one space and the answer, without a full stop."""
    return [f"{wording.format(s=fact.subject)} {fact.object}" for wording in wordings]


def training_facts(world: World) -> list[Fact]:
    """Return all training facts: all one-hop facts, and the two-hop facts that are not about held-out people."""
    return [*world.facts.values(), *world.trained_two_hop]


def training_documents(world: World) -> list[list[str]]:
    """Return, for each training fact, all documents that state the fact. An epoch uses only some of them."""
    return [documents(fact, BY_NAME[fact.relation].trained) for fact in training_facts(world)]


def _hops(facts: dict[Key, Fact], pools: dict[str, tuple[str, ...]]) -> dict[Key, tuple[Key, Key]]:
    hops: dict[Key, tuple[Key, Key]] = {}
    for relation in TWO_HOP:
        for subject in pools[relation.subject]:
            first = subject, relation.via[0]
            hops[subject, relation.name] = first, (facts[first].object, relation.via[1])
    return hops


def _dealt(rng: Random, answers: Sequence[str], count: int) -> list[str]:
    """Return ``count`` answers in random order. All answers occur about equally often."""
    return shuffled(rng, [answers[i % len(answers)] for i in range(count)])


def _pools(rng: Random, people: int, companies: int, cities: int) -> dict[str, tuple[str, ...]]:
    new = _Inventor(rng)
    firsts = new.names(people, lambda: new.word(2, pick(rng, ("a", "o", "i", "el", "an", "is", "en"))))
    lasts = new.names(people, lambda: new.word(2, pick(rng, ("do", "sen", "ri", "mak", "vic", "ler", "tova", "no"))))
    towns = new.names(cities, lambda: new.word(2, pick(rng, ("ville", "burg", "ton", "mouth", "ford", "stad", "port"))))
    houses = new.names(companies, lambda: new.word(2, pick(rng, ("ex", "on", "ix", "um", "ar"))))
    kinds = ("Works", "Brothers", "Group", "and Sons", "Trading", "Industries")
    countries = new.names(COUNTRIES, lambda: new.word(2, pick(rng, ("land", "stan", "ia", "mark"))))
    rivers = new.names(RIVERS, lambda: new.word(1, pick(rng, ("une", "ava", "esh", "orn", "ey"))))
    languages = new.names(LANGUAGES, lambda: new.word(2, pick(rng, ("ish", "ese", "ic"))))
    new_cities = [
        f"{pick(rng, ('New', 'Port', 'Saint'))} {town}" if i % 4 == 0 else town for i, town in enumerate(towns)
    ]
    return {
        "person": tuple(f"{first} {last}" for first, last in zip(firsts, lasts, strict=True)),
        "company": tuple(f"{house} {pick(rng, kinds)}" for house in houses),
        "city": tuple(new_cities),
        "country": tuple(countries),
        "river": tuple(rivers),
        "language": tuple(languages),
        "profession": PROFESSIONS,
        "instrument": INSTRUMENTS,
        "product": PRODUCTS,
    }


class _Inventor:
    """Invents names. No name is the beginning of another name, so names cannot be confused."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.taken: list[str] = []

    def word(self, syllables: int, ending: str) -> str:
        parts = [pick(self.rng, ONSETS) + pick(self.rng, VOWELS) for _ in range(syllables)]
        coda = pick(self.rng, CODAS) if ending[0] in "aeiou" else ""
        stem = "".join(parts) + coda
        if ending[0] in "aeiou" and not coda:
            stem += pick(self.rng, ("d", "k", "l", "n", "t", "v"))
        return (stem + ending).capitalize()

    def names(self, count: int, make: Callable[[], str]) -> list[str]:
        made: list[str] = []
        for _ in range(100 * count):
            if len(made) == count:
                return made
            name = make()
            if not any(name.startswith(other) or other.startswith(name) for other in self.taken):
                self.taken.append(name)
                made.append(name)
        raise EditError(
            f"only {len(made)} of {count} different names could be invented; pass a smaller number of people, "
            "companies or cities"
        )
