"""An edit is a file: what changed, saved, applied, taken back, and calculated with."""

from kedit_train.delta.edit_delta import EditDelta
from kedit_train.delta.merge import merge, sparsify
from kedit_train.delta.sweep import Point, Sweep, sweep
from kedit_train.delta.task_vector import Relation, TaskVector, analogy, cosine, relation

__all__ = [
    "EditDelta",
    "Point",
    "Relation",
    "Sweep",
    "TaskVector",
    "analogy",
    "cosine",
    "merge",
    "relation",
    "sparsify",
    "sweep",
]
