"""Replace a model's loss with a per-token objective, computed inside the model's own forward call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kedit_train.core.output_head import OutputHead
from kedit_train.core.tokens.interfaces import (
    ExampleFilter,
    LeftOut,
    LeftOutExample,
    Objective,
    Position,
    Reduction,
    SoftTargets,
    TokenTerm,
)
from kedit_train.core.tokens.loss_output import fused_output, model_output
from kedit_train.core.tokens.sequences import first_of_sequence, sequence_numbers, sequence_weights, text_positions
from kedit_train.core.transforms import check_no_transform
from kedit_train.errors import EditError
from kedit_train.functional.chunked_loss import chunk_length, chunked
from kedit_train.functional.closed_form_losses import entropy
from kedit_train.functional.labels import IGNORE_INDEX
from kedit_train.functional.precision import HALF


@dataclass
class _Call:
    """The arguments that the host passed to one forward call.

    Args:
        labels: [batch, length].
        items: ``num_items_in_batch``, the number of tokens over which the host takes the mean, or None.
        fused: whether TRL passed ``fused_lm_head=True``. TRL then expects an output with one loss per token.
        positions: the position of each token in its sequence, or None if the positions are not known.
        reference_states: the hidden states of the reference model at the N supervised tokens, [N, hidden]. None if the
            loss has no second term (:class:`TokenTerm`).
        soft_targets: tensors [N, ...] with the soft targets of the N supervised tokens. Empty without soft targets.
        left_out: examples that were removed from the batch.
    """

    labels: Tensor
    items: Any
    fused: bool
    positions: Tensor | None
    reference_states: Tensor | None
    soft_targets: tuple[Tensor, ...]
    left_out: LeftOut


class LossHead:
    """Replaces the loss of a causal language model during training.

    The host (the training framework) calls ``model(..., labels=...)`` as before. Two hooks on the model replace the
    loss:

    - The hook before the forward pass removes the labels, so that the model computes no loss. The hook also makes the
      output head compute the logits of only one position, to save time and memory. These logits are not used.
    - The hook after the forward pass computes the logits and the loss of the supervised positions with the objective,
      and puts the loss into ``output.loss``. If TRL passes ``fused_lm_head=True``, this hook instead returns the output
      that TRL then expects, with one loss per token.

    The hooks ignore calls without gradients or without labels.

    Args:
        head: the model's output head.
        shares: function that returns how many micro-batch losses the host adds up in one optimizer step
            (:meth:`Host.summed_micro_batches`). If the host averages these losses, the function returns 1.
        full_logits: whether the host reads the logits of training steps (:attr:`Host.reads_logits`). If True, the
            logits of all positions are computed, without gradients.

    Attributes:
        term: a second term in the loss of every supervised token, or None.
        filter: removes learned examples from the batches, or None.
        soft_targets: finds soft targets of the supervised tokens, which are passed to the objective after the labels.
            None if the objective needs only the labels.
    """

    def __init__(self, head: OutputHead, *, shares: Callable[[], int], full_logits: bool = False) -> None:
        self.head = head
        self.shares = shares
        self.full_logits = full_logits
        self.term: TokenTerm | None = None
        self.filter: ExampleFilter | None = None
        self.soft_targets: SoftTargets | None = None
        self.use(cross_entropy)
        self._inert = False
        self._call: _Call | None = None
        self._handles = [
            head.model.register_forward_pre_hook(self._before, with_kwargs=True),
            # always_call: after a failed forward pass, the head must compute all positions again.
            # prepend: FSDP2 detects the start of the backward pass on the output, so its hook must run later.
            head.model.register_forward_hook(self._after, always_call=True, prepend=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        # The hooks of a copied or unpickled model must do nothing.
        return {"_inert": True, "_call": None}

    def use(
        self,
        objective: Objective,
        *,
        reduction: Reduction = "token",
        position: Position = "own",
        observe: Callable[..., None] | None = None,
    ) -> None:
        """Set the objective that computes the loss of each token.

        Until this method is called, the objective is cross-entropy, as in the training frameworks.

        Args:
            objective: function that returns the loss of each token. ``Objective`` describes its arguments.
            reduction: "token" gives every supervised token the same weight, as the training frameworks do. "sample"
                gives every sequence the same weight.
            position: "own" computes the loss of each token from the distribution that predicts this token. "first"
                computes the losses of all tokens of a sequence from the distribution that predicts the first one.
            observe: function that is called after each micro-batch. Its arguments are tensors [N]: first ``active``
                (whether the objective counts the token in the loss), then the loss, then the statistics of the
                objective.
        """
        self.objective = objective
        self.reduction = reduction
        self.position = position
        self.observe = observe

    def remove(self) -> None:
        """Remove the hooks, so that the model returns its own loss again."""
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        self._call = None
        # module.training does not show whether the host trains: Lightning keeps a model in evaluation mode if
        # from_pretrained() returned the model in evaluation mode.
        if self._inert or not torch.is_grad_enabled() or kwargs.get("labels") is None:
            return None
        check_no_transform()
        if kwargs.get("shift_labels") is not None:
            raise EditError(
                "shift_labels must not be passed to the model, because the callbacks of this edit shift the labels "
                "themselves; turn off sequence parallelism, which passes shift_labels."
            )
        if self.term is not None and self.position == "first":
            raise EditError(
                "BatchAnchor cannot be combined with TokenLoss('prompt_last'); use another objective, or remove "
                "BatchAnchor."
            )
        reference = None if self.term is None else self.term.reference_states(args, kwargs, kwargs["labels"])
        kwargs, left_out = dict(kwargs), LeftOut()
        fused = bool(kwargs.pop("fused_lm_head", False))
        if args and (self.filter is not None or self.soft_targets is not None):
            args, kwargs = (), {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs}
        if self.filter is not None:
            kwargs, left_out = self.filter.select(kwargs)
        soft_targets = () if self.soft_targets is None else self.soft_targets(kwargs)
        self._call = _Call(
            labels=kwargs.pop("labels"),
            items=kwargs.pop("num_items_in_batch", None),
            fused=fused,
            positions=text_positions(kwargs.get("position_ids")),
            reference_states=reference,
            soft_targets=soft_targets,
            left_out=left_out,
        )
        self.head.begin()
        return args, kwargs | {"use_cache": False}

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        call, self._call = self._call, None
        if call is None:
            return None
        hidden = self.head.captured
        self.head.end()
        if output is None:
            return None
        if isinstance(output, tuple):
            raise EditError(
                f"{type(module).__name__} must return a ModelOutput, got a tuple; remove return_dict=False."
            )
        if hidden is None or hidden.shape[:2] != call.labels.shape:
            shape = "none" if hidden is None else f"[batch, length] = {tuple(hidden.shape[:2])}"
            raise EditError(
                f"the output head of {type(module).__name__} must receive one hidden state per label, [batch, length] "
                f"= {tuple(call.labels.shape)}, got {shape}; remove prompt tuning, or call the output head as a module "
                "in forward()."
            )
        output = self._score(call, hidden[:, :-1], output)
        if self.full_logits and not call.fused:
            with torch.no_grad():
                output.logits = call.left_out.in_batch(self.head.project(hidden))
        return output

    def _score(self, call: _Call, hidden: Tensor, output: Any) -> Any:
        labels = call.labels[:, 1:].to(hidden.device)
        where = labels != IGNORE_INDEX
        count = (where.sum() + call.left_out.tokens).clamp(min=1) if call.items is None else call.items
        count = torch.as_tensor(count, device=hidden.device, dtype=torch.float32)
        shares = self.shares() if call.items is not None else 1
        weights = self._weights(call, where, count, shares).to(torch.promote_types(hidden.dtype, torch.float32))
        states = hidden[where]
        if self.position == "first":
            states = states[first_of_sequence(sequence_numbers(where, call.positions))]

        added, columns = self._per_token(call, states, labels[where], weights)
        loss, active, *statistics = columns[: len(columns) - len(added)]
        extra = dict(zip(added, columns[len(columns) - len(added) :], strict=True))
        unweighted = loss.detach() / weights
        logged = [extra[name] for name in ("entropy", "correct") if name in extra]
        if self.term is not None:
            self.term.observe(extra["divergence"])
        if self.filter is not None:
            bound = self.filter.probability
            self.filter.record(where, active if bound is None else extra["probability"] < bound, unweighted, *logged)
        if self.observe is not None:
            self.observe(active, unweighted, *statistics)

        left_out = self._left_out_weights(call, where, count, shares)
        if call.fused:
            scaled = [(example, weight * count) for example, weight in left_out]
            return fused_output(loss, where, *logged, left_out=scaled, aux_loss=getattr(output, "aux_loss", None))
        # Removed examples add a constant. Without this constant, the logged loss would fall when examples are removed.
        total = loss.sum() + sum(example.loss * weight for example, weight in left_out)
        if getattr(output, "aux_loss", None) is not None:
            # A mixture-of-experts model adds the balancing term only if it receives labels, which were removed.
            total = total + self.head.config.router_aux_loss_coef * output.aux_loss.to(total.device)
        return model_output(output, total)

    def _weights(self, call: _Call, where: Tensor, count: Tensor, shares: int) -> Tensor:
        """Return the weight [N] of each supervised token's loss."""
        if self.reduction == "sample":
            left_out = len(call.left_out.examples)
            weights = sequence_weights(where, call.positions, left_out=left_out, shares=shares)
            # TRL divides the sum of the losses by the count, so the weights are multiplied by the count here.
            return (weights * count if call.fused else weights)[where]
        return (where if call.fused else where / count)[where]

    def _left_out_weights(
        self, call: _Call, where: Tensor, count: Tensor, shares: int
    ) -> list[tuple[LeftOutExample, Any]]:
        """Return each example that the filter left out, with the factor of its loss."""
        examples = call.left_out.examples
        if self.reduction == "token":
            return [(example, 1.0 / count) for example in examples]
        total = int(where.any(1).sum()) + len(examples)
        return [(example, 1.0 / (max(1, example.tokens) * total * shares)) for example in examples]

    def _per_token(
        self, call: _Call, hidden: Tensor, labels: Tensor, weights: Tensor
    ) -> tuple[list[str], tuple[Tensor, ...]]:
        """Compute the loss and other values of every supervised token.

        Returns:
            The names of additional values, and a tuple of tensors [N]: the weighted loss, ``active``, the statistics of
            the objective, and the additional values. These are "probability" if the filter needs it, "divergence" if
            the loss has a second term, and "entropy" and "correct" if TRL passed ``fused_lm_head=True``.
        """
        term = self.term
        needs_probability = self.filter is not None and self.filter.probability is not None
        soft_targets = tuple(target.to(hidden.device) for target in call.soft_targets)
        reference = () if call.reference_states is None else (call.reference_states.to(hidden),)
        added = ["probability"] if needs_probability else []
        added += ["divergence"] if term is not None else []
        added += ["entropy", "correct"] if call.fused else []

        def score(states: Tensor, targets: Tensor, factors: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
            logits = self.head.project(states, fp32_gradients=call.fused)
            loss, *columns = self.objective(logits, targets, *others[: len(soft_targets)])
            if needs_probability:
                columns.append((-F.cross_entropy(logits.detach(), targets, reduction="none")).exp())
            if term is not None:
                divergence = term.divergence(logits, *others[len(soft_targets) :])
                loss, columns = loss + term.weight * divergence, [*columns, divergence.detach()]
            if call.fused:
                # TRL logs the entropy and the token accuracy at every step.
                columns += [entropy(logits), logits.detach().argmax(-1) == targets]
            # The weights are applied here, so that gradients are rounded at the scale of the host's loss and the loss
            # is a plain sum.
            return loss * factors, *columns

        vocab_size = getattr(self.head.module, "out_features", None) or self.head.config.vocab_size
        # In half precision, the gradient of the logits is rounded, so it must already have its final scale. TRL divides
        # the loss by its own count, and an fp16 scaler multiplies the loss. Both factors are known only in the backward
        # pass, so the gradient is computed there.
        dtype = self.head.compute_dtype(hidden)
        defer = dtype == torch.float16 or (call.fused and dtype in HALF)
        # With a second loss term, the chunk keeps its length. Shorter chunks would use memory blocks just below glibc's
        # mmap threshold, and such blocks would make the heap grow.
        chunk = chunk_length(vocab_size)
        others = (*soft_targets, *reference)
        return added, chunked(
            score, hidden, labels, weights, *others, chunk=chunk, parameters=self.head.trained, defer=defer
        )


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of each token [N], and a mask [N] of the tokens that count in the loss.

    Cross-entropy counts every token, so the mask is True everywhere.
    """
    return F.cross_entropy(logits, labels, reduction="none"), torch.ones_like(labels, dtype=torch.bool)
