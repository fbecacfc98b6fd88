"""An edit as a file: save, apply, revert, add, scale and merge what a run changed."""

from kedit_train.delta.edit_delta import EditDelta
from kedit_train.delta.merge import merge, sparsify
from kedit_train.delta.sweep import Sweep, SweepPoint, sweep
from kedit_train.delta.task_vector import TaskVector

__all__ = ["EditDelta", "Sweep", "SweepPoint", "TaskVector", "merge", "sparsify", "sweep"]
