"""Finding and loading models by the names that users give: a folder, a hub name, or "world"."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from kedit_train import world
from kedit_train.errors import EditError
from kedit_train.optional import require

# The files of a transformers model, without weights that would have to be unpickled.
_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.md", "*.py"]
_MERGE = "or merge it with merge_and_unload() and give the folder of the merged model"


def world_or(name: str) -> str:
    """Return the folder of the embedded model for "world", and any other name unchanged."""
    return str(world.path()) if world.is_world(name) else name


def folder_of(name: str) -> Path:
    """Return the folder of a checkpoint; a hub name is downloaded, or read from the cache.

    Raises:
        EditError: there is no such folder, and no such model on the hub.
    """
    folder = Path(world_or(name))
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise EditError(f"{name} is a file; give the folder of a checkpoint, a hub name, or 'world'.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except (OSError, HFValidationError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise EditError(
            f"{name!r} is neither a folder nor a model on the hub ({reason.partition('. ')[0][:200]}); give the folder "
            "of a checkpoint, a hub name, or 'world'."
        ) from error


def load(name: str, dtype: str, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Load a model and its tokenizer; a PEFT adapter is loaded on its base model.

    An adapter is not merged, because merging would round its effect if the weights are in bf16.
    """
    from transformers.utils import logging

    from kedit_train.pretrained import load_model, loading_errors

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    base = adapted_base(name)
    if base is None:
        return load_model(name, dtype=dtype, trust_remote_code=trust_remote_code)
    with require("peft"):
        from peft import PeftModel
    from transformers import AutoTokenizer

    try:
        model, tokenizer = load_model(base, dtype=dtype, trust_remote_code=trust_remote_code)
    except EditError as error:
        raise EditError(f"{name} is an adapter of {base!r}, and {error}; {_MERGE}.") from error
    with loading_errors(name, f"is an adapter that does not fit its base {base!r}"):
        adapted = PeftModel.from_pretrained(model, name)
    if (Path(name) / "tokenizer_config.json").is_file():
        with loading_errors(name, "comes with a tokenizer that cannot be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    return adapted.eval(), tokenizer


def load_for(args: Namespace, name: str, dtype: str) -> tuple[Any, Any]:
    """Load a model on ``args.device``; by default on the accelerator, if there is one."""
    import torch

    model, tokenizer = load(name, dtype, trust_remote_code=args.trust_remote_code)
    accelerator = torch.accelerator.current_accelerator()
    device = args.device or (accelerator.type if accelerator is not None else "cpu")
    try:
        return model.to(device), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise EditError(
            f"--device {device}: {str(error).splitlines()[0][:200]}; remove the option, or use --device cpu."
        ) from error


def adapted_base(name: str) -> str | None:
    """Return the base model that a PEFT adapter folder names; None for any other name.

    Raises:
        EditError: the configuration of the adapter cannot be read, or names no base.
    """
    config = Path(name) / "adapter_config.json"
    if not config.is_file():
        return None
    try:
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise EditError(f"{config} is not a valid PEFT configuration ({error}); save the adapter again.") from error
    if not base:
        raise EditError(f"{config} names no base; set base_model_name_or_path, {_MERGE}.")
    return str(base)


def merged(model: Any) -> Any:
    """Merge the adapter of a model into its weights, in place; return any other model unchanged.

    Raises:
        EditError: PEFT cannot merge this kind of adapter.
    """
    if not hasattr(model, "get_base_model"):
        return model
    if not hasattr(model.base_model, "merge_and_unload"):
        return model.get_base_model()  # prompt tuning changes no weight
    try:
        return model.merge_and_unload()
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise EditError(
            f"PEFT cannot merge this adapter ({error}), so its weight drift cannot be measured; remove --full."
        ) from error
