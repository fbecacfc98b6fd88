"""Edits: what they are, where they are read from, how they become tokens."""

from kedit_train.data.dataset import EditDataset
from kedit_train.edit import Edit, Probe

__all__ = ["Edit", "EditDataset", "Probe"]
