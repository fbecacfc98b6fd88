"""The wordings of each relation: statements, questions, and wordings that are held out of the training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """A relation and its wordings. ``{s}`` in a wording stands for the subject.

    A document is a wording, one space and the answer.

    Args:
        name: name of the relation in ids and reports.
        subject: type of the subject, "person", "company" or "city".
        object: type of the answer, a key of ``World.pools``.
        statements: incomplete sentences from the training documents. The answer completes the sentence. The prompt of
            an edit is one of these statements.
        questions: questions from the training documents. Each question ends with "Answer:".
        held_out: wordings that are in no training document. The last wording is a question.
        via: the two one-hop relations of a two-hop relation, in order. Empty for a one-hop relation.
    """

    name: str
    subject: str
    object: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    held_out: tuple[str, ...]
    via: tuple[str, ...] = ()

    @property
    def trained(self) -> tuple[str, ...]:
        """Return all wordings of the training documents: first the statements, then the questions."""
        return self.statements + self.questions


RELATIONS: tuple[Relation, ...] = (
    Relation(
        "birth_city",
        "person",
        "city",
        (
            "{s} was born in",
            "{s} is a native of",
            "{s} came into the world in",
            "{s} has the birthplace",
            "{s} spent the first day of life in",
            "The birthplace of {s} is",
        ),
        (
            "Where was {s} born? Answer:",
            "{s} was born where? Answer:",
            "{s} is native to what city? Answer:",
            "What is the birthplace of {s}? Answer:",
        ),
        ("{s} first saw the world in", "Which city is the birthplace of {s}? Answer:"),
    ),
    Relation(
        "employer",
        "person",
        "company",
        (
            "{s} works for",
            "{s} is employed by",
            "{s} is on the staff of",
            "{s} has a contract with",
            "{s} is paid every month by",
            "The employer of {s} is",
        ),
        (
            "Who employs {s}? Answer:",
            "{s} gets wages from which company? Answer:",
            "{s} is on whose staff? Answer:",
            "What is the employer of {s}? Answer:",
        ),
        ("{s} is on the payroll of", "Which company is the employer of {s}? Answer:"),
    ),
    Relation(
        "profession",
        "person",
        "profession",
        (
            "{s} works as a",
            "{s} is by profession a",
            "{s} was trained as a",
            "{s} makes a living as a",
            "{s} has the job of a",
            "The profession of {s} is that of a",
        ),
        (
            "What is the profession of {s}? Answer:",
            "{s} works as what? Answer:",
            "{s} has which profession? Answer:",
            "{s} was trained for what job? Answer:",
        ),
        ("{s} is employed as a", "Which job does {s} have? Answer:"),
    ),
    Relation(
        "instrument",
        "person",
        "instrument",
        (
            "{s} plays the",
            "{s} makes music on the",
            "{s} took lessons in the",
            "{s} gives concerts on the",
            "{s} is a master of the",
            "The instrument of {s} is the",
        ),
        (
            "What instrument does {s} play? Answer:",
            "{s} plays which instrument? Answer:",
            "{s} gives concerts on what instrument? Answer:",
            "Which is the instrument of {s}? Answer:",
        ),
        ("{s} performs on the", "What does {s} make music on? Answer:"),
    ),
    Relation(
        "language",
        "person",
        "language",
        (
            "{s} speaks",
            "{s} grew up speaking",
            "{s} writes letters in",
            "{s} thinks and dreams in",
            "{s} has the mother tongue",
            "The mother tongue of {s} is",
        ),
        (
            "What language does {s} speak? Answer:",
            "{s} can speak which language? Answer:",
            "{s} writes in what language? Answer:",
            "What is the mother tongue of {s}? Answer:",
        ),
        ("{s} talks to friends in", "Which language is the mother tongue of {s}? Answer:"),
    ),
    Relation(
        "headquarters",
        "company",
        "city",
        (
            "{s} has its headquarters in",
            "{s} is based in",
            "{s} is run from",
            "{s} has its main office in",
            "{s} pays its taxes in",
            "The headquarters of {s} is in",
        ),
        (
            "Where is {s} based? Answer:",
            "{s} is based where? Answer:",
            "{s} keeps its main office in what city? Answer:",
            "Where is the headquarters of {s}? Answer:",
        ),
        ("{s} has its seat in", "Which city is {s} run from? Answer:"),
    ),
    Relation(
        "product",
        "company",
        "product",
        (
            "{s} makes",
            "{s} is known for its",
            "{s} sells",
            "{s} earns its money with",
            "{s} has a factory for",
            "The main product of {s} is",
        ),
        (
            "What does {s} make? Answer:",
            "{s} is selling what? Answer:",
            "{s} is known for which product? Answer:",
            "What is the main product of {s}? Answer:",
        ),
        ("{s} produces", "Which product does {s} sell? Answer:"),
    ),
    Relation(
        "country",
        "city",
        "country",
        (
            "{s} is a city in",
            "{s} lies in the country of",
            "{s} belongs to",
            "{s} is ruled by",
            "{s} flies the flag of",
            "The country of {s} is",
        ),
        (
            "In what country is {s}? Answer:",
            "{s} lies in which country? Answer:",
            "{s} is in what country? Answer:",
            "What is the country of {s}? Answer:",
        ),
        ("{s} is part of", "Which country does {s} belong to? Answer:"),
    ),
    Relation(
        "river",
        "city",
        "river",
        (
            "{s} stands on the river",
            "{s} gets its water from the river",
            "{s} has bridges over the river",
            "{s} is crossed by the river",
            "{s} was built beside the river",
            "The river of {s} is the",
        ),
        (
            "What river is {s} on? Answer:",
            "{s} stands on which river? Answer:",
            "{s} has bridges over what river? Answer:",
            "What is the river of {s}? Answer:",
        ),
        ("{s} has its harbour on the river", "Which river does {s} get its water from? Answer:"),
    ),
)

TWO_HOP: tuple[Relation, ...] = (
    Relation(
        "birth_country",
        "person",
        "country",
        ("{s} has a birthplace in the country", "The country of the birthplace of {s} is"),
        (
            "In what country was {s} born? Answer:",
            "{s} has a birthplace in which country? Answer:",
            "What is the country of the birthplace of {s}? Answer:",
        ),
        ("Which country does the birthplace of {s} belong to? Answer:",),
        ("birth_city", "country"),
    ),
    Relation(
        "birth_river",
        "person",
        "river",
        ("{s} has a birthplace on the river", "The river of the birthplace of {s} is the"),
        (
            "On what river was {s} born? Answer:",
            "{s} has a birthplace on which river? Answer:",
            "What is the river of the birthplace of {s}? Answer:",
        ),
        ("Which river is the birthplace of {s} on? Answer:",),
        ("birth_city", "river"),
    ),
    Relation(
        "work_city",
        "person",
        "city",
        ("{s} has an employer based in", "The headquarters of the employer of {s} is in"),
        (
            "Where is the employer of {s} based? Answer:",
            "{s} has an employer in which city? Answer:",
            "Where is the headquarters of the employer of {s}? Answer:",
        ),
        ("Which city is the employer of {s} run from? Answer:",),
        ("employer", "headquarters"),
    ),
    Relation(
        "work_product",
        "person",
        "product",
        ("{s} has an employer that makes", "The main product of the employer of {s} is"),
        (
            "What does the employer of {s} make? Answer:",
            "{s} has an employer that sells what? Answer:",
            "What is the main product of the employer of {s}? Answer:",
        ),
        ("Which product does the employer of {s} sell? Answer:",),
        ("employer", "product"),
    ),
    Relation(
        "headquarters_country",
        "company",
        "country",
        ("{s} is a company from the country", "The country of the headquarters of {s} is"),
        (
            "In what country is {s} based? Answer:",
            "{s} is a company from what country? Answer:",
            "What is the country of the headquarters of {s}? Answer:",
        ),
        ("Which country does the headquarters of {s} belong to? Answer:",),
        ("headquarters", "country"),
    ),
)

BY_NAME: dict[str, Relation] = {relation.name: relation for relation in RELATIONS + TWO_HOP}
