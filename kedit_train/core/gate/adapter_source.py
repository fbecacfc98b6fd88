"""Find the folder of a PEFT adapter on this machine or on the Hugging Face Hub, and the name of its base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kedit_train.core.gate.gate import find_gate
from kedit_train.core.gate.gate_file import GATE_FILE, WEIGHT_FILES, has_gate
from kedit_train.errors import EditError
from kedit_train.safetensors_header import parse_json
from kedit_train.world import is_world

_CONFIG = "adapter_config.json"
# The files of an adapter and of its tokenizer on the hub.
_FILES = [_CONFIG, GATE_FILE, *WEIGHT_FILES, "*token*", "vocab*", "merges.txt", "*.model", "*.jinja"]
# The end of each error message about the base model of an adapter: what to do instead of naming a base model.
OTHER_WAY = "or merge the adapter with merge_and_unload() and give the folder of the merged model"


def adapter_folder(name: str) -> Path | None:
    """Return the folder of a PEFT adapter, or None if there is no adapter with this name.

    An adapter on the hub is downloaded, together with its gate if it has one. Without a connection to the hub, the
    adapter is read from the download cache.

    Args:
        name: a folder, or a name on the Hugging Face Hub.

    Raises:
        EditError: the adapter is in the download cache, but it is not known whether the adapter has a gate.
    """
    if (Path(name) / _CONFIG).is_file():
        return Path(name)
    if Path(name).exists() or is_world(name) or not _on_hub(name, _CONFIG):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = Path(snapshot_download(name, allow_patterns=_FILES))
    except (OSError, HFValidationError):
        return None  # The error is raised again when the model is loaded.
    if not has_gate(folder) and _on_hub(name, GATE_FILE, revision=folder.name) is None:
        raise EditError(
            f"the adapter {name!r} is in the download cache, but only the hub knows whether it has a gate, and the hub "
            "cannot be reached; load the adapter once with a connection, or, if it has no gate, pass the "
            f"folder {folder} instead of its name."
        )
    return folder


def gated_folder(name: str) -> Path | None:
    """Return the folder of an adapter with a gate, or None if there is no such adapter with this name."""
    folder = adapter_folder(name)
    return folder if folder is not None and has_gate(folder) else None


def adapted_base(name: str) -> str | None:
    """Return the name of the base model of a PEFT adapter, or None if there is no adapter with this name.

    Raises:
        EditError: the configuration of the adapter cannot be read or contains no base model, or the base model is
            itself an adapter.
    """
    folder = adapter_folder(name)
    if folder is None:
        return None
    config = folder / _CONFIG
    try:
        base = parse_json(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise EditError(f"{config} is not a valid PEFT configuration ({error}); save the adapter again.") from error
    if not base:
        raise EditError(f"{config} names no base model; set base_model_name_or_path in this file, {OTHER_WAY}.")
    if adapter_folder(str(base)) is not None:
        raise EditError(
            f"{config} names {base} as the base model, but {base} is itself an adapter; set base_model_name_or_path in "
            "this file to the model without adapters."
        )
    return str(base)


def check_not_gated(model: Any) -> None:
    """Check that a model is not a gated adapter. Gated adapters cannot be trained again.

    A gate compares hidden states of the model with stored hidden states (keys). The keys are valid only for the weights
    with which they were computed.

    Args:
        model: a model, a folder, or a name on the hub.

    Raises:
        EditError: the model is a gated adapter.
    """
    name = model if isinstance(model, str) else None
    if find_gate(model) is not None or (name is not None and gated_folder(name) is not None):
        raise EditError(
            f"{'the model' if name is None else repr(name)} is a gated adapter, which cannot be trained again; train "
            "its base model with the earlier edits and the new edits together."
        )


def _on_hub(name: str, file: str, revision: str | None = None) -> bool | None:
    """Return whether a repository on the hub contains a file, or None if this is not known."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        cached = try_to_load_from_cache(name, file, revision=revision)
        if cached is not None:
            return isinstance(cached, str)
        hf_hub_download(name, file, revision=revision)
    except LocalEntryNotFoundError:
        return None
    except EntryNotFoundError:
        return False
    except (OSError, HFValidationError):
        return None
    return True
