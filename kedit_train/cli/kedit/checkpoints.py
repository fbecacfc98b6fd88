"""Find and load a model by folder, by hub name, or by the name "world" (the bundled model)."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from kedit_train import world
from kedit_train.errors import EditError
from kedit_train.optional import require
from kedit_train.safetensors_header import parse_json

# The files of a transformers model, except pickled weights, because loading a pickle can execute code.
_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.md", "*.py"]
_MERGE = "or merge the adapter with merge_and_unload() and give the folder of the merged model"


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
        raise EditError(f"model {name} is a file; give the folder of a checkpoint, a hub name, or 'world'.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except (OSError, HFValidationError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise EditError(
            f"model {name!r} is not a folder and cannot be loaded from the hub ({reason.partition('. ')[0][:200]}); "
            "give the folder of a checkpoint, the hub name of a model that you can download, or 'world'."
        ) from error


def load(name: str, dtype: str, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Load a model and its tokenizer. A PEFT adapter is loaded on top of its base model.

    The adapter is not merged into the base model, because merging into bf16 weights would round the adapter's effect.
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
        raise EditError(
            f"the base model {base!r} of the adapter {name} cannot be loaded ({error}); correct "
            f"base_model_name_or_path in adapter_config.json, {_MERGE}."
        ) from error
    with loading_errors(name, f"is an adapter that does not fit its base model {base!r}"):
        adapted = PeftModel.from_pretrained(model, name)
    if (Path(name) / "tokenizer_config.json").is_file():
        with loading_errors(name, "comes with a tokenizer that cannot be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    return adapted.eval(), tokenizer


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
    accelerator = torch.accelerator.current_accelerator()
    device = args.device or (accelerator.type if accelerator is not None else "cpu")
    try:
        return model.to(device), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise EditError(
            f"the model cannot be moved to --device {device} ({str(error).splitlines()[0][:200]}); use another device, "
            "for example --device cpu."
        ) from error


def adapted_base(name: str) -> str | None:
    """Return the name of the base model of a PEFT adapter, or None if ``name`` is not an adapter folder.

    Raises:
        EditError: the configuration of the adapter cannot be read, or names no base model.
    """
    config = Path(name) / "adapter_config.json"
    if not config.is_file():
        return None
    try:
        base = parse_json(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise EditError(f"{config} is not a valid PEFT configuration ({error}); save the adapter again.") from error
    if not base:
        raise EditError(f"{config} names no base model; set base_model_name_or_path in this file, {_MERGE}.")
    return str(base)


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
