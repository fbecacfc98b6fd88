"""Make prompts that are similar to the prompts of the edits, but contain other names instead of the subjects."""

from __future__ import annotations

from dataclasses import replace

from kedit_train.core.locality.texts import Texts
from kedit_train.core.run import EditRun
from kedit_train.core.training_format import training_format
from kedit_train.data.chat_format import chat_format
from kedit_train.data.conversations import RenderedConversation
from kedit_train.data.neighbor_prompts import has_subject, neighbor_prompts
from kedit_train.data.prompts import render_prompt
from kedit_train.data.tokenization import shorten
from kedit_train.errors import warn


def neighbor_texts(run: EditRun, texts: Texts, n: int) -> Texts | None:
    """Return at most ``n`` new prompts per edit. In each prompt, a name from ``texts`` replaces the subject.

    The prompts have the format of the training examples. A warning is issued if no prompt could be made, or if the
    prompt of an edit does not contain its subject.

    Args:
        run: the run, with its edits.
        texts: the texts to draw names from.
        n: maximum number of prompts per edit (see :func:`~kedit_train.data.neighbor_prompts.neighbor_prompts`).

    Returns:
        A ``Texts`` that contains the prompts. Its tokenizer, seed and maximum length are those of ``texts``. None if no
        prompt could be made.
    """
    tokenizer = run.tokenizer(texts.tokenizer)
    # Only names from the texts are used, so these texts may contain prompts of the edits.
    loaded = texts.load(run.edits, keep_leaks=True, tokenizer=tokenizer)
    prompts = neighbor_prompts(run.edits, loaded, n, seed=texts.seed)
    if not prompts:
        warn(
            f"neighbors={n} replaces the subject in the prompt of each edit with names from the texts, but no prompt "
            "could be made; set the subject of each edit as it is written in its prompt, pass texts that contain "
            "names, or remove neighbors."
        )
        return None
    if without := [edit.prompt for edit in run.edits if not has_subject(edit)]:
        warn(
            f"neighbors={n} replaces the subject in the prompt of each edit, but in {len(without)} of "
            f"{len(run.edits)} edits, the prompt does not contain the subject (the first: {shorten(without[0])!r}); "
            "set the subject of each edit as it is written in its prompt."
        )
    chosen = training_format(run, tokenizer, run.edits) or "plain"
    rendered = [render_prompt(tokenizer, prompt, chosen) for prompt in prompts]
    if chat_format(chosen) is not None:
        # A rendered conversation already contains special tokens. The tokenizer adds special tokens to all other texts.
        rendered = [RenderedConversation(text, prompt) for text, prompt in zip(rendered, prompts, strict=True)]
    return replace(texts, source=rendered, nearest=None)
