"""Sample short texts from a model, to put them in front of prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kedit_train.data.tokenization import token_ids
from kedit_train.errors import EditError
from kedit_train.evaluation.asking.batching import inference_context, model_device, unwrap_model

# First words of generated texts if the tokenizer has no begin-of-text token.
OPENINGS = ("The", "In", "It", "When", "A", "We", "There", "This")


@torch.no_grad()
def generate_prefixes(
    model: nn.Module, tokenizer: Any, n: int, lengths: Sequence[int] = (5, 10), seed: int = 0
) -> list[str]:
    """Sample ``n`` different short texts from a model at temperature 1.

    Generation starts from the begin-of-text token. If the tokenizer has no begin-of-text token, each text starts with a
    common word, such as "The". Special tokens are not sampled. If a text does not end with punctuation, a full stop is
    added. The same seed gives the same texts on the same device. The global random state of torch is not used.

    Args:
        model: a causal language model.
        tokenizer: the tokenizer of the model.
        n: number of texts.
        lengths: the lengths of the texts in tokens. Each length is used for about the same number of texts.
        seed: seed of the samples.

    Raises:
        EditError: the model generates fewer than ``n`` different texts.

    Example:
        >>> from kedit_train import world
        >>> model, tokenizer = world.load()
        >>> len(generate_prefixes(model, tokenizer, 4))
        4
    """
    inner, generator = unwrap_model(model), torch.Generator().manual_seed(seed)
    distinct: dict[str, None] = {}
    with inference_context(inner):
        for _ in range(8):
            for length in lengths:
                texts = _sample(inner, tokenizer, -(-n // len(lengths)), length, generator)
                distinct.update(dict.fromkeys(text for text in texts if text.strip(" .")))
            if len(distinct) >= n:
                # The choice is random, so that all lengths stay about equally frequent.
                return random.Random(seed).sample(list(distinct), n)
    raise EditError(
        f"n={n} is too high: the model generated only {len(distinct)} different texts; lower n (in a recipe: "
        "data.augmentation.prefixes).",
        component="generate_prefixes",
    )


def _sample(model: Any, tokenizer: Any, n: int, length: int, generator: torch.Generator) -> list[str]:
    begin = tokenizer.bos_token_id
    starts = [[begin]] if begin is not None else [token_ids(tokenizer, word, special=False)[:1] for word in OPENINGS]
    ids = torch.tensor([starts[i % len(starts)] for i in range(n)], device=model_device(model))
    special = torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.long)
    for _ in range(length):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1].float().cpu()
        # The head may have more outputs than the tokenizer has tokens.
        logits[:, len(tokenizer) :] = -torch.inf
        logits[:, special[special < logits.shape[1]]] = -torch.inf
        sampled = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, sampled.to(ids.device)], dim=1)
    texts = (" ".join(tokenizer.decode(text, skip_special_tokens=True).split()) for text in ids)
    return [text if text[-1:] in tuple(".!?:。！？") else f"{text}." for text in texts]
