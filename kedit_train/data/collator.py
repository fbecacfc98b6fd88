"""A data collator that pads encoded edits to one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from kedit_train.arguments import check_arguments, one_of
from kedit_train.data.tokenization import Encoded, collate, pad_token_id


class EditCollator:
    """A data collator for encoded edits, for a ``DataLoader`` or a ``transformers.Trainer``.

    The collator pads all sequences of a batch to the length of the longest sequence. Only target tokens get labels.
    The padding token may be the end-of-text token: an end-of-text token in a target still gets a label, because the
    collator recognizes padding by its position and not by its token id.

    Args:
        tokenizer: supplies the padding token. If the tokenizer has none, its end-of-text token is used for padding.
        padding_side: "right" or "left". Models with absolute positions (GPT-2) also need
            :func:`~kedit_train.data.tokenization.position_ids` when the padding is on the left.

    Raises:
        EditError: the tokenizer has neither a padding nor an end-of-text token.

    Example:
        >>> from kedit_train import EditCollator, EditDataset, world
        >>> model, tokenizer = world.load()
        >>> examples = EditDataset.load("world", limit=2).encode(tokenizer)
        >>> batch = EditCollator(tokenizer)(examples)
        >>> {name: list(values.shape) for name, values in batch.items()}
        {'input_ids': [2, 12], 'attention_mask': [2, 12], 'labels': [2, 12]}
    """

    def __init__(self, tokenizer: Any, *, padding_side: Literal["right", "left"] = "right") -> None:
        check_arguments(self, padding_side=(padding_side, one_of(("right", "left"))))
        self.pad_token_id: int = pad_token_id(tokenizer)
        self.padding_side = padding_side

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """Pad examples to one batch.

        Args:
            examples: [batch] edits, as :meth:`EditDataset.encode` returns them.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels``, each [batch, longest], int64. Labels are -100 outside of
            the target.
        """
        return collate(examples, pad_id=self.pad_token_id, padding_side=self.padding_side)
