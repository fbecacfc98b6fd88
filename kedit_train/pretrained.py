"""Load a causal language model with its tokenizer, and create the configuration of a LoRA adapter."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kedit_train import world
from kedit_train.core.gate.adapter_source import OTHER_WAY, adapted_base, adapter_folder
from kedit_train.core.gate.gate import Gate
from kedit_train.core.gate.gate_file import has_gate
from kedit_train.data.tokenization import shorten
from kedit_train.errors import EditError
from kedit_train.gguf_file import is_gguf, load_gguf
from kedit_train.optional import require
from kedit_train.quantized_layers import PackingGuard


def load_model(name: str, *, dtype: str = "float32", trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    A PEFT adapter is loaded on top of its base model. It is not merged into the base model, because rounding to bf16
    weights would lose part of the adapter's effect. If the folder or hub repository of the adapter contains the file
    ``gate.safetensors``, the gate in this file is loaded too. The gate lets the adapter act only on some inputs (see
    ``GatedAdapter``). A vision-language model is loaded with its vision tower.

    Args:
        name: a model name on the Hugging Face Hub, a folder saved by ``save_pretrained``, the folder of a PEFT
            adapter, a ``.gguf`` file, or "world" for the tiny model that comes with kedit-train. The weights of a GGUF
            file are dequantized.
        dtype: the dtype of the loaded weights. "auto" keeps the dtype of the saved weights.
        trust_remote_code: whether to run Python code that comes with the model.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        EditError: the model, its adapter, its gate or its tokenizer cannot be loaded. This error is also raised if
            weights are missing, or if the model is not a causal language model.

    Example:
        >>> from kedit_train import load_model
        >>> model, tokenizer = load_model("world")
        >>> model.config.model_type
        'llama'
    """
    from transformers import AutoTokenizer

    base = adapted_base(name)
    if base is not None:
        folder = str(adapter_folder(name))
        return _load_adapted(folder, base, dtype=dtype, trust_remote_code=trust_remote_code)
    if world.is_world(name):
        name = str(world.path())
    with loading_errors(name, "cannot be loaded as a causal language model"):
        loaded: Any = (
            load_gguf(name, dtype=dtype)
            if is_gguf(name)
            else _auto_class(name, trust_remote_code).from_pretrained(
                name, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
            )
        )
    model, info = loaded
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise EditError(
            f"model {name!r} has no weights for {missing}, so {type(model).__name__} would initialize these weights "
            "randomly; use the checkpoint of a causal language model."
        )
    if not is_causal(model):
        raise EditError(
            f"model {name!r} ({type(model).__name__}) is not causal: the logits of a token depend on later tokens; use "
            "the checkpoint of a causal language model."
        )
    with loading_errors(name, "has no tokenizer that can be loaded"):
        if is_gguf(name):
            tokenizer = AutoTokenizer.from_pretrained(str(Path(name).parent), gguf_file=Path(name).name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    return model, tokenizer


def _auto_class(name: str, trust_remote_code: bool) -> Any:
    """Return ``AutoModelForImageTextToText`` for a vision-language model, else ``AutoModelForCausalLM``."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    only_with_images = (
        type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    )
    return transformers.AutoModelForImageTextToText if only_with_images else transformers.AutoModelForCausalLM


def _load_adapted(name: str, base: str, *, dtype: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """Load a PEFT adapter on top of its base model, and the gate if one is saved with the adapter."""
    with require("peft"):
        from peft import PeftModel
    from transformers import AutoTokenizer

    # A damaged gate is reported before a large model is loaded.
    gate = Gate.load(name) if has_gate(name) else None
    try:
        model, tokenizer = load_model(base, dtype=dtype, trust_remote_code=trust_remote_code)
    except EditError as error:
        raise EditError(
            f"the base model {base!r} of the adapter {name} cannot be loaded; correct "
            f"base_model_name_or_path in adapter_config.json, {OTHER_WAY}. The reason: {error}"
        ) from error
    with loading_errors(name, f"is an adapter that does not fit its base model {base!r}"):
        adapted = PeftModel.from_pretrained(model, name)
    if (Path(name) / "tokenizer_config.json").is_file():
        with loading_errors(name, "comes with a tokenizer that cannot be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if gate is not None:
        gate.install(adapted)
    return adapted.eval(), tokenizer


def check_new_adapter(model: Any, name: str) -> None:
    """Check that a new LoRA adapter can be added to a model.

    Args:
        model: the model.
        name: the name or the folder of the model, for the error message.

    Raises:
        EditError: the model already has an adapter. The new adapter would replace it.
    """
    if hasattr(model, "peft_config"):
        raise EditError(
            f"lora must be None, because {name!r} already has an adapter, and a new adapter would replace it; train "
            "the base model with the old and the new edits, or merge the adapter first (a gated adapter cannot be "
            "merged)."
        )


@torch.no_grad()
def is_causal(model: Any) -> bool:
    """Return whether the model is causal. In a causal model, later tokens do not change the logits of earlier tokens.

    The function compares the logits of two sequences that differ only in their last token. The configuration of a model
    does not reliably show whether the model is causal. For example, ``is_decoder`` is False for GPT-NeoX, although
    GPT-NeoX is causal. ``AutoModelForCausalLM`` does not show it either, because it also loads encoders.

    Raises:
        EditError: the logits are NaN.
    """
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7]], device=model.device)
    packing = PackingGuard(model)
    logits = model.eval()(input_ids=ids).logits.float()
    packing.remove()
    change = (logits[0] - logits[1]).norm(dim=-1)
    if bool(change.isnan().any()):
        raise EditError(
            f"the logits of {type(model).__name__} are NaN, for example because of an overflow in half precision; load "
            "the model in float32. If the logits are NaN in float32 too, use another checkpoint, because the weights "
            "of this checkpoint are invalid."
        )
    return bool(change[:-1].max() <= torch.finfo(model.dtype).eps ** 0.5 * change[-1])


@contextmanager
def loading_errors(name: str, problem: str) -> Iterator[None]:
    """Replace an error of ``transformers``, which may have many lines, by an ``EditError`` of one line."""
    try:
        yield
    except EditError:
        raise
    # Damaged files cause many kinds of errors: tokenizers, for example, raises Exception itself.
    except Exception as error:
        # The other sentences often give advice for users of transformers or torch.
        reason = shorten(str(error).partition(". ")[0], 300).rstrip(".") or type(error).__name__
        local = "" if Path(name).exists() else " (no such folder on this machine)"
        raise EditError(
            f"model {name!r}{local} {problem}: {reason}; use a Hugging Face Hub name, a folder saved by "
            'save_pretrained, a .gguf file, or "world" (the bundled model).'
        ) from error


def lora_config(arguments: Mapping[str, Any]) -> Any:
    """Return the ``LoraConfig`` of PEFT for a causal language model.

    Args:
        arguments: arguments of ``LoraConfig``.

    Raises:
        EditError: peft is not installed, or does not accept the arguments.
    """
    with require("peft"):
        from peft import LoraConfig
    unknown = [name for name in arguments if name not in inspect.signature(LoraConfig).parameters]
    if unknown:
        raise EditError(
            f"lora: LoraConfig of peft has no argument {unknown[0]!r}; see the arguments in the peft documentation."
        )
    with peft_errors(f"lora={dict(arguments)}"):
        return LoraConfig(**{"task_type": "CAUSAL_LM", **arguments})


@contextmanager
def peft_errors(what: str) -> Iterator[None]:
    """Replace an error of ``peft``, which may have many lines, by an ``EditError`` of one line."""
    try:
        yield
    except (ValueError, TypeError, KeyError) as error:
        raise EditError(f"{what} is not accepted by peft: {' '.join(str(error).split())[:300]}") from error
