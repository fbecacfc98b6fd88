"""Checkpoints as a user names them: a folder, a hub name, or "world"."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from kedit_train.errors import EditError

# What belongs to a model of transformers; no weights that would have to be unpickled.
_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.md", "*.py"]


def world_or(name: str) -> str:
    """The folder of the packaged checkpoint for "world"; any other name as it is."""
    if name != "world":
        return name
    from kedit_train import world

    return str(world.path())


def folder_of(name: str) -> Path:
    """The folder of a checkpoint; a hub name is downloaded, or found where it was before.

    Raises:
        EditError: no such folder, and no such model on the hub.
    """
    given = Path(world_or(name))
    if given.is_dir():
        return given
    if given.is_file():
        raise EditError(f"{name} is a file; give the folder of a checkpoint, a hub name, or 'world'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except (OSError, HFValidationError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise EditError(
            f"there is no folder {name!r}, and the hub gives no such model ({reason.partition('. ')[0][:200]}); give "
            "the folder of a checkpoint, a hub name, or 'world'"
        ) from error


def load(name: str, dtype: str, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """The model and its tokenizer, with a progress bar where somebody watches it."""
    from transformers.utils import logging

    from kedit_train.modules import load_model

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    return load_model(name, dtype=dtype, trust_remote_code=trust_remote_code)
