"""Find the tokenizer of a training loop or of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kedit_train.arguments import Rule, cut
from kedit_train.errors import EditError

# Any callable is accepted as a tokenizer, so that a user's own tokenizer works too.
TOKENIZER = Rule("a tokenizer, a name or a path", lambda value: callable(value) or isinstance(value, str | Path))


def find_tokenizer(given: Any | None, model: Any) -> Any:
    """Return the given tokenizer, or load it.

    Args:
        given: a tokenizer, a processor that contains one, a name or a path. None selects the tokenizer saved with the
            model.
        model: the model.

    Raises:
        EditError: no tokenizer can be loaded, or ``given`` is not a tokenizer, a name or a path.
    """
    if callable(given):
        # The processor of a vision-language model has a tokenizer as its attribute ``tokenizer``. Some tokenizers (of
        # mistral-common, and of remote code) also have an attribute with this name, but it cannot be called.
        inner = getattr(given, "tokenizer", None)
        return inner if callable(inner) else given
    name = given or getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise EditError("no tokenizer found; pass tokenizer= (a tokenizer, a name or a path).")
    if not TOKENIZER.holds(name):
        raise EditError(f"tokenizer must be {TOKENIZER.expected}, got {cut(repr(name))}.")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise EditError(
            f"no tokenizer found at {str(name)!r} ({reason}); pass tokenizer= (a tokenizer, a name or a path)."
        ) from error
