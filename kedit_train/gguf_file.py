"""Load a GGUF file as an ordinary model: the weights are dequantized and can be saved as safetensors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from kedit_train.errors import EditError
from kedit_train.optional import require


def is_gguf(name: str) -> bool:
    """Return whether ``name`` is the path of a GGUF file."""
    return name.lower().endswith(".gguf")


def load_gguf(path: str | Path, *, dtype: str | torch.dtype = "float32") -> tuple[Any, dict[str, Any]]:
    """Load the causal language model of a GGUF file, and dequantize its weights.

    ``transformers`` marks such a model as quantized and refuses to save it. Therefore, the weights are copied into a
    new model without this mark.

    Args:
        path: the GGUF file. Only the model is loaded. To load the tokenizer from the same file, call
            ``AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)``.
        dtype: the dtype of the weights. "auto" is float32, because a GGUF file stores several dtypes.

    Returns:
        The model in evaluation mode, and the loading information of ``transformers``.

    Raises:
        EditError: the file does not exist, or ``gguf`` is not installed.
    """
    from transformers import AutoModelForCausalLM

    path = Path(path)
    if not path.is_file():
        raise EditError(f"model {str(path)!r} is not a file; give the path of a GGUF file on this machine.")
    with require("gguf"):
        import gguf  # noqa: F401  # transformers imports it while it reads the file
    dtype = torch.float32 if dtype == "auto" else dtype
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=dtype, output_loading_info=True
    )
    quantized, info = loaded
    config = copy.deepcopy(quantized.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(quantized)(config).to(quantized.dtype)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    return model.eval(), info
