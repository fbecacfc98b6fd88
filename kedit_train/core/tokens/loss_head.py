"""One loss for every host: a per-token objective on the supervised positions, inside the model's own forward call.

The host calls ``model(..., labels=...)`` as ever. Where gradients are recorded, a hook takes the labels out of the
call, the host's head computes a single position, and another hook scores the supervised positions with the objective
and hands the host what it reads: ``output.loss``, or the per-token fields of TRL's fused head. Without gradients
nothing changes.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kedit_train.core.output_head import OutputHead
from kedit_train.core.tokens.active_examples import Left, Seen
from kedit_train.errors import EditError
from kedit_train.functional.chunked_loss import chunk_length, chunked
from kedit_train.functional.closed_form_losses import entropy
from kedit_train.functional.labels import IGNORE_INDEX
from kedit_train.functional.precision import HALF

# logits [N, V] in fp32, labels [N] -> loss [N], active [N], further per-token statistics [N] ...
Objective = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
Reduction = Literal["token", "sample"]
# The position that scores a token: its own, or that of the first supervised token of its sequence.
Position = Literal["own", "first"]


class TokenTerm(Protocol):
    """A second term in the loss of every supervised token, such as the divergence from the reference model.

    Attributes:
        weight: factor of the term.
    """

    weight: float

    def reference_states(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], labels: Tensor) -> Tensor:
        """Return what the term compares with, [N, hidden], before the forward pass of the training itself.

        Args:
            args, kwargs: arguments of the model's forward call.
            labels: [batch, sequence]; N of the positions predict a supervised token.
        """
        ...

    def divergence(self, logits: Tensor, reference_states: Tensor) -> Tensor:
        """Return the term [n] for some of the tokens, from their logits [n, vocabulary] and reference [n, hidden]."""
        ...

    def observe(self, divergence: Tensor) -> None:
        """Receive the unweighted terms [N] of one forward pass, without gradient."""
        ...


class ExampleFilter(Protocol):
    """Decides which examples of a batch the model runs on.

    Attributes:
        probability: an example is learned when each of its tokens has this probability; None uses the objective's clip.
    """

    probability: float | None

    def select(self, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], Left]:
        """Return the arguments of the forward call without the examples that are left out, and what these were."""
        ...

    def learn(self, where: Tensor, active: Tensor, *logged: Tensor) -> None:
        """Receive which supervised tokens of the remaining examples are still active, and their losses."""
        ...


@dataclass
class Request:
    """What the host asked of one forward call."""

    labels: Tensor
    items: Any
    fused: bool
    positions: Tensor | None
    # What the head's anchor compares with, [N, d] at the supervised positions.
    before: Tensor | None
    # Rows that have nothing left to learn and are not there; means still count them.
    left: Left


class LossHead:
    """Replaces a causal language model's loss while it trains.

    Args:
        head: the model's output head.
        shares: returns the number of micro-batches whose losses the host adds up without dividing
            (:meth:`Host.loss_shares`).

    Attributes:
        term: a second term in the loss of every supervised token, or None.
        filter: leaves examples out of the batches, or None.
    """

    def __init__(self, head: OutputHead, *, shares: Callable[[], int]) -> None:
        self.head, self.shares = head, shares
        self.term: TokenTerm | None = None
        self.filter: ExampleFilter | None = None
        self.use(cross_entropy)
        self._inert = False
        self._request: Request | None = None
        self._handles = [
            head.model.register_forward_pre_hook(self._before, with_kwargs=True),
            # Also after a forward that failed, so that the next one does not find the head reduced to one position.
            # First of all hooks: FSDP2 learns of the backward pass through what the forward returns behind them.
            head.model.register_forward_hook(self._after, always_call=True, prepend=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        # A copied or pickled model takes its hooks along; there they do nothing.
        return {"_inert": True, "_request": None}

    def use(
        self,
        objective: Objective,
        *,
        reduction: Reduction = "token",
        position: Position = "own",
        observe: Callable[..., None] | None = None,
    ) -> None:
        """Set the objective; without a call it is the cross-entropy of the hosts.

        Args:
            objective: scores tokens; see ``Objective``.
            reduction: "token" weighs every supervised token alike, as the hosts do; "sample" every sequence alike.
            position: the position whose distribution scores a token.
            observe: receives the results of each micro-batch, [N] each: active, loss, and the further statistics of
                the objective.
        """
        self.objective, self.reduction, self.position, self.observe = objective, reduction, position, observe

    def remove(self) -> None:
        """Give the model its own loss back."""
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        self._request = None
        # Whether gradients are recorded tells training from evaluation; module.training does not: Lightning leaves a
        # model in the evaluation mode that from_pretrained() returned it in.
        if self._inert or not torch.is_grad_enabled() or kwargs.get("labels") is None:
            return None
        if kwargs.get("shift_labels") is not None:
            raise EditError("labels that are shifted already (sequence parallelism) are not supported by the loss head")
        before = None if self.term is None else self.term.reference_states(args, kwargs, kwargs["labels"])
        kwargs, left = dict(kwargs), Left()
        fused = bool(kwargs.pop("fused_lm_head", False))
        if self.filter is not None:
            given = inspect.signature(module.forward).bind_partial(*args).arguments if args else {}
            args, (kwargs, left) = (), self.filter.select({**given, **kwargs})
        self._request = Request(
            labels=kwargs.pop("labels"),
            items=kwargs.pop("num_items_in_batch", None),
            fused=fused,
            positions=kwargs.get("position_ids"),
            before=before,
            left=left,
        )
        self.head.begin()
        return args, kwargs | {"use_cache": False}

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        request, self._request = self._request, None
        if request is None:
            return None
        hidden = self.head.captured
        self.head.end()
        if output is None:
            return None
        if isinstance(output, tuple):
            raise EditError(f"{type(module).__name__} returns a tuple; call it without return_dict=False")
        if hidden is None or hidden.shape[:2] != request.labels.shape:
            got = "none" if hidden is None else tuple(hidden.shape[:2])
            raise EditError(
                f"the head of {type(module).__name__} reads positions {got} where the labels have "
                f"{tuple(request.labels.shape)}; prompt tuning and heads that are not called as modules are unsupported"
            )
        return self._score(request, hidden[:, :-1], output)

    def _score(self, request: Request, hidden: Tensor, output: Any) -> Any:
        labels = request.labels[:, 1:].to(hidden.device)
        where = labels != IGNORE_INDEX
        count = (where.sum() + request.left.tokens).clamp(min=1) if request.items is None else request.items
        count = torch.as_tensor(count, device=hidden.device, dtype=torch.float32)
        weights = self._sample_weights(request, where) if self.reduction == "sample" else where / count
        if request.fused:
            # TRL sums and divides by the count itself.
            weights = weights * count if self.reduction == "sample" else where
        weights = weights[where].to(torch.promote_types(hidden.dtype, torch.float32))
        states = hidden[where]
        if self.position == "first":
            states = states[self._first(request, where)]
        loss, active, *statistics = self._per_token(request, states, labels[where], weights)
        entropy_and_top1 = [statistics.pop() for _ in range(2)][::-1] if request.fused else []
        if self.term is not None:
            self.term.observe(statistics.pop())
        if self.filter is not None:
            bound = self.filter.probability
            busy = active if bound is None else statistics.pop() < bound
            self.filter.learn(where, busy, loss.detach() / weights, *entropy_and_top1)
        if self.observe is not None:
            self.observe(active, loss.detach() / weights, *statistics)
        if request.fused:
            left = [(row, share * count) for row, share in self._shares(request, where, count)]
            aux_loss = getattr(output, "aux_loss", None)
            return self._fused_output(loss, where, *entropy_and_top1, left=left, aux_loss=aux_loss)
        # What was left out had a loss as well, a constant now, without which the logged one would fall below the clip.
        output.loss = loss.sum() + sum(row.loss * share for row, share in self._shares(request, where, count))
        # One position of them was computed, for the host's own head; whoever reads them shall know.
        output.logits = Unbuilt()
        if getattr(output, "aux_loss", None) is not None:
            # Mixture-of-experts models add their balancing term only where they see labels.
            output.loss = output.loss + self.head.config.router_aux_loss_coef * output.aux_loss.to(output.loss.device)
        # Added last, and yet the first entry as in the model's own output: loops read model(...)[0].
        if isinstance(output, OrderedDict):
            output.move_to_end("loss", last=False)
        return output

    def _per_token(self, request: Request, hidden: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        fused, term = request.fused, self.term
        before = () if request.before is None else (request.before.to(hidden),)

        def score(states: Tensor, targets: Tensor, factors: Tensor, *states_before: Tensor) -> tuple[Tensor, ...]:
            logits = self.head.project(states, fp32_gradients=fused)
            loss, *statistics = self.objective(logits, targets)
            if self.filter is not None and self.filter.probability is not None:
                statistics.append((-F.cross_entropy(logits.detach(), targets, reduction="none")).exp())
            if term is not None:
                divergence = term.divergence(logits, *states_before)
                loss, statistics = loss + term.weight * divergence, [*statistics, divergence.detach()]
            if fused:
                # TRL logs both for every step, so its users shall find them unchanged.
                statistics += [entropy(logits), logits.detach().argmax(-1) == targets]
            # Weighted here, so that gradients are rounded at the host's own scale, and one sum serves all tokens.
            return loss * factors, *statistics

        vocab_size = getattr(self.head.module, "out_features", None) or self.head.config.vocab_size
        # In half precision the gradient of the logits is rounded, and TRL divides by a token count that only it knows.
        # To round as it does, chunks are computed again in the backward pass, as TRL itself does.
        # In fp16 small gradients would be lost before the scaler, which comes with the backward pass, lifts them.
        dtype = self.head.compute_dtype(hidden)
        defer = dtype == torch.float16 or (fused and dtype in HALF)
        # As long with an anchor: blocks just below glibc's bound for mapping come from the heap, which then grows.
        chunk = chunk_length(vocab_size)
        return chunked(score, hidden, labels, weights, *before, chunk=chunk, parameters=self.head.trained, defer=defer)

    def _sample_weights(self, request: Request, where: Tensor) -> Tensor:
        """Weights [B, S-1] under which a sum over supervised tokens is the mean over sequences of their token means."""
        index = self._sequences(request, where)
        lengths = torch.bincount(index)
        shares = self.shares() if request.items is not None else 1
        # Said outright: with precision="bf16-true" hosts make bf16 the default.
        weights = torch.zeros(where.shape, dtype=torch.float32, device=where.device)
        weights[where] = 1.0 / (lengths[index].float() * max(1, len(lengths) + request.left.rows) * shares)
        return weights

    @staticmethod
    def _sequences(request: Request, where: Tensor) -> Tensor:
        """Which sequence each supervised token belongs to, [N], counted from 0 without gaps."""
        sequence = torch.arange(len(where), device=where.device).unsqueeze(1).expand_as(where)
        if request.positions is not None:
            # Packed rows hold several sequences; each starts again at position 0. The label of a position is the token
            # after it, hence the shift.
            starts = (request.positions.to(where.device) == 0).expand(request.labels.shape)
            sequence = starts.reshape(-1).cumsum(0).reshape(starts.shape)[:, 1:]
        return sequence[where].unique(return_inverse=True)[1]

    def _first(self, request: Request, where: Tensor) -> Tensor:
        """Of each supervised token, the first supervised one of its sequence, [N]."""
        if request.before is not None:
            raise EditError(
                "KLLocality(texts='batch') anchors each token at its own position, and TokenSmoothing("
                "target='prompt_last') scores it at another: leave one out"
            )
        index = self._sequences(request, where)
        numbers = torch.arange(len(index), device=index.device)
        # Read in order, a sequence's first token stands where its number comes up first.
        begins = torch.ones_like(index, dtype=torch.bool)
        begins[1:] = index[1:] != index[:-1]
        return numbers[begins][index]

    def _shares(self, request: Request, where: Tensor, count: Tensor) -> list[tuple[Seen, Any]]:
        """Rows that were left out, each with the weight of its tokens' losses in the mean over the batch."""
        seen = request.left.seen
        if self.reduction == "token":
            return [(row, 1.0 / count) for row in seen]
        shares = self.shares() if request.items is not None else 1
        rows = int(where.any(1).sum()) + len(seen)
        return [(row, 1.0 / (max(1, row.tokens) * rows * shares)) for row in seen]

    @staticmethod
    def _fused_output(
        loss: Tensor, where: Tensor, entropy: Tensor, top1: Tensor, *, left: list[tuple[Seen, Any]], aux_loss: Any
    ) -> Any:
        from trl.trainer.utils import FusedCausalLMOutput

        tokens = torch.tensor([row.tokens for row, _ in left], device=where.device)

        def place(values: Tensor, seen: list[Any]) -> Tensor:
            grid = values.new_zeros(where.shape).masked_scatter(where, values)
            if not left:
                return grid
            # What TRL does with these is to add them up: rows that are not there follow with what they had.
            means = torch.as_tensor(seen, device=grid.device, dtype=torch.float32) / tokens.clamp(min=1)
            return torch.cat([grid.flatten().float(), means.repeat_interleave(tokens)])

        fields = {"aux_loss": aux_loss} if aux_loss is not None else {}
        return FusedCausalLMOutput(
            loss=loss.mean(),
            log_probs=place(-loss, [-row.loss * share for row, share in left]),
            entropy=place(entropy, [row.entropy for row, _ in left]),
            is_top1=place(top1, [row.top1 for row, _ in left]),
            label_mask=place(where[where], tokens.tolist()),
            **fields,
        )


class Unbuilt:
    """Stands where logits would be that were never built; says so to whoever reads them."""

    @classmethod
    def _read(cls, *args: Any, **kwargs: Any) -> Any:
        raise EditError(
            "the logits of a training step are not built where TokenSmoothing or KLLocality(texts='batch') takes the "
            "loss; use the .loss that the model returns, and read logits under torch.no_grad()"
        )

    # Indexed, given to torch.nn.functional, or asked for a method.
    __getitem__ = __torch_function__ = _read

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._read()


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The hosts' own objective: loss [N], and every token active."""
    return F.cross_entropy(logits, labels, reduction="none"), torch.ones_like(labels, dtype=torch.bool)
