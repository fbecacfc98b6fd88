"""Checkpoints by name: a causal language model and its tokenizer, and the adapter that is to train on it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from kedit_train import world
from kedit_train.errors import EditError
from kedit_train.optional import require


def load_model(name: str, *, dtype: str = "float32", trust_remote_code: bool = False) -> tuple[Any, Any]:
    """A causal language model and its tokenizer from a hub name, a folder or "world".

    Raises:
        EditError: either is not there, the model is no causal language model, or some of its weights are missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if world.is_world(name):
        name = str(world.path())
    with loading_errors(name, "cannot be loaded as a causal language model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    model, info = loaded
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise EditError(
            f"model {name!r} has no weights for {missing}, so {type(model).__name__} would start from random ones: "
            "give the checkpoint of a causal language model"
        )
    if not is_causal(model):
        raise EditError(
            f"model {name!r} ({type(model).__name__}) lets a token see those after it, so it cannot be asked to "
            "continue a prompt: give the checkpoint of a causal language model"
        )
    with loading_errors(name, "comes without a tokenizer that can be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    return model, tokenizer


@torch.no_grad()
def is_causal(model: Any) -> bool:
    """Whether the answers at the first positions stay when the last token of the input is another one.

    ``AutoModelForCausalLM`` loads encoders too, and configurations do not tell (``is_decoder`` is False for GPT-NeoX).
    """
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7]], device=model.device)
    logits = model.eval()(input_ids=ids).logits.float()
    change = (logits[0] - logits[1]).norm(dim=-1)
    if bool(change.isnan().any()):
        raise EditError(
            f"{type(model).__name__} gives NaN logits: its weights have diverged; give a checkpoint from before that, "
            "or load it in a wider dtype"
        )
    return bool(change[:-1].max() <= torch.finfo(model.dtype).eps ** 0.5 * change[-1])


@contextmanager
def loading_errors(name: str, problem: str) -> Iterator[None]:
    """Turn what ``transformers`` says over many lines into one."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        local = "" if Path(name).is_dir() else " (there is no such folder here)"
        raise EditError(
            f"model {name!r}{local} {problem}: {reason[:300]}; give a hub name, a folder saved by save_pretrained, or "
            "'world'"
        ) from error


def lora_config(arguments: Mapping[str, Any]) -> Any:
    """peft's ``LoraConfig`` for a causal language model.

    Raises:
        EditError: peft is not installed, or refuses the arguments.
    """
    with require("peft"):
        from peft import LoraConfig
    unknown = [name for name in arguments if name not in inspect.signature(LoraConfig).parameters]
    if unknown:
        raise EditError(
            f"lora: peft's LoraConfig has no argument {unknown[0]!r}; see its documentation for those it has"
        )
    every: dict[str, Any] = {"task_type": "CAUSAL_LM", **arguments}
    with peft_errors(f"lora={dict(arguments)}"):
        return LoraConfig(**every)


@contextmanager
def peft_errors(what: str) -> Iterator[None]:
    """Turn what ``peft`` says into one line."""
    try:
        yield
    except (ValueError, TypeError, KeyError) as error:
        raise EditError(f"{what} is refused by peft: {' '.join(str(error).split())[:300]}") from error
