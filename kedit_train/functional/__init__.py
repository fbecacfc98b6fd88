"""Pure tensor functions, one topic per file. They need no model and no training framework."""

from kedit_train.functional.chunked_loss import chunk_length, chunked
from kedit_train.functional.clipping import smoothed_loss
from kedit_train.functional.cross_entropy import cross_entropy
from kedit_train.functional.dft import dynamic_cross_entropy
from kedit_train.functional.divergence import jensen_shannon, kl_divergence, token_divergence
from kedit_train.functional.labels import IGNORE_INDEX
from kedit_train.functional.overtone import overtone, overtone_statistics, overtone_target
from kedit_train.functional.uniform_smoothing import uniform, uniform_target

__all__ = [
    "IGNORE_INDEX",
    "chunk_length",
    "chunked",
    "cross_entropy",
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
