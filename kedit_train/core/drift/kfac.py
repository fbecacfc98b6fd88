"""Compute K-FAC factors of linear layers on texts, with labels sampled from the model."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kedit_train.core.drift.linear_layers import LinearLayer
from kedit_train.core.drift.model_batches import Batch, missing_batches, share_of_process, text_batches
from kedit_train.core.drift.second_moments import SecondMoment, layer_input, sum_over_processes, zero_moment
from kedit_train.core.output_head import OutputHead, evaluation_mode
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError
from kedit_train.functional.chunked_loss import chunk_length, chunked


@dataclass(frozen=True)
class KFACFactors:
    """The two K-FAC factors of each weight. Their Kronecker product approximates the Gauss-Newton matrix.

    Attributes:
        inputs: name -> E[a aᵀ] of the layer's inputs, [d_in, d_in].
        gradients: name -> E[g gᵀ] of the loss gradient at the layer's output, [d_out, d_out].
    """

    inputs: dict[str, SecondMoment]
    gradients: dict[str, SecondMoment]

    def __add__(self, other: KFACFactors) -> KFACFactors:
        """Combine factors that were computed on two sets of texts. Every token counts equally."""
        return KFACFactors(
            {name: moment + other.inputs[name] for name, moment in self.inputs.items()},
            {name: moment + other.gradients[name] for name, moment in self.gradients.items()},
        )

    def __or__(self, other: KFACFactors) -> KFACFactors:
        """Return the factors of all weights in either object. If both contain a weight, ``other`` takes precedence."""
        return KFACFactors(self.inputs | other.inputs, self.gradients | other.gradients)

    def only(self, names: Container[str]) -> KFACFactors:
        """Return the factors of the weights in ``names``. Names without factors are ignored."""
        inputs, gradients = (
            {name: moment for name, moment in moments.items() if name in names}
            for moments in (self.inputs, self.gradients)
        )
        return KFACFactors(inputs, gradients)

    def state(self) -> dict[str, Any]:
        """Return the sums and counts as plain dictionaries for a checkpoint."""
        return {
            kind: {name: {"sum": moment.sum, "count": moment.count} for name, moment in moments.items()}
            for kind, moments in (("inputs", self.inputs), ("gradients", self.gradients))
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], like: Mapping[str, Tensor]) -> KFACFactors:
        """Restore factors from a checkpoint.

        Args:
            state: the result of :meth:`state`.
            like: name -> tensor. The factors of each weight get the device and dtype of this tensor.
        """
        inputs, gradients = (
            {name: SecondMoment(m["sum"].to(like[name]), m["count"]) for name, m in state[kind].items()}
            for kind in ("inputs", "gradients")
        )
        return cls(inputs, gradients)


def kfac_factors(
    run: EditRun,
    layers: Mapping[str, LinearLayer],
    sequences: Sequence[Sequence[int]],
    *,
    batch_size: int,
    seed: int,
    unedited: bool = True,
    skip_first: bool = False,
) -> KFACFactors:
    """Compute the K-FAC factors of every layer, with labels sampled from the model's own distribution.

    Labels from the texts would give the empirical Fisher matrix, which is a different matrix. One random number per
    token is drawn before the first batch. The sampled labels therefore do not depend on the batch size or on the number
    of processes.

    Args:
        run: the current run.
        layers: name -> linear layer.
        sequences: token ids, the same on every process.
        batch_size: sequences per forward and backward pass.
        seed: seed of the sampled labels.
        unedited: whether to use the model before the edit, instead of the model with its current weights.
        skip_first: whether to leave out the first token of every sequence. In many models, the first token is an
            attention sink, whose activations are so large that they would dominate the factors.

    Returns:
        The factors. The gradients are gradients of the summed cross-entropy, not of the mean.

    Raises:
        EditError: a layer was never called, does not receive one vector per token, or is the output head.
    """
    head = run.head()
    inputs: dict[str, SecondMoment] = {}
    gradients: dict[str, SecondMoment] = {}
    outputs: list[tuple[str, Tensor]] = []
    for name, layer in layers.items():
        if any(module in head.module.modules() for module in layer.modules):
            raise EditError(
                f"{name} is the output head, for which the K-FAC factor would be too large (shape [vocabulary, "
                "vocabulary]); remove this parameter from the scope."
            )
        d_out, d_in = layer.as_matrix(run.scope[name]).shape
        inputs[name], gradients[name] = zero_moment(run.scope[name], d_in), zero_moment(run.scope[name], d_out)
    generator = torch.Generator().manual_seed(seed)
    numbered = [(list(ids), torch.rand(len(ids), generator=generator, dtype=torch.float64)) for ids in sequences]
    own = sorted(share_of_process(numbered), key=lambda pair: len(pair[0]))
    parts = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
    # Every process must call the model equally often. The additional batches contain one sequence and are not counted.
    extra = [numbered[:1]] * missing_batches(len(numbered), len(own), batch_size)
    device = next(run.model.parameters()).device
    batch: Batch

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            inputs[name].update(batch.real_tokens(layer_input(args, kwargs).detach(), name))
            outputs.append((name, output))

        return record

    weights = run.reference_model() if unedited else nullcontext()
    hooks = [m.register_forward_hook(hook(n), with_kwargs=True) for n, layer in layers.items() for m in layer.modules]
    try:
        with weights, evaluation_mode(run.model), run.host.forward_context(), torch.enable_grad():
            for number, part in enumerate([*parts, *extra]):
                batch = next(text_batches([ids for ids, _ in part], len(part), device))
                batch = replace(batch.without_first() if skip_first else batch, counted=number < len(parts))
                uniform = torch.cat([numbers for _, numbers in part]).to(device, torch.float32)
                loss = _loss_on_sampled_labels(head, batch, uniform)
                at_outputs = torch.autograd.grad(loss, [output for _, output in outputs], allow_unused=True)
                for (name, _), gradient in zip(outputs, at_outputs, strict=True):
                    if gradient is not None:
                        gradients[name].update(batch.real_tokens(gradient, name))
                outputs.clear()
    finally:
        for handle in hooks:
            handle.remove()
    return KFACFactors(sum_over_processes(inputs), sum_over_processes(gradients))


def _loss_on_sampled_labels(head: OutputHead, batch: Batch, uniform: Tensor) -> Tensor:
    """Sample one label per token from the model's predictions, and return the summed cross-entropy with these labels.

    Args:
        head: the output head of the model.
        batch: the batch on which the model runs.
        uniform: [tokens], one random number between 0 and 1 per token, which selects the label.
    """
    assert isinstance(batch.inputs, Mapping)
    hidden = head.hidden(**batch.inputs)[batch.inputs["attention_mask"].bool()]

    def score(states: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
        logits = head.project(states)
        with torch.no_grad():
            cumulative = logits.float().softmax(-1).cumsum(-1)
            labels = torch.searchsorted(cumulative, numbers.unsqueeze(-1) * cumulative[:, -1:], right=True).squeeze(-1)
        return (F.cross_entropy(logits, labels.clamp(max=logits.shape[-1] - 1), reduction="none"),)

    chunk = chunk_length(head.config.vocab_size)
    (losses,) = chunked(score, hidden, uniform, chunk=chunk, parameters=head.trained)
    return losses.sum()
