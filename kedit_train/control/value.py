"""``ValueModel``: predicts the reward of a response from the hidden state of one of its tokens."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.arguments import Rule, check_arguments, integer_from
from kedit_train.control.sites import HEAD, causal_model
from kedit_train.core.fingerprint import sample_fingerprint
from kedit_train.errors import EditError, reported_by
from kedit_train.functional.precision import full_precision
from kedit_train.safetensors_file import load_tensors, save_tensors

KIND = "kedit_train.value"
_LAYERS = Rule(
    'a list of different layers, each "head" or the index of a layer as text',
    lambda given: (
        not isinstance(given, str)
        and 0 < len(given) == len({str(layer) for layer in given})
        and all(str(layer) == HEAD or re.fullmatch("[0-9]+", str(layer)) for layer in given)
    ),
)


class _Network(nn.Module):
    """An MLP with one hidden layer and a standardized input. SiLU makes its gradient continuous."""

    mean: Tensor
    scale: Tensor

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(hidden_size))
        self.register_buffer("scale", torch.ones(hidden_size))
        self.layers = nn.Sequential(nn.Linear(hidden_size, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        # Mixed precision would compute in bf16, and two hidden states could get the same value.
        with full_precision(hidden.device.type):
            return self.layers((hidden.float() - self.mean) / self.scale).squeeze(-1)


class ValueModel(nn.Module):
    """A value function: it predicts the reward of a response from the hidden state of one token.

    Each layer has its own small network.

    Args:
        layers: the names of the layers: "head", or the index of a layer as text.
        hidden_size: the width of the hidden states.
        width: number of units in the hidden layer of each network.

    Attributes:
        trained_on: the language model and the prompt format that the value function was trained with, as a dict of
            JSON values. Empty before training.

    Raises:
        EditError: an argument is out of range, or ``layers`` contains an invalid name or the same name twice.

    Example:
        >>> value = ValueModel(["head"], hidden_size=4, width=8)
        >>> value.at("head", torch.zeros(2, 3, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, layers: Sequence[str], *, hidden_size: int, width: int = 512) -> None:
        super().__init__()
        check_arguments(
            self,
            layers=(layers, _LAYERS),
            hidden_size=(hidden_size, integer_from(1)),
            width=(width, integer_from(1)),
        )
        self.layers: tuple[str, ...] = tuple(str(layer) for layer in layers)
        self.hidden_size = hidden_size
        self.width = width
        self.trained_on: dict[str, Any] = {}
        self.networks: nn.ModuleDict = nn.ModuleDict({name: _Network(hidden_size, width) for name in self.layers})

    def at(self, layer: str, hidden: Tensor) -> Tensor:
        """Return the value of each hidden state of a layer: [..., hidden] becomes [...] in fp32."""
        return self.networks[layer](hidden)

    def forward(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the values [batch, length] of each layer for its hidden states [batch, length, hidden]."""
        return {name: self.at(name, hidden) for name, hidden in states.items()}

    @torch.no_grad()
    def standardize(self, states: Iterable[Mapping[str, Tensor]]) -> None:
        """Set the mean and the standard deviation by which hidden states are standardized.

        Args:
            states: dicts from layer to hidden states, [tokens, hidden]. They are read once, one after the other.
        """
        sums = {name: torch.zeros(2, self.hidden_size, dtype=torch.float64) for name in self.layers}
        count = 0
        for chunk in states:
            for name in self.layers:
                hidden = chunk[name].double().cpu()
                sums[name] += torch.stack([hidden.sum(0), hidden.square().sum(0)])
            count += len(hidden)
        for name, (total, squares) in sums.items():
            mean = total / max(1, count)
            variance = (squares / max(1, count) - mean.square()).clamp(min=0)
            network: Any = self.networks[name]
            network.mean.copy_(mean)
            if variance.mean() <= 1e-10 * mean.square().mean():
                # All hidden states are equal (for example, there is only one), so their standard deviation is 0.
                network.scale.fill_(1.0)
                continue
            # Entries that hardly vary must not dominate the gradient.
            network.scale.copy_((variance + 1e-2 * variance.mean() + 1e-12).sqrt())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the value function to a safetensors file."""
        metadata: dict[str, Any] = {"layers": list(self.layers), "hidden_size": self.hidden_size, "width": self.width}
        metadata["trained_on"] = self.trained_on
        return save_tensors(path, self.state_dict(), metadata, kind=KIND)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ValueModel:
        """Read a file that :meth:`save` wrote.

        Raises:
            EditError: the file does not exist, is damaged, or does not contain a value function.
        """
        with reported_by("ValueModel"):
            tensors, metadata = load_tensors(path, kind=KIND)
            try:
                value = cls(metadata["layers"], hidden_size=metadata["hidden_size"], width=metadata["width"])
                value.trained_on = dict(metadata.get("trained_on", {}))
                value.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()})
            except (KeyError, TypeError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:150]
                raise EditError(f"{path} is not a file of a value function ({reason}); check the path.") from error
        return value.eval()


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Return the number of layers of a language model, and a hash of some of its weights.

    Two models that were trained differently have different hashes. The weights are rounded to bf16 before they are
    hashed, so a model has the same hash in fp32 and in bf16. In fp16, the hash may differ.
    """
    inner = causal_model(model)
    depth = getattr(inner.config.get_text_config(), "num_hidden_layers", None)
    return {"model_layers": depth, "model_hash": sample_fingerprint(dict(inner.named_parameters()))}
