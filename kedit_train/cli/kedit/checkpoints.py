"""Find and load a model by folder, by hub name, or by the name "world" (the bundled model)."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from kedit_train import world
from kedit_train.errors import EditError

# The files of a transformers model, except pickled weights, because loading a pickle can execute code.
_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.md", "*.py"]


def world_or(name: str) -> str:
    """Return the folder of the bundled model if ``name`` is "world". Otherwise, return ``name`` itself."""
    return str(world.path()) if world.is_world(name) else name


def folder_of(name: str) -> Path:
    """Return the folder of a checkpoint. A hub model is downloaded unless it is in the cache.

    Raises:
        EditError: the name is a file, or it is not a folder and cannot be loaded from the hub.
    """
    folder = Path(world_or(name))
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise EditError(
            f"the model {name!r} is a file; give the folder of a checkpoint, the hub name of a model, or 'world' (the "
            "bundled model)."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except (OSError, HFValidationError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise EditError(
            f"the model {name!r} is not a folder and cannot be loaded from the hub "
            f"({reason.partition('. ')[0][:200]}); give the folder of a checkpoint, the hub name of a "
            "model that you can download, or 'world' (the bundled model)."
        ) from error


def load(name: str, dtype: str, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Load a model and its tokenizer. A PEFT adapter (and its gate) is loaded on top of its base model."""
    from transformers.utils import logging

    from kedit_train.pretrained import load_model

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    return load_model(name, dtype=dtype, trust_remote_code=trust_remote_code)


def without_weights(name: str, *, trust_remote_code: bool = False) -> Any | None:
    """Build a model without allocating its weights. This is fast for models of any size.

    Returns:
        The model on the device "meta". None if there is no configuration file (GGUF), or if the model cannot be built
        from the configuration. If the configuration is wrong, loading the model reports the error later.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(world_or(name), trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:
        return None


def load_for(args: Namespace, name: str, dtype: str) -> tuple[Any, Any]:
    """Load a model on ``args.device``. The default is the accelerator if the machine has one, and the CPU otherwise."""
    import torch

    model, tokenizer = load(name, dtype, trust_remote_code=args.trust_remote_code)
    # If a CUDA build of torch finds no GPU, current_accelerator() raises an error (torch 2.6) or returns "cuda".
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = args.device or (accelerator.type if accelerator is not None else "cpu")
    try:
        return model.to(device), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise EditError(
            f"the model cannot be moved to --device {device} ({str(error).splitlines()[0][:200]}); use another device, "
            "for example --device cpu."
        ) from error


def merged(model: Any) -> Any:
    """Merge a PEFT adapter into the weights of its base model, in place.

    A model without an adapter is returned unchanged.

    Raises:
        EditError: PEFT cannot merge this kind of adapter.
    """
    if not hasattr(model, "get_base_model"):
        return model
    if not hasattr(model.base_model, "merge_and_unload"):
        return model.get_base_model()  # Prompt tuning changes no weight.
    try:
        return model.merge_and_unload()
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise EditError(
            f"PEFT cannot merge the adapter into its base model ({error}), so --full cannot measure weight drift; "
            "remove --full."
        ) from error
