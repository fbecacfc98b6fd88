"""Formulas for the memory in bytes that an edit needs in addition to the weights of the model.

The model is stored in bf16, and ``ParameterScope`` trains the edited matrices in fp32. Activations are not counted,
because they depend on the batch, and are the same with and without an edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from kedit_train.core.scope.scope import resolve_scope

BF16, FP32, FP64 = 2, 4, 8


@dataclass(frozen=True)
class Scope:
    """The edited matrices of a model.

    Args:
        shapes: the shapes of the matrices: (out, in), or (experts, out, in).
        hidden: the width of the hidden states.
        parameters: number of parameters of the whole model.
    """

    shapes: Sequence[tuple[int, ...]]
    hidden: int
    parameters: int

    @property
    def entries(self) -> int:
        """Number of entries in all matrices."""
        return sum(self.largest_of([shape]) for shape in self.shapes)

    @property
    def largest(self) -> int:
        """Number of entries in the largest matrix."""
        return self.largest_of(self.shapes)

    @staticmethod
    def largest_of(shapes: Sequence[tuple[int, ...]]) -> int:
        return max(int(torch.Size(shape).numel()) for shape in shapes)

    @classmethod
    def of(cls, model: Any, layers: Any, modules: str) -> Scope:
        """Return the scope that ``ParameterScope(layers, modules=modules)`` selects. The model may be on ``meta``."""
        chosen = resolve_scope(model, layers, modules)
        count = sum(p.numel() for p in model.parameters())
        return cls([tuple(p.shape) for p in chosen.values()], model.config.hidden_size, count)


def weights(scope: Scope) -> int:
    """The weights of the model, in bf16."""
    return BF16 * scope.parameters


def scope_bytes(scope: Scope) -> int:
    """The matrices in fp32, and their values before the edit in fp32."""
    return 2 * FP32 * scope.entries


def step_bytes(scope: Scope) -> int:
    """The peak of a step of Adam, with the memory of :func:`scope_bytes`.

    The two moments of Adam (fp32) exist in the whole step. In the backward pass, gradients (fp32) and copies of the
    matrices (bf16) are added, and one gradient in bf16. In the step, the gradients and two temporary tensors of one
    matrix are added.
    """
    s, m = scope.entries, scope.largest
    kept = scope_bytes(scope) + 2 * FP32 * s
    return kept + max(FP32 * s + BF16 * s + BF16 * m, FP32 * s + 2 * FP32 * m)


def null_space_step_bytes(scope: Scope) -> int:
    """The peak of a step of Adam with ``NullSpace``, without the stored directions.

    After the step, the projected weights (fp32) and three temporary tensors of one matrix exist beside the gradients.
    """
    s, m = scope.entries, scope.largest
    projection = scope_bytes(scope) + 3 * FP32 * s + FP32 * (s - m) + 3 * FP32 * m
    return max(step_bytes(scope), projection)


def statistics_bytes(scope: Scope, vectors: int) -> int:
    """The peak while ``NullSpace`` computes its directions, without the memory of :func:`scope_bytes`.

    The second moments of all matrices (fp32) exist together. For one matrix at a time, the mean (fp32) and a copy in
    fp64 are added, and then the memory of the eigenvectors. With up to d / 2 input vectors, these are computed in the
    span of the vectors, which needs about five tensors [d, vectors] in fp64. With more vectors, all eigenvectors are
    computed, which needs the eigenvectors and a work space of 2 d² in fp64.

    Args:
        scope: the edited matrices.
        vectors: number of tokens in the texts.
    """
    inputs = [shape[-1] for shape in scope.shapes]
    moments = sum(FP32 * d * d for d in inputs)

    def one(d: int) -> int:
        span = 5 * FP64 * d * (vectors + 8) if 2 * vectors <= d else 3 * FP64 * d * d
        return FP32 * d * d + FP64 * d * d + span

    return moments + max(map(one, inputs))


def directions_bytes(scope: Scope, rank: int) -> int:
    """The directions that ``NullSpace`` keeps (fp32): those to preserve or their complement, whichever are fewer."""
    return sum(FP32 * shape[-1] * min(rank, shape[-1] - rank) for shape in scope.shapes)


def hidden_state_bytes(scope: Scope, tokens: int) -> int:
    """The hidden states (bf16) that ``PrefixCache`` or ``KLLocality`` stores for these tokens."""
    return BF16 * scope.hidden * tokens


def delta_bytes(scope: Scope) -> int:
    """The delta file: the values before and after the edit, in bf16, if every row and column has changed."""
    return 2 * BF16 * scope.entries


LLAMA: dict[str, Any] = {"vocab_size": 128_256, "num_key_value_heads": 8, "tie_word_embeddings": False}
MOE: dict[str, Any] = {
    "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 94,
    "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536, "tie_word_embeddings": False,
}  # fmt: skip


def llama(layers: int, hidden: int, intermediate: int, heads: int, **others: Any) -> transformers.LlamaConfig:
    """Return the configuration of a Llama with these sizes."""
    return transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        **LLAMA | others,
    )  # fmt: skip


# The shapes of published models, from their config.json on the Hugging Face Hub.
MODELS: dict[str, Any] = {
    "Llama-3.1-8B": lambda: llama(32, 4096, 14_336, 32),
    "Llama-3.1-70B": lambda: llama(80, 8192, 28_672, 64),
    "Qwen3-235B-A22B": lambda: transformers.Qwen3MoeConfig(**MOE),
}


def on_meta(config: Any) -> Any:
    """Return a model without values: its parameters have shapes but need no memory."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
