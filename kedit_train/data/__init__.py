"""Edits as data: single edits, datasets of edits, and a collator for batches."""

from kedit_train.data.chat_format import ChatFormat
from kedit_train.data.collator import EditCollator
from kedit_train.data.dataset import EditDataset
from kedit_train.data.documents import split_documents
from kedit_train.edit import Edit, Probe

__all__ = ["ChatFormat", "Edit", "EditCollator", "EditDataset", "Probe", "split_documents"]
