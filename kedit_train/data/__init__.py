"""Edits: records, files of records, tokens and batches."""

from kedit_train.data.collator import EditCollator
from kedit_train.data.dataset import EditDataset
from kedit_train.edit import Edit, Probe

__all__ = ["Edit", "EditCollator", "EditDataset", "Probe"]
