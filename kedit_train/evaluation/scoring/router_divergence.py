"""Measure how far the edit moves the routers of a mixture-of-experts model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kedit_train.core.scope.experts import routers
from kedit_train.data import Edit
from kedit_train.data.prompts import PromptFormat, encode_prompts
from kedit_train.data.tokenization import Encoded, collate, context_length, pad_token_id
from kedit_train.evaluation.asking.batching import inference_context, model_device, split_into_batches, unwrap_model
from kedit_train.evaluation.scoring.bootstrap import Score
from kedit_train.functional.divergence import kl_divergence

# Maximum number of prompts. The stored logits take 4 bytes per token, layer and expert: 20 MB for 64 prompts of 13
# tokens in a model with 48 layers of 128 experts.
MAX_PROMPTS = 64


class RouterDivergence:
    """Compare the routers of the edited model with the routers of the unedited model, on fixed prompts.

    Even if the weights of the routers are frozen, an edit can send a token to other experts, because the edit changes
    the hidden states that the routers of later layers read.

    The prompts are the locality prompts of the edits, or the edits' own prompts if there are no locality prompts. At
    most ``MAX_PROMPTS`` prompts are used, evenly spaced over the edits. The logits of the routers are stored when the
    object is created.

    Args:
        model: the unedited model.
        tokenizer: the model's tokenizer.
        edits: the edits of the evaluation.
        prompt_format: the format of the prompts.
        batch_size: sequences per forward pass.

    Attributes:
        layers: number of routers whose weight has the shape [experts, hidden]. 0 if the model has no such router.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        edits: Sequence[Edit],
        *,
        prompt_format: PromptFormat = "plain",
        batch_size: int = 64,
    ) -> None:
        self.layers: int = len(routers(model))
        if not self.layers:
            return
        self._pad_id, self._batch_size = pad_token_id(tokenizer), batch_size
        prompts = _choose_prompts(edits)
        context = context_length(unwrap_model(model).config)
        encoded = encode_prompts(tokenizer, prompts, context, prompt_format)
        self._sequences = [Encoded(list(ids), len(ids)) for ids in sorted(encoded, key=len)]
        self._unedited = [[logits.cpu() for logits in batch] for batch in self._router_logits(model)]

    def measure(self, model: nn.Module) -> Score:
        """Return the mean KL divergence of the current routers from the unedited routers.

        For each router, the divergence is KL(unedited || model) between two distributions over all experts. Each
        distribution is a softmax of the router's logits, before the top-k selection.

        Args:
            model: the same model with its current weights.

        Returns:
            The mean over the tokens of all prompts and over the routers of all layers, in nats per token. ``n`` is the
            number of tokens.
        """
        total, tokens = 0.0, 0
        for before, now in zip(self._unedited, self._router_logits(model), strict=True):
            for old, new in zip(before, now, strict=True):
                # Rounding can give a value slightly below zero if the two distributions are equal.
                total += float(kl_divergence(old.to(new.device), new).clamp(min=0.0).sum(dtype=torch.float64))
            tokens += len(before[0])
        return Score(total / (tokens * self.layers), n=tokens)

    def _router_logits(self, model: nn.Module) -> Iterator[list[Tensor]]:
        """Yield, for each batch, one tensor of logits per router: [tokens, experts], fp32, without padding tokens."""
        inner = unwrap_model(model)
        with inference_context(inner), _recorded(routers(model)) as logits:
            for batch in split_into_batches(self._sequences, self._batch_size):
                collated = collate(batch, pad_id=self._pad_id)
                inputs = {name: collated[name].to(model_device(inner)) for name in ("input_ids", "attention_mask")}
                logits.clear()
                inner(**inputs, use_cache=False)
                kept = collated["attention_mask"].flatten().bool()
                yield [own.flatten(0, -2)[kept.to(own.device)] for own in logits.values()]


@contextmanager
def _recorded(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Context manager: yield a dict from router name to logits. Every forward pass updates the dict."""
    logits: dict[str, Tensor] = {}

    def record(name: str, router: Any, args: tuple[Tensor, ...]) -> None:
        # The logits are computed from the router's input, because the routers of different models return their logits,
        # scores and choices in different orders.
        bias = getattr(router, "bias", None)
        logits[name] = F.linear(args[0].float(), router.weight.float(), None if bias is None else bias.float())

    handles = [module.register_forward_pre_hook(partial(record, name)) for name, module in modules.items()]
    try:
        yield logits
    finally:
        for handle in handles:
            handle.remove()


def _choose_prompts(edits: Sequence[Edit]) -> list[str]:
    probes = [probe.prompt for edit in edits for by_kind in edit.locality.values() for probe in by_kind]
    prompts = list(dict.fromkeys(probes or [edit.prompt for edit in edits]))
    step = max(1, -(-len(prompts) // MAX_PROMPTS))
    return prompts[::step]
