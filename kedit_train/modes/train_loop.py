"""``TrainLoop``: the default training function of ``run_edits``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from kedit_train.arguments import above, at_least, check_arguments, integer_from
from kedit_train.augmentation import Augmentation
from kedit_train.callbacks import ParameterScope, editing
from kedit_train.core.answer_end import decide_together
from kedit_train.data import Edit, EditDataset
from kedit_train.data.answer_end import APPEND_EOS, AppendEos, EndDecision
from kedit_train.data.chat_format import PROMPT_FORMAT, PromptFormat, check_format, read_format
from kedit_train.data.tokenization import collate, context_length, pad_token_id
from kedit_train.errors import EditError, reported_by
from kedit_train.evaluation.asking.batching import model_device

# Below this loss, LocFT-BF ("Fine-tuning Done Right in Model Editing", arXiv 2509.22072) regards an edit as learned.
LEARNED_LOSS = 1e-2


@dataclass(frozen=True, kw_only=True)
class ExampleOptions:
    """Options for turning edits into training examples.

    Args:
        prompt_format: "plain" (the prompt as it is), "chat" (the tokenizer's chat template), "question" (the prompt
            as a question, followed by "A:") or a :class:`~kedit_train.ChatFormat`.
        append_eos: whether the end-of-text token is appended to every target. With "auto", ``prompt_format`` decides.
            If it is not "plain", the token is appended. If it is "plain", the token is appended only if the model ends
            its completions by itself. The model is tested once, before its first training, and the decision is printed.
        extra_edits: additional edits to train: a list, or a function ``function(edits) -> list``. The function is
            called once per training, with the edits of this training. ``kedit_train.augmentation.augmentation`` creates
            such a function. The function can also rewrite the targets of the edits. Then :class:`TrainLoop` trains the
            rewritten targets. Additional edits count like all other edits for ``batch_size`` and ``stop_loss``.

    Example:
        >>> from kedit_train.modes import ExampleOptions
        >>> ExampleOptions(prompt_format="chat").append_eos
        'auto'
    """

    prompt_format: PromptFormat = "plain"
    append_eos: AppendEos = "auto"
    extra_edits: Sequence[Edit] | Callable[[Sequence[Edit]], Sequence[Edit]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_format", read_format(self.prompt_format))
        check_arguments(
            self, prompt_format=(self.prompt_format, PROMPT_FORMAT), append_eos=(self.append_eos, APPEND_EOS)
        )


class TrainLoop:
    """A training function ``train(model, edits)`` that trains on shuffled batches with callbacks.

    Training stops early when the mean loss of an epoch falls below ``stop_loss``. The training function does not switch
    the model between training mode and evaluation mode.

    Args:
        tokenizer: the model's tokenizer.
        callbacks: callbacks of ``kedit_train.callbacks``, in any order. None: ``ParameterScope`` on one
            down-projection late in the model. ``run_edits`` may call the training function several times. In each
            call, the callbacks begin anew, and treat the model at the start of this call as the unedited model. There
            are two exceptions. With ``sequential=True``, ``KLLocality``, ``NullSpace`` and ``LowCurvature`` keep what
            they computed in earlier calls. With ``anchor="base"`` (the default), ``NormBall`` and ``WeightAnchor`` use
            the weights before the first call.
        epochs: maximum number of passes over the edits.
        batch_size: training examples per optimizer step.
        learning_rate: learning rate of the optimizer.
        stop_loss: stop when the mean loss of an epoch is below this value. 0: run all epochs.
        optimizer: class or function that creates the optimizer. Each training calls
            ``optimizer(parameters, lr=learning_rate)``.
        examples: options for turning edits into training examples. None: ``ExampleOptions()``.

    Raises:
        EditError: an argument is out of range, an edit is longer than the model's context, or the loss is not finite.

    References:
        "Fine-tuning Done Right in Model Editing" (LocFT-BF), arXiv 2509.22072, for the defaults.

    Example:
        >>> from kedit_train import EditDataset, evaluate, world
        >>> from kedit_train.modes import TrainLoop
        >>> model, tokenizer = world.load()
        >>> edits = EditDataset.load("world", limit=2)
        >>> train = TrainLoop(tokenizer, learning_rate=3e-3)
        >>> train(model, edits)
        >>> evaluate(model, tokenizer, edits).metrics["reliability"]["generated"].value
        1.0
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        callbacks: Sequence[Any] | None = None,
        epochs: int = 25,
        batch_size: int = 100,
        learning_rate: float = 5e-4,
        stop_loss: float = LEARNED_LOSS,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        examples: ExampleOptions | None = None,
    ) -> None:
        check_arguments(
            self,
            epochs=(epochs, integer_from(1)),
            batch_size=(batch_size, integer_from(1)),
            learning_rate=(learning_rate, above(0)),
            stop_loss=(stop_loss, at_least(0)),
        )
        self.tokenizer = tokenizer
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.stop_loss = stop_loss
        self.optimizer = optimizer
        self.examples: ExampleOptions = examples or ExampleOptions()
        self.callbacks: list[Any] = (
            [ParameterScope(0.7, modules="mlp.down_proj")] if callbacks is None else list(callbacks)
        )
        # The decision is made once for each model, before its first training, because the model is edited afterwards.
        self._decisions: WeakKeyDictionary[nn.Module, EndDecision] = WeakKeyDictionary()
        with reported_by("TrainLoop"):
            check_format(self.examples.prompt_format, tokenizer)

    def __call__(self, model: nn.Module, edits: Sequence[Edit]) -> None:
        """Train ``model`` on ``edits``, in place."""
        with reported_by("TrainLoop"):
            self._train(model, edits)

    def append_eos(self, model: nn.Module, edits: Sequence[Edit]) -> EndDecision:
        """Return whether targets end with end-of-text. The decision is made and printed once for each model."""
        if model not in self._decisions:
            options = self.examples
            self._decisions[model] = decide_together(
                options.append_eos, self.tokenizer, edits, model=model, prompt_format=options.prompt_format
            )
        return self._decisions[model]

    def _train(self, model: nn.Module, edits: Sequence[Edit]) -> None:
        config = getattr(model, "config", None)
        extra = self.examples.extra_edits
        if isinstance(extra, Augmentation):
            trained = extra.training_edits(edits)
        else:
            trained = [*edits, *(extra(edits) if callable(extra) else extra)]
        encoded = EditDataset(trained).encode(
            self.tokenizer,
            max_length=context_length(config) if config else None,
            prompt_format=self.examples.prompt_format,
            append_eos=self.append_eos(model, edits).append,
        )
        pad_id, device = pad_token_id(self.tokenizer), model_device(model)
        epoch_steps = math.ceil(len(encoded) / self.batch_size)
        options = {"edits": edits, "epoch_steps": epoch_steps, "prompt_format": self.examples.prompt_format}
        with editing(model, self.callbacks, tokenizer=self.tokenizer, **options) as edit:
            optimizer = self.optimizer(edit.parameters(), lr=self.learning_rate)
            for _ in range(self.epochs):
                losses = []
                for batch in torch.randperm(len(encoded)).split(self.batch_size):
                    tensors = collate([encoded[int(i)] for i in batch], pad_id=pad_id)
                    losses.append((self._step(model, edit, optimizer, tensors, device), len(batch)))
                    if edit.should_stop:
                        return
                if _mean(losses) < self.stop_loss:
                    return

    def _step(self, model: Any, edit: Any, optimizer: Any, tensors: dict[str, torch.Tensor], device: Any) -> float:
        edit.before_step()
        loss = model(**{name: value.to(device) for name, value in tensors.items()}).loss
        value = float(loss.detach())
        if not math.isfinite(value):
            raise EditError(f"the loss is {value}; lower learning_rate (now {self.learning_rate}), or train in fp32.")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value

    def __repr__(self) -> str:
        callbacks = ", ".join(map(repr, self.callbacks))
        extra = self.examples.extra_edits
        extra = f"{len(extra)} edits" if isinstance(extra, Sequence) else extra
        return (
            f"TrainLoop(callbacks=[{callbacks}], epochs={self.epochs}, batch_size={self.batch_size}, "
            f"learning_rate={self.learning_rate}, optimizer={getattr(self.optimizer, '__name__', self.optimizer)}, "
            f"stop_loss={self.stop_loss}" + (f", extra_edits={extra})" if self.examples.extra_edits else ")")
        )


def _mean(losses: Iterable[tuple[float, int]]) -> float:
    """Return the mean of the batch losses, weighted by the number of examples per batch."""
    losses = list(losses)
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
