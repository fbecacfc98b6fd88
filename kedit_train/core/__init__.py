"""Manage one edit (``EditRun``), connect it to a training loop (``Host``), and compute logits (``OutputHead``)."""

from kedit_train.core.host import Host
from kedit_train.core.output_head import OutputHead, find_language_model
from kedit_train.core.run import EditRun
from kedit_train.core.scope.scope import resolve_scope

__all__ = ["EditRun", "Host", "OutputHead", "find_language_model", "resolve_scope"]
