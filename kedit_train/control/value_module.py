"""``ValueModule``: train a value function on the hidden states of a frozen language model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from kedit_train import world
from kedit_train.arguments import above, check_arguments, integer_from, optional, within
from kedit_train.atomic_write import check_writable
from kedit_train.control.sites import find_sites, hidden_size
from kedit_train.control.value import ValueModel
from kedit_train.errors import reported_by
from kedit_train.functional.temporal_difference import td_targets, value_loss
from kedit_train.paths import SAFETENSORS_PATH
from kedit_train.pretrained import load_model


class ValueModule(LightningModule):
    """A Lightning module that trains a value function on the hidden states of a frozen language model.

    The value function predicts the reward of a response from each hidden state of the response. It is trained by
    temporal differences. The target of the last hidden state is the reward. The target of each earlier hidden state is
    computed from the values of the later hidden states. These values come from the target network: a copy of the value
    function that changes slowly and receives no gradients. Checkpoints do not contain the language model.

    Args:
        name: a hub name, a folder, or "world" for the bundled model.
        layers: a list of the layers whose hidden states get a value function: indices of layers, or "head" for the
            input of the output head.
        width: number of units in the hidden layer of each value function.
        learning_rate: the learning rate of Adam, > 0.
        trace: lambda of the lambda-return, in [0, 1]. With 1, the target of every hidden state is the reward. With 0,
            the training is TD(0), as in the RE-Control paper. Long responses then need many epochs.
        target_decay: decay of the target network, in [0, 1). The target network is an exponential moving average of the
            value function. With 0, the targets are computed by the trained value function itself.
        dtype: the dtype of the language model. The value function is in float32, also in mixed precision.
        save_path: a file (.safetensors) to which the value function is saved when training ends. None: it is not saved.

    Attributes:
        value: the value function, a :class:`ValueModel`.
        language_model: the frozen language model.
        tokenizer: its tokenizer.

    Raises:
        EditError: the model cannot be loaded, or an argument is out of range.

    References:
        "Aligning Large Language Models with Representation Editing: A Control Perspective" (RE-Control),
        arXiv 2406.05954.

    Example:
        >>> import lightning as L
        >>> from kedit_train.control import ResponseDataModule, SamplingOptions, ShortAnswer, ValueModule
        >>> quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        >>> trainer = L.Trainer(max_epochs=1, enable_model_summary=False, **quiet)
        >>> options = SamplingOptions(samples=2, max_new_tokens=4)
        >>> data = ResponseDataModule(["The", "A"], reward=ShortAnswer(8), sampling=options)
        >>> trainer.fit(ValueModule("world"), data)
        >>> trainer.global_step
        1
    """

    def __init__(
        self,
        name: str = world.NAME,
        *,
        layers: Sequence[int | str] = ("head",),
        width: int = 512,
        learning_rate: float = 1e-3,
        trace: float = 0.9,
        target_decay: float = 0.9,
        dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32",
        save_path: str | None = None,
    ) -> None:
        super().__init__()
        check_arguments(
            self,
            width=(width, integer_from(1)),
            learning_rate=(learning_rate, above(0)),
            trace=(trace, within("[0, 1]")),
            target_decay=(target_decay, within("[0, 1)")),
            save_path=(save_path, optional(SAFETENSORS_PATH)),
        )
        self.name = name
        self.learning_rate = learning_rate
        self.trace = trace
        self.target_decay = target_decay
        self.save_path = save_path
        with reported_by("ValueModule"):
            if save_path is not None:
                check_writable(save_path)
            self.tokenizer: Any
            model, self.tokenizer = load_model(name, dtype=dtype)
            names = [site.name for site in find_sites(model, layers)]
        # The model is not registered as a submodule, so it is neither trained nor written to checkpoints.
        self.__dict__["language_model"] = model.requires_grad_(False).eval()
        self.value: ValueModel = ValueModel(names, hidden_size=hidden_size(model), width=width)
        self.target: ValueModel = copy.deepcopy(self.value).requires_grad_(False)

    def on_fit_start(self) -> None:
        """Copy the value function into the target network, except when the run resumes from a checkpoint.

        The copy includes the mean and the scale of the hidden states, which the data module has already set.
        """
        if self.trainer.ckpt_path is None:
            self.target.load_state_dict(self.value.state_dict())

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the temporal-difference loss, averaged over the layers.

        Args:
            batch: ``states`` (layer -> [batch, length, hidden]), ``mask`` [batch, length] and ``rewards`` [batch], as
                :class:`ResponseDataModule` makes them.
            batch_idx: not used.
        """
        mask, rewards = batch["mask"], batch["rewards"]
        with torch.no_grad():
            later = self.target(batch["states"])
        values = self.value(batch["states"])
        losses = [
            value_loss(values[name], td_targets(later[name], rewards, mask, trace=self.trace), mask) for name in values
        ]
        loss = torch.stack(losses).mean()
        self.log("value/loss", loss.detach(), prog_bar=True, batch_size=len(rewards))
        return loss

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the target network towards the value function."""
        for slow, fast in zip(self.target.parameters(), self.value.parameters(), strict=True):
            slow.lerp_(fast, 1.0 - self.target_decay)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the mean squared error of the values against the reward. The target network is not used."""
        mask = batch["mask"]
        rewards = batch["rewards"][:, None].expand(mask.shape)
        errors = [value_loss(values, rewards, mask) for values in self.value(batch["states"]).values()]
        self.log("value/validation_error", torch.stack(errors).mean(), batch_size=int(mask.sum()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam for the value function."""
        return torch.optim.Adam(self.value.parameters(), lr=self.learning_rate)

    def on_train_end(self) -> None:
        """Save the value function."""
        if self.save_path is not None and self.trainer.is_global_zero:
            print(f"value function: {Path(self.value.save(self.save_path))}")
