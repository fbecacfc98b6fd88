"""Put other words in the place of the subject of a prompt, to get prompts whose answers an edit should not change."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from kedit_train.data.leaks import LeakCheck
from kedit_train.data.tokenization import SPACELESS
from kedit_train.edit import Edit


def neighbor_prompts(edits: Sequence[Edit], texts: Sequence[str], n: int, *, seed: int = 0) -> list[str]:
    """Return up to ``n`` prompts per edit: the prompt of the edit, with other words in place of its subject.

    An edit mostly affects prompts with the same wording and another subject, such as the neighborhood prompts of
    CounterFact. The words are drawn at random from the texts: as many consecutive words as the subject has. They need
    not be the name of anything. In scripts without spaces, characters are drawn instead of words.

    Edits without a subject, and edits whose prompt does not contain their subject, have no such prompts. A prompt that
    contains a prompt of an edit, a rephrase or the prompt of a probe is left out.

    Args:
        edits: the edits.
        texts: the texts to draw words from.
        n: number of prompts per edit.
        seed: seed of the draws. The draws for an edit do not depend on the other edits.

    References:
        "Locating and Editing Factual Associations in GPT", arXiv 2202.05262 (CounterFact and its neighborhood prompts).

    Example:
        >>> edit = Edit("Ann was born in", "Oslo", subject="Ann")
        >>> neighbor_prompts([edit], ["Bob"], 1)
        ['Bob was born in']
    """
    check = LeakCheck(edits)
    # The text of a rendered conversation contains special tokens, but the contents of its messages do not.
    plain = [getattr(text, "contents", text).split() for text in texts]
    pieces: dict[str, list[Any]] = {" ": plain, "": ["".join(words) for words in plain]}
    prompts: dict[str, None] = {}
    for edit in edits:
        if not edit.subject or edit.subject not in edit.prompt:
            continue
        between = "" if SPACELESS.search(edit.subject) else " "
        words = edit.subject.split()
        length = len(words if between else "".join(words))
        sources = [piece for piece in pieces[between] if len(piece) >= length]
        generator = random.Random(f"{seed} {edit.prompt}")
        for _ in range(n if sources else 0):
            source = generator.choice(sources)
            start = generator.randrange(len(source) - length + 1)
            other = between.join(source[start : start + length]).strip(".,;:!?。，、！？")
            prompt = edit.prompt.replace(edit.subject, other)
            if other and not check.contains_prompt(prompt):
                prompts[prompt] = None
    return list(prompts)
