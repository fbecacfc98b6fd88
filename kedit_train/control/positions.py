"""Decide which positions of a forward pass are generated tokens, and which belong to the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.compatibility import read_cache
from kedit_train.core.cache.layer_stack import call_arguments


class GeneratedPositions:
    """Find the generated positions of a forward pass from the arguments of the pass.

    - With a key-value cache: if the cache is not empty and the pass reads one token, this token is a generated
      position.
    - Without a cache (``use_cache=False``): each pass of a generation reads the sequences of the previous pass again,
      with one more token per sequence. All positions after the prompt are generated positions.
    - Every other pass reads a prompt.

    These rules hold for ``generate()`` with and without a cache, for prompts that are read in several parts, and for
    both padding sides. They also hold for beam search, which may repeat, reorder or remove the sequences of a batch.

    Args:
        first_token: if True, the last token of the prompt also counts as a generated position, because the model
            generates the first token from it.
    """

    def __init__(self, first_token: bool) -> None:
        self.first_token = first_token
        self._ids: Tensor | None = None
        self._prompt_length = 0

    def read(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return a bool tensor [batch, length] that is True at the generated positions of this pass."""
        given = call_arguments(model, args, kwargs)
        ids = given.get("input_ids")
        tokens = ids if ids is not None else given["inputs_embeds"]
        batch, length = tokens.shape[:2]
        generated = torch.zeros(batch, length, dtype=torch.bool, device=tokens.device)
        cache = read_cache(given)
        if cache is not None and int(cache.get_seq_length()) > 0:
            self._ids = None
            if length == 1:
                return ~generated
            prompt_length = length
        else:
            continues = ids is not None and self._continues(ids)
            prompt_length = self._prompt_length if continues else length
            # Without a cache, generate() passes use_cache=False. Other passes do not belong to a generation.
            repeats = cache is None and given.get("use_cache") is False
            self._ids = ids.clone() if ids is not None and repeats else None
            self._prompt_length = prompt_length
        generated[:, prompt_length:] = True
        if self.first_token:
            mask = given.get("attention_mask")
            rows = torch.arange(batch, device=tokens.device)
            generated[rows, _last_token(mask, batch, length, prompt_length).to(tokens.device)] = True
        return generated

    def _continues(self, ids: Tensor) -> bool:
        last = self._ids
        if last is None or ids.shape[1] != last.shape[1] + 1 or ids.device != last.device:
            return False
        # Finished sequences may have been removed from the batch, and beam search may have changed the order.
        return bool((ids[:, None, :-1] == last[None]).all(-1).any(-1).all())


def _last_token(mask: Any, batch: int, length: int, prompt_length: int) -> Tensor:
    """Return the index of the last token of each prompt, [batch].

    If the prompts are padded on the right, this index depends on the length of the prompt.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < length:
        return torch.full((batch,), prompt_length - 1)
    # With a cache, the mask also covers the tokens in the cache.
    part = mask[:, mask.shape[1] - length :][:, :prompt_length]
    return part.long().cumsum(-1).argmax(-1)
