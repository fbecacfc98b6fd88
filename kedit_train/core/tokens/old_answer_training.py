"""Train the model on the answers from before the edit. ``ForgetFirst`` then subtracts the weight change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.arguments import above, check_arguments, integer_from
from kedit_train.core.reference_weights import write
from kedit_train.core.run import EditRun
from kedit_train.data import Edit, EditDataset
from kedit_train.data.prompts import PromptFormat
from kedit_train.data.tokenization import collate, context_length, pad_token_id
from kedit_train.errors import EditError
from kedit_train.functional.labels import IGNORE_INDEX


@dataclass(frozen=True, kw_only=True)
class ForgetTraining:
    """How ``ForgetFirst`` trains on the old answers: Adam with a constant learning rate, without dropout.

    An old answer is the answer that the model gives to the prompt of an edit before the edit.

    Args:
        epochs: number of passes over the old answers.
        learning_rate: learning rate of Adam. The optimizer of the training run is not used.
        batch_size: number of old answers per training step. It is also the number of sequences per forward pass when
            the callback measures the model.
        max_new_tokens: maximum number of tokens of an old answer. Edits with a longer old answer are skipped.
        seed: seed for the order of the old answers.

    Raises:
        EditError: an argument is out of range.

    Example:
        >>> from kedit_train.callbacks import ForgetTraining
        >>> ForgetTraining(epochs=5).learning_rate
        0.0005
    """

    epochs: int = 20
    learning_rate: float = 5e-4
    batch_size: int = 32
    max_new_tokens: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        check_arguments(
            self,
            epochs=(self.epochs, integer_from(1)),
            learning_rate=(self.learning_rate, above(0)),
            batch_size=(self.batch_size, integer_from(1)),
            max_new_tokens=(self.max_new_tokens, integer_from(1)),
        )


def trained_difference(
    run: EditRun,
    tokenizer: Any,
    old: Sequence[Edit],
    base: Mapping[str, Tensor],
    *,
    training: ForgetTraining,
    prompt_format: PromptFormat,
) -> dict[str, Tensor]:
    """Train the weights in the scope on the old answers, and return the change of each weight.

    Afterwards the model has the trained weights. The global random state does not change.

    Args:
        run: the current run. The weights in its scope are trained.
        tokenizer: the tokenizer of the model.
        old: edits whose targets are the old answers.
        base: the weights from which the training starts, by name.
        training: epochs, learning rate, batch size and seed.
        prompt_format: how the prompts are written.

    Returns:
        The change of each weight (trained weight minus ``base``), by name.

    Raises:
        EditError: the loss is not finite.
    """
    head = run.head()
    length = context_length(run.model.config)
    encoded = EditDataset(old).encode(tokenizer, model=run.model, max_length=length, prompt_format=prompt_format)
    pad_id, device = pad_token_id(tokenizer), next(run.model.parameters()).device
    # The optimizer trains copies, because the run would count a step on its own scope as a training step.
    own = {name: nn.Parameter(value.clone()) for name, value in base.items()}
    optimizer = torch.optim.Adam(own.values(), lr=training.learning_rate)
    generator = torch.Generator().manual_seed(training.seed)
    for _ in range(training.epochs):
        for chosen in torch.randperm(len(encoded), generator=generator).split(training.batch_size):
            batch = collate([encoded[int(i)] for i in chosen], pad_id=pad_id)
            ids, mask, labels = (batch[key].to(device) for key in ("input_ids", "attention_mask", "labels"))
            where = labels[:, 1:] != IGNORE_INDEX
            with torch.enable_grad():
                hidden = head.hidden(input_ids=ids, attention_mask=mask)
                logits = head.project(hidden[:, :-1][where])
                loss = nn.functional.cross_entropy(logits.float(), labels[:, 1:][where].to(logits.device))
            if not bool(loss.isfinite()):
                raise EditError(
                    f"the loss on the old answers must be finite, got {float(loss)}; set learning_rate in "
                    f"ForgetTraining to a value below {training.learning_rate:g}."
                )
            # backward() would write .grad and trigger everything that hooks into it (DDP's reduction, masks).
            gradients = torch.autograd.grad(loss, list(run.scope.values()), allow_unused=True)
            for parameter, gradient in zip(own.values(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            write(run.scope, own)
    return {name: value.detach() - base[name] for name, value in own.items()}
