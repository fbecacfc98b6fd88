"""Warn if the training examples do not contain the prompts of the edits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kedit_train.core.cache.sequence_keys import real_tokens
from kedit_train.core.run import EditRun
from kedit_train.core.weak_hook import weak_hook
from kedit_train.data.visible import without_spaces
from kedit_train.edit import Edit
from kedit_train.errors import reported_by, warn

# Number of training examples that are read.
_EXAMPLES = 32


class UntrainedEdits:
    """Reads the first training examples of a run, and warns if none of them contains the prompt of an edit.

    Create the object in ``attach`` of a callback, and keep it until ``detach``. It reads the token ids that the model
    receives, so it works in every training loop.

    Args:
        run: the run.
        tokenizer: the tokenizer of the model.
        edits: the edits that the callback was given.
        component: the name of the callback, for the warning.
    """

    def __init__(self, run: EditRun, tokenizer: Any, edits: Sequence[Edit], component: str) -> None:
        self._run, self._tokenizer, self._component = run, tokenizer, component
        self._prompts = {without_spaces(edit.prompt) for edit in edits}
        self._rows = 0
        self._handle = run.model.register_forward_pre_hook(weak_hook(self._read), with_kwargs=True)

    def stop(self) -> None:
        """Read no more examples."""
        self._handle.remove()

    def _read(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.ndim != 2 or not torch.is_grad_enabled():
            return
        if self._run.steps.adding_penalties:
            return
        for row, real in zip(ids, real_tokens(kwargs.get("attention_mask"), ids), strict=True):
            text = without_spaces(self._tokenizer.decode(row[real].tolist()))
            if any(prompt in text for prompt in self._prompts):
                self.stop()
                return
            self._rows += 1
        if self._rows >= _EXAMPLES:
            self.stop()
            with reported_by(self._component):
                warn(
                    f"none of the first {self._rows} training examples contains the prompt of an edit. If the training "
                    "data does not contain the edits, set edits= to the edits in the training data."
                )
