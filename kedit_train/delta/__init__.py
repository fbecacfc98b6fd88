"""Deltas: save the weight changes of a run, and apply, revert, add, scale and merge them."""

from kedit_train.delta.edit_delta import EditDelta
from kedit_train.delta.merge import merge, sparsify
from kedit_train.delta.sweep import Sweep, SweepPoint, sweep
from kedit_train.delta.task_vector import TaskVector

__all__ = ["EditDelta", "Sweep", "SweepPoint", "TaskVector", "merge", "sparsify", "sweep"]
