"""The embedded default: a small invented world of facts, and a small Llama that knows it.

>>> from kedit_train import world
>>> model, tokenizer = world.load()
>>> edits = world.edits(32)
>>> texts = world.locality_texts(exclude=edits)
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

# The name that stands for the embedded world wherever a model, edits, texts or prompts are named.
NAME = "world"


def is_world(name: object) -> bool:
    """Whether ``name`` stands for the embedded world, instead of a file, a folder or a hub name."""
    return isinstance(name, str) and name == NAME


def path() -> Path:
    """The folder of the packaged checkpoint, as ``from_pretrained`` takes it.

    Raises:
        EditError: the checkpoint is not there.
    """
    folder = Path(__file__).parent / "checkpoint"
    if not (folder / "model.safetensors").is_file():
        raise EditError("the world's checkpoint is missing; make it with: python -m kedit_train.world.pretrain")
    return folder


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The packaged model, in fp32 and in evaluation mode, and its tokenizer."""
    from kedit_train.world.knowledge_check import load as load_folder  # transformers only when a model is wanted

    return load_folder(path())


def prose(n: int = 200, seed: int = 0, held_out: bool = True) -> list[str]:
    """``n`` paragraphs about nothing in the world, for perplexity; by default from the part never trained on."""
    return grammar.paragraphs(n, seed=seed, held_out=held_out)
