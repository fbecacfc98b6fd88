"""Interfaces of the objects that the loss head calls: objectives, additional loss terms and example filters.

The loss head (``LossHead``) replaces the loss of a model during training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

# Takes fp32 logits [N, vocabulary], labels [N] and the soft targets (tensors [N, ...]), if there are any. Returns the
# loss [N], whether each token still counts in the loss (active) [N], and any number of further statistics [N].
Objective = Callable[..., tuple[Tensor, ...]]
# Takes the arguments of the model's forward call by name, including the labels [batch, length]. Returns the soft
# targets of the N supervised tokens: tensors [N, ...].
SoftTargets = Callable[[Mapping[str, Any]], tuple[Tensor, ...]]
Reduction = Literal["token", "sample"]
# The distribution from which the loss of a token is computed. "own": the distribution that predicts this token.
# "first": the distribution that predicts the first supervised token of the sequence.
Position = Literal["own", "first"]


class TokenTerm(Protocol):
    """A second term in the loss of every supervised token, such as the divergence from the reference model.

    Attributes:
        weight: factor of the term.
    """

    @property
    def weight(self) -> float: ...

    def reference_states(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], labels: Tensor) -> Tensor:
        """Return the reference model's hidden states [N, hidden], which the term needs.

        The loss head calls this method before the forward pass of the training step.

        Args:
            args: positional arguments of the model's forward call.
            kwargs: keyword arguments of the same call.
            labels: [batch, sequence]. N is the number of positions that predict a supervised token.
        """
        ...

    def divergence(self, logits: Tensor, reference_states: Tensor) -> Tensor:
        """Return the divergence from the reference model at each token, [n].

        The loss head calls this method for chunks of n tokens.

        Args:
            logits: [n, vocabulary].
            reference_states: [n, hidden], the hidden states of the reference model.
        """
        ...

    def observe(self, divergence: Tensor) -> None:
        """Receive the divergence at each supervised token, detached and not multiplied by ``weight``."""
        ...


class ExampleFilter(Protocol):
    """Decides which examples of a batch the model processes, so that learned examples can be left out.

    Attributes:
        probability: an example counts as learned when the model gives each of its supervised tokens at least this
            probability. With None, it counts as learned when the objective no longer counts any of its tokens in the
            loss.
    """

    probability: float | None

    def select(self, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], LeftOut]:
        """Return the arguments of the forward call for the remaining examples, and the examples that were left out."""
        ...

    def record(self, where: Tensor, active: Tensor, *sums: Tensor) -> None:
        """Receive the results of a forward pass on the examples that remained in the batch.

        Args:
            where: [examples, sequence - 1] bool, the supervised positions.
            active: [N] bool, whether the token at each of the N supervised positions is not learned yet.
            sums: one tensor [N] with the loss of each token. With TRL, two more tensors [N] follow: the entropy of the
                prediction for each token, and 1 for each token whose label was the most probable token, else 0.
        """
        ...


@dataclass(frozen=True)
class LeftOutExample:
    """An example that was left out of a batch, with the results of its last forward pass.

    Args:
        tokens: number of supervised tokens.
        loss: sum of the losses of these tokens.
        entropy: sum of the entropies of the distributions that predict these tokens, in nats.
        correct: number of these tokens that were the model's most probable token.
    """

    tokens: int
    loss: float
    entropy: float = 0.0
    correct: float = 0.0


@dataclass(frozen=True)
class LeftOut:
    """The examples that were left out of the forward pass of one batch.

    Means over the batch include these examples. Their values come from their last forward pass.

    Args:
        examples: the examples.
        place: the part of the batch that the model computes, given as the shape of the full batch ([batch, length]),
            the computed rows, and the computed columns. With None, the model computes the full batch.
    """

    examples: tuple[LeftOutExample, ...] = ()
    place: tuple[Sequence[int], list[int], slice] | None = None

    def in_batch(self, values: Tensor) -> Tensor:
        """Return the values for all positions of the full batch. Positions that were left out get zeros.

        Args:
            values: [computed batch, computed length, ...].
        """
        if self.place is None:
            return values
        shape, rows, columns = self.place
        whole = values.new_zeros(*shape, *values.shape[2:])
        whole[rows, columns] = values
        return whole

    @property
    def tokens(self) -> int:
        """Number of supervised tokens of the examples that were left out."""
        return sum(example.tokens for example in self.examples)
