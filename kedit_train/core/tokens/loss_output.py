"""Build the outputs that a model returns when ``LossHead`` computes its loss."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kedit_train.core.tokens.interfaces import LeftOutExample
from kedit_train.errors import EditError


class UnbuiltLogits:
    """A placeholder for logits that were not computed. Any use of the placeholder raises an ``EditError``."""

    @classmethod
    def _refuse(cls, *args: Any, **kwargs: Any) -> Any:
        raise EditError(
            "the logits of a training step are not computed when TokenLoss or BatchAnchor computes the loss; use "
            "output.loss, or call the model under torch.no_grad() to get logits."
        )

    # Indexing, torch functions, and any method or attribute.
    __getitem__ = __torch_function__ = _refuse

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse()


def model_output(output: Any, loss: Tensor) -> Any:
    """Put the loss into the output of the model, and return that output.

    Args:
        output: what the model returned for a call without labels.
        loss: the loss, a scalar tensor.
    """
    output.logits = UnbuiltLogits()
    if not isinstance(output, OrderedDict):
        output.loss = loss
        return output
    # In transformers 4, assigning the attribute would not add an entry.
    output["loss"] = loss
    # The loss is the first entry of a model output with labels, and loops read it as model(...)[0].
    output.move_to_end("loss", last=False)
    return output


def fused_output(
    loss: Tensor,
    where: Tensor,
    entropy: Tensor,
    correct: Tensor,
    *,
    left_out: Sequence[tuple[LeftOutExample, Any]],
    aux_loss: Any,
) -> Any:
    """Return the per-token output that TRL expects from its fused head.

    Args:
        loss: [N], the weighted losses of the supervised tokens.
        where: [batch, length - 1] bool, the positions of these tokens.
        entropy: [N], in nats.
        correct: [N] bool, whether the label was the most probable token.
        left_out: one pair (example, weight) for each example that was removed from the batch. The loss of each token of
            the example is multiplied by this weight.
        aux_loss: the balancing term of a mixture-of-experts model, or None.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    tokens = torch.tensor([example.tokens for example, _ in left_out], device=where.device)

    def on_grid(values: Tensor, sums: list[Any]) -> Tensor:
        grid = values.new_zeros(where.shape).masked_scatter(where, values)
        if not left_out:
            return grid
        # TRL only sums the values, so the tokens of removed examples can be appended in any order.
        means = torch.as_tensor(sums, device=grid.device, dtype=torch.float32) / tokens.clamp(min=1)
        return torch.cat([grid.flatten().float(), means.repeat_interleave(tokens)])

    fields = {"aux_loss": aux_loss} if aux_loss is not None else {}
    return FusedCausalLMOutput(
        loss=loss.mean(),
        log_probs=on_grid(-loss, [-example.loss * weight for example, weight in left_out]),
        entropy=on_grid(entropy, [example.entropy for example, _ in left_out]),
        is_top1=on_grid(correct, [example.correct for example, _ in left_out]),
        label_mask=on_grid(where[where], tokens.tolist()),
        **fields,
    )
