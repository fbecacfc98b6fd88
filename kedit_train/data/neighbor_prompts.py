"""Put other subjects into prompts, to get prompts whose answers an edit should not change."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kedit_train.data.leaks import LeakCheck
from kedit_train.data.tokenization import SPACELESS
from kedit_train.edit import Edit

_PUNCTUATION = ".,;:!?\"'()[]…。，、！？"
_END_OF_SENTENCE = (".", "!", "?", ":")


def neighbor_prompts(edits: Sequence[Edit], texts: Sequence[str], n: int, *, seed: int = 0) -> list[str]:
    """Return up to ``n`` prompts per edit: the prompt of the edit with a name from the texts in place of its subject.

    An edit mostly affects prompts with the same wording and another subject, such as the neighborhood prompts of
    CounterFact. The prompts need not be sensible. See :func:`names_in` for what counts as a name. If the texts contain
    fewer than ``n`` different names, as in scripts without capital letters, as many consecutive words as the subject
    has are drawn from the texts instead (characters, in scripts without spaces).

    Edits without a subject, and edits whose prompt does not contain their subject, have no such prompts. A prompt that
    contains a prompt of an edit, a rephrase or the prompt of a probe is left out.

    Args:
        edits: the edits.
        texts: the texts to draw names from.
        n: number of prompts per edit.
        seed: seed of the draws. The draws for an edit do not depend on the other edits.

    References:
        "Locating and Editing Factual Associations in GPT", arXiv 2202.05262 (CounterFact and its neighborhood prompts).

    Example:
        >>> edit = Edit("Ann was born in", "Oslo", subject="Ann")
        >>> neighbor_prompts([edit], ["The river Rhine flows north."], 1)
        ['Rhine was born in']
    """
    check = LeakCheck(edits)
    # The text of a rendered conversation contains special tokens, but the contents of its messages do not.
    words = [str(getattr(text, "contents", text)).split() for text in texts]
    names = names_in(words)
    prompts: dict[str, None] = {}
    for edit in edits:
        if not edit.subject or edit.subject not in edit.prompt:
            continue
        generator = random.Random(f"{seed} {edit.prompt}")
        others = generator.sample(names, n) if len(names) >= n else _spans(edit.subject, words, n, generator)
        candidates = (edit.prompt.replace(edit.subject, other) for other in others if other)
        prompts.update(dict.fromkeys(prompt for prompt in candidates if not check.contains_prompt(prompt)))
    return list(prompts)


def names_in(texts: Sequence[Sequence[str]]) -> list[str]:
    """Return the different names in texts, in alphabetical order.

    A name is a sequence of words that begin with a capital letter. The first word of a sentence is never part of a
    name, because every sentence begins with a capital letter. Punctuation ends a name.

    Args:
        texts: the words of each text.

    Example:
        >>> names_in(["The poet Ann Lee, born in Oslo. Later she left.".split()])
        ['Ann Lee', 'Oslo']
    """
    names: set[str] = set()
    for words in texts:
        name: list[str] = []
        starts_sentence = True
        for word in words:
            plain = word.strip(_PUNCTUATION)
            is_part = plain[:1].isupper() and not starts_sentence
            if name and not is_part:
                names.add(" ".join(name))
                name = []
            if is_part:
                name.append(plain)
                if word[-1] in _PUNCTUATION:
                    names.add(" ".join(name))
                    name = []
            starts_sentence = word.endswith(_END_OF_SENTENCE)
        if name:
            names.add(" ".join(name))
    return sorted(names)


def _spans(subject: str, texts: Sequence[Sequence[str]], n: int, generator: random.Random) -> list[str]:
    """Draw parts of texts that have as many words as the subject, or as many characters in scripts without spaces."""
    between = "" if SPACELESS.search(subject) else " "
    length = len(subject.split() if between else "".join(subject.split()))
    sources: list[Sequence[str]] = [words if between else "".join(words) for words in texts]
    sources = [source for source in sources if len(source) >= length]
    spans = []
    for _ in range(n if sources else 0):
        source = generator.choice(sources)
        start = generator.randrange(len(source) - length + 1)
        spans.append(between.join(source[start : start + length]).strip(_PUNCTUATION))
    return spans
