"""Pure tensor functions, one idea a file: tensors in, tensors out, no model and no host."""

from kedit_train.functional.chunked_loss import chunk_length, chunked
from kedit_train.functional.dft import dynamic_cross_entropy
from kedit_train.functional.divergence import jensen_shannon, kl_divergence, token_divergence
from kedit_train.functional.overtone import (
    overtone,
    overtone_statistics,
    overtone_target,
    smoothed_loss,
    uniform,
    uniform_target,
)

__all__ = [
    "chunk_length",
    "chunked",
    "dynamic_cross_entropy",
    "jensen_shannon",
    "kl_divergence",
    "overtone",
    "overtone_statistics",
    "overtone_target",
    "smoothed_loss",
    "token_divergence",
    "uniform",
    "uniform_target",
]
