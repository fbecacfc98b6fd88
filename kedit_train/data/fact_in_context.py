"""Put the new fact of an edit into a prompt, so that the unedited model reads the fact before it answers."""

from __future__ import annotations

import re

from kedit_train.arguments import Rule
from kedit_train.data.tokenization import separator
from kedit_train.edit import Edit

# A template with two fields: the sentence that states the fact, and the prompt.
CONTEXT = "{fact} {prompt}"
_FIELD = re.compile(r"\{(fact|prompt)\}")

CONTEXT_TEMPLATE = Rule(
    "a template with {fact} and {prompt}",
    lambda value: isinstance(value, str) and {"fact", "prompt"} <= set(_FIELD.findall(value)),
)


def fact_sentence(edit: Edit) -> str:
    """Return a sentence that states the new fact of an edit: its prompt, its target and a full stop.

    Example:
        >>> fact_sentence(Edit("Ada lives in", "Bern"))
        'Ada lives in Bern.'
    """
    end = "" if edit.target.rstrip().endswith((".", "!", "?", "。", "！", "？", "…")) else "."
    return f"{edit.prompt}{separator(edit.prompt, edit.target)}{edit.target}{end}"


def prompt_with_fact(edit: Edit, prompt: str, context: str = CONTEXT) -> str:
    """Return a prompt together with a sentence that states the new fact of an edit.

    Args:
        edit: the edit. :func:`fact_sentence` makes the sentence.
        prompt: the prompt, for example ``edit.prompt``.
        context: a template with the fields ``{fact}`` (the sentence) and ``{prompt}``.

    Example:
        >>> prompt_with_fact(Edit("Ada lives in", "Bern"), "The home of Ada is")
        'Ada lives in Bern. The home of Ada is'
    """
    # str.format() is not used, because the template may contain other braces.
    fields = {"fact": fact_sentence(edit), "prompt": prompt}
    return _FIELD.sub(lambda field: fields[field[1]], context)
