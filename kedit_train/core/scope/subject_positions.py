"""Find the tokens of the subjects of edits in training batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kedit_train.data.neighbor_prompts import subject_spans
from kedit_train.edit import Edit


class SubjectPositions:
    """Finds the positions of the subjects of edits in rows of token ids.

    A row is one sequence of a batch, and belongs to an edit if its text contains the prompt of the edit. The prompt may
    be inside of a chat template or after other text, and a packed row can contain several prompts.

    If the first token of a row contains the whole subject, all tokens of the prompt count as subject tokens. In most
    models, the hidden states at the first position hardly depend on the token (an attention sink), so an edit cannot be
    learned there.

    Args:
        tokenizer: the tokenizer of the rows.
        edits: the edits. Edits whose prompt does not contain their subject are ignored.

    Attributes:
        rows: number of rows so far.
        found: number of rows so far that contain a prompt with its subject.
        tokens: number of tokens in all rows so far, without padding.
        chosen: number of these tokens for which :meth:`find` has returned True.
        whole_prompts: number of rows so far whose first token contains a whole subject.
    """

    def __init__(self, tokenizer: Any, edits: Sequence[Edit]) -> None:
        self._tokenizer = tokenizer
        self._subjects = {edit.prompt: spans for edit in edits if (spans := subject_spans(edit))}
        self._known: dict[tuple[int, ...], list[int] | None] = {}
        self._whole: set[tuple[int, ...]] = set()
        self.rows = self.found = self.tokens = self.chosen = self.whole_prompts = 0

    def find(self, ids: Tensor, real: Tensor) -> Tensor:
        """Return which positions belong to a subject.

        Args:
            ids: [rows, length], token ids.
            real: [rows, length], bool: which positions are tokens and not padding.

        Returns:
            [rows, length], bool, True at the tokens of subjects. A row without a prompt of an edit is True everywhere.
        """
        chosen = torch.ones(ids.shape, dtype=torch.bool)
        for row, (own, mask) in enumerate(zip(ids.tolist(), real.tolist(), strict=True)):
            columns = [column for column, is_real in enumerate(mask) if is_real]
            tokens = tuple(own[column] for column in columns)
            positions = self._positions(tokens)
            self.rows += 1
            self.whole_prompts += tokens in self._whole
            self.tokens += len(columns)
            self.chosen += len(columns if positions is None else positions)
            if positions is not None:
                self.found += 1
                chosen[row] = False
                chosen[row, [columns[position] for position in positions]] = True
        return chosen.to(ids.device)

    def _positions(self, tokens: tuple[int, ...]) -> list[int] | None:
        """Return the indices of the subject tokens in a row, or None if the row contains no prompt of an edit."""
        if tokens not in self._known:
            found = list(self._spans(self._text(tokens)))
            self._known[tokens] = self._overlapping(tokens, found) if found else None
        return self._known[tokens]

    def _spans(self, text: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """Yield the character span of each subject in a text, and the span of its prompt."""
        for prompt, spans in self._subjects.items():
            at = text.find(prompt)
            while at >= 0:
                yield from (((at + begin, at + end), (at, at + len(prompt))) for begin, end in spans)
                at = text.find(prompt, at + 1)

    def _overlapping(
        self, tokens: tuple[int, ...], found: Sequence[tuple[tuple[int, int], tuple[int, int]]]
    ) -> list[int]:
        """Return the indices of the tokens that contain a character of a subject."""
        last = max(end for _, (_, end) in found)
        extents, begin = [], 0
        while begin < last and len(extents) < len(tokens):
            end = len(self._text(tokens[: len(extents) + 1]))
            extents.append((begin, end))
            begin = end
        chosen: set[int] = set()
        for subject, prompt in found:
            own = _indices(extents, subject)
            if own == [0]:
                self._whole.add(tokens)
                own = _indices(extents, prompt)
            chosen.update(own)
        return sorted(chosen)

    def _text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)


def _indices(extents: Sequence[tuple[int, int]], span: tuple[int, int]) -> list[int]:
    """Return the indices of the tokens that overlap with a span. ``extents`` contains the span of each token."""
    return [index for index, (begin, end) in enumerate(extents) if begin < span[1] and span[0] < end]
