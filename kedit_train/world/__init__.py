"""The bundled model and its data: a small Llama and the invented facts that it was trained on.

The model and the data are part of the package, so nothing is downloaded.

Example:
    >>> from kedit_train import world
    >>> model, tokenizer = world.load()
    >>> edits = world.edits()
    >>> texts = world.locality_texts(exclude=edits)
    >>> len(edits), len(texts)
    (24, 4095)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kedit_train.errors import EditError
from kedit_train.world import grammar
from kedit_train.world.counterfactual import edits, locality_texts, other_prompts, unaffected

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["NAME", "edits", "is_world", "load", "locality_texts", "other_prompts", "path", "prose", "unaffected"]

# An argument for a model, edits, texts or prompts accepts this name, which selects the bundled model or bundled data.
NAME = "world"


def is_world(name: object) -> bool:
    """Return whether ``name`` is "world", the name of the bundled model and data.

    Example:
        >>> is_world("world"), is_world("world.json")
        (True, False)
    """
    return isinstance(name, str) and name == NAME


def path() -> Path:
    """Return the folder of the bundled checkpoint, for ``from_pretrained``.

    Raises:
        EditError: the checkpoint is missing.

    Example:
        >>> path().name
        'checkpoint'
    """
    folder = Path(__file__).parent / "checkpoint"
    if not (folder / "model.safetensors").is_file():
        raise EditError(
            "the checkpoint of the bundled model is missing; create it with: python -m kedit_train.world.pretrain"
        )
    return folder


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the bundled model and its tokenizer.

    Returns:
        The model in fp32 and in evaluation mode, and the tokenizer.

    Example:
        >>> model, tokenizer = load()
        >>> model.config.num_hidden_layers
        6
    """
    from kedit_train.world.knowledge_check import load as load_folder  # imported here, because it imports transformers

    return load_folder(path())


def prose(n: int = 200, seed: int = 0, held_out: bool = True) -> list[str]:
    """Return paragraphs of simple prose that state no fact, to measure perplexity.

    Args:
        n: number of paragraphs.
        seed: seed of the random choice.
        held_out: True returns paragraphs that the bundled model was not trained on. False returns training paragraphs.

    Example:
        >>> len(prose(3))
        3
    """
    return grammar.paragraphs(n, seed=seed, held_out=held_out)
