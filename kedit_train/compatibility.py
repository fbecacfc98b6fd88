"""Functions that work the same with all supported versions of Python, transformers, TRL and PEFT."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

TRANSFORMERS_4 = version("transformers").startswith("4.")
# The names of the key-value cache in the arguments and the outputs of a model. transformers 5.24 renamed it to "cache".
_CACHE_NAMES = ("cache", "past_key_values")


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 checksum of a file as hexadecimal digits, without reading the whole file into memory.

    Python 3.10 has no ``hashlib.file_digest``.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sft_reads_logits(args: Any) -> bool:
    """Return True if the trainer is an ``SFTTrainer`` that reads the logits of training steps.

    The ``SFTTrainer`` of older TRL versions computes the entropy and the token accuracy of each step from the logits.
    Newer versions compute both in a fused output head, which does not return logits.

    Args:
        args: the training arguments of the trainer.
    """
    config, utils = (sys.modules.get(f"trl.trainer.{name}") for name in ("sft_config", "utils"))
    is_sft = config is not None and isinstance(args, config.SFTConfig)
    return is_sft and not hasattr(utils, "FusedCausalLMOutput") and not args.use_liger_kernel


def checkpoint_without_reentry(args: Any) -> None:
    """Choose non-reentrant activation checkpointing, unless the user has chosen a kind of checkpointing.

    Non-reentrant checkpointing is the default of transformers 5. The default of transformers 4 is reentrant
    checkpointing, which computes no gradients if the first layers are frozen. ``ParameterScope`` usually freezes them.

    Args:
        args: the training arguments of a ``transformers.Trainer``.
    """
    if TRANSFORMERS_4 and args.gradient_checkpointing:
        args.gradient_checkpointing_kwargs = {"use_reentrant": False, **(args.gradient_checkpointing_kwargs or {})}


@contextmanager
def keeping_checkpointing(trainer: Any) -> Iterator[None]:
    """Context manager: keep the ``gradient_checkpointing_kwargs`` when TRL turns checkpointing off and on again.

    Some trainers of TRL generate completions. They turn activation checkpointing off for the generation. Older versions
    of TRL then turn checkpointing on again without the ``gradient_checkpointing_kwargs``. With transformers 4,
    checkpointing would be reentrant from then on.

    Args:
        trainer: a ``transformers.Trainer`` whose training loop runs inside the context.
    """
    name, args, model = "gradient_checkpointing_enable", trainer.args, trainer.model
    replace = TRANSFORMERS_4 and args.gradient_checkpointing and name not in vars(model)
    if replace:
        given = {"gradient_checkpointing_kwargs": args.gradient_checkpointing_kwargs}
        vars(model)[name] = partial(getattr(model, name), **given)
    try:
        yield
    finally:
        if replace:
            vars(model).pop(name, None)


def rescaled_dare(dare: Callable[..., Any]) -> Callable[..., Any]:
    """Return PEFT's ``dare_linear``, corrected for PEFT before 0.19.

    DARE sets random entries to 0 and keeps the others. The fraction of kept entries is called the density. The kept
    entries must be divided by the density, but PEFT before 0.19 does not divide them.

    Args:
        dare: ``dare_linear`` of PEFT, a function of the tensors, the weights and the density.
    """
    if tuple(int(part) for part in version("peft").split(".")[:2]) >= (0, 19):
        return dare
    return lambda tensors, weights, density: dare(tensors, weights, density) / density


def cache_argument(model: Any) -> str | None:
    """Return the name of the argument of ``forward`` that receives the key-value cache, or None if there is none.

    The result is None for recurrent models such as Mamba, which have no key-value cache. Since transformers 5.24, these
    models have an argument ``cache`` too, but it receives their recurrent state.

    Args:
        model: a model of transformers.
    """
    parameters = inspect.signature(model.forward).parameters
    name = next((name for name in _CACHE_NAMES if name in parameters), None)
    return None if name == "cache" and _is_recurrent(model) else name


def _is_recurrent(model: Any) -> bool:
    if not getattr(model, "_is_stateful", False):
        return False
    from transformers import DynamicCache

    # A model with recurrent and attention layers also stores keys and values.
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return are_recurrent(layers) or not model._supports_default_dynamic_cache()


def are_recurrent(layers: Sequence[Any]) -> bool:
    """Return True if all layers of a cache store recurrent states, as in Mamba, or if there are no layers."""
    return all(type(layer).__name__ == "LinearAttentionLayer" for layer in layers)


def read_cache(source: Any) -> Any:
    """Return the key-value cache in the arguments or in the output of a forward pass, or None.

    Args:
        source: the arguments by name, or the output of a model.
    """
    # In transformers 5.24, getattr(output, "past_key_values") would print a deprecation warning.
    values: Mapping[str, Any] = source if type(source) is dict else getattr(source, "__dict__", {})
    return next((values[name] for name in _CACHE_NAMES if values.get(name) is not None), None)


def remove_cache(output: Any) -> None:
    """Set the key-value cache in the output of a model to None. An output without a cache does not change."""
    for name in _CACHE_NAMES:
        if name in getattr(output, "__dict__", {}):
            setattr(output, name, None)
