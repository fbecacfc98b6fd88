"""Towards what is each token pulled? First away from the old answers: they are subtracted before the new ones train."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kedit_train.callbacks.base import EditCallback
from kedit_train.core.locality.texts import Texts, TextSource
from kedit_train.core.output_head import evaluation_mode
from kedit_train.core.processes import is_distributed
from kedit_train.core.reference_weights import write
from kedit_train.core.run import EditRun
from kedit_train.data import Edit, EditDataset
from kedit_train.data.prompts import PromptFormat, check_format
from kedit_train.data.tokenization import collate, context_length, pad_token_id
from kedit_train.errors import EditError
from kedit_train.evaluation.forgetting import PUBLISHED, Guards, Measured, Scale, measure, old_answers
from kedit_train.functional.labels import IGNORE_INDEX


class ForgetFirst(EditCallback):
    """Before the first step, subtract what training on the old answers would change.

    F-Learning ("Forgetting before Learning: Utilizing Parametric Arithmetic for Knowledge Updating in LLMs", arXiv
    2311.08011): ``theta' = theta - coefficient * (FT(theta, old) - theta)`` on the scope, and the run learns the new
    answers from there. The coefficients are tried in ascending order until the old answers' mean probability is at most
    ``bound``, and not beyond the last one with which the perplexity on ``texts`` is at most ``growth`` times as large.
    An edit takes part whose old answer the model gives by itself: its ``old_target``, or, where the data has none,
    whatever the model answers unless that is the new answer. One line says what was done; ``measured`` holds it.

    Everything else still refers to the model before forgetting: the drift, ``SaveDelta``, the unedited look of
    ``EditMetrics``, what ``KLLocality`` holds answers to, the centre of ``NormBall``. Constraints hold for the
    forgetting too, and are part of what is measured: a small ball leaves little of it, and a warning says so.

    With a learning rate of 0 the run only forgets.

    Args:
        texts: for the perplexity, as of ``KLLocality``. Texts that state other facts in the edits' wordings notice harm
            long before prose does. Those that hold a prompt that the edits are scored on are left out.
        edits: a path or edits; by default those that ``EditMetrics`` or a data module holds.
        coefficients: shares of ``scale``, above 0; None takes the paper's 0.1, 0.3, 0.5, 0.7.
        scale: "base", the length of the scoped weights, so that the amount does not depend on the training on the old
            answers; or "trained", that of the trained difference, as in the paper.
        bound: a probability.
        growth: of the perplexity, at least 1.
        epochs: passes over the old answers; Adam at a constant rate, dropout off.
        lr: of these. The run's own optimizer has no part in it.
        batch_size: old answers a step, and rows of the measurements.
        max_new_tokens: an old answer that is longer is left out.
        tokenizer: an object, a name or a path; by default the host's, else the one saved with the model.
        prompt_format: in which form the old answers are asked for, trained and measured; to be that of the run.
        seed: of the order of the old answers. The random state that the run sees is not touched.

    Costs once ``epochs`` passes over the old answers and a measurement for each coefficient. Memory, until the first
    step: beyond the reference that ``ParameterScope`` keeps, four times the scope (values, gradients, Adam's two
    moments), never a second model. A resumed run does not forget again.

    Raises:
        EditError: no ``ParameterScope``, adapters, or a sharded scope.

    Example:
        >>> callbacks = [ParameterScope(layers=0.7, modules="mlp.down_proj"), ForgetFirst(texts), EditMetrics(edits)]
    """

    # Last: whatever the others take from the unedited model when they start, they have taken by then.
    order = 99
    duplicate_hint = "give one of them all the edits"

    def __init__(
        self,
        texts: TextSource | Texts,
        edits: Any = None,
        coefficients: list[float] | None = None,
        scale: Scale = "base",
        bound: float = 0.5,
        growth: float = 1.1,
        epochs: int = 20,
        lr: float = 5e-4,
        batch_size: int = 32,
        max_new_tokens: int = 32,
        tokenizer: Any = None,
        prompt_format: PromptFormat = "plain",
        seed: int = 0,
    ) -> None:
        check_format(prompt_format)
        if epochs < 1 or batch_size < 1 or max_new_tokens < 1 or not 0 < lr < math.inf:
            raise EditError(
                f"ForgetFirst: epochs={epochs}, batch_size={batch_size}, max_new_tokens={max_new_tokens}, lr={lr}: "
                "expected 1 or more of each, and a learning rate above 0"
            )
        self.guards = Guards(PUBLISHED if coefficients is None else coefficients, scale, bound, growth)
        self.texts = Texts.of(texts)
        self.edits = list(edits) if isinstance(edits, Iterator) else edits
        self.epochs, self.lr, self.batch_size, self.max_new_tokens = epochs, lr, batch_size, max_new_tokens
        self.tokenizer, self.seed = tokenizer, seed
        self.prompt_format: PromptFormat = prompt_format
        self.measured: list[Measured] = []
        self.taken = 0

    def prepare(self, run: EditRun) -> None:
        run.causal_model()
        if hasattr(run.model, "peft_config"):
            raise EditError(
                "ForgetFirst subtracts from weights, and an adapter's factors multiply: forget without adapters first "
                "(recipes/unlearn.yaml), and put them on the model that it saves"
            )
        if self.edits is not None:
            EditDataset.of(self.edits)
        self.texts.check()

    def attach(self, run: EditRun) -> None:
        self.measured, self.taken = [], 0
        if run.host.resumed:
            # The weights of the checkpoint have forgotten; load_state brings what was measured.
            return
        if not run.reference:
            raise EditError(
                "ForgetFirst subtracts from the weights in scope, and there is no scope: add ParameterScope"
            )
        if any(isinstance(p, DTensor) for p in run.scope.values()):
            raise EditError(
                "ForgetFirst cannot train on the old answers where the scope is sharded: forget in one process first "
                "(recipes/unlearn.yaml)"
            )
        with torch.no_grad(), evaluation_mode(run.model), run.host.forward_context():
            line = self._forget(run)
        if is_distributed():
            # Sums on a GPU depend on their order; weights of their own would let the processes diverge.
            for parameter in run.scope.values():
                dist.broadcast(parameter.data, src=0)
        if run.host.is_main:
            print(line)

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken, "measured": [asdict(one) for one in self.measured]}

    def load_state(self, state: dict[str, Any]) -> None:
        self.taken, self.measured = state["taken"], [Measured(**one) for one in state["measured"]]

    def metrics(self, run: EditRun) -> dict[str, float]:
        """What was subtracted, and what the model was like before and after."""
        if not self.measured:
            return {}
        before, after = self.measured[0], self.measured[self.taken]
        return {
            "edit/forgetting/coefficient": after.coefficient,
            "edit/forgetting/old_probability_before": before.probability,
            "edit/forgetting/old_probability": after.probability,
            "edit/forgetting/old_given": after.given,
            "edit/forgetting/perplexity_before": before.perplexity,
            "edit/forgetting/perplexity": after.perplexity,
        }

    def _forget(self, run: EditRun) -> str:
        """Change the live weights, and say what was done."""
        edits = self.edits if self.edits is not None else run.edits or run.host.edits()
        if edits is None:
            raise EditError(
                f"ForgetFirst: this {run.host.name} run holds no edits of its own; give edits=, a path or an "
                "EditDataset"
            )
        edits = EditDataset.of(edits)
        tokenizer = run.tokenizer(self.tokenizer)
        texts = self.texts.load(edits)
        form: dict[str, Any] = {
            "batch_size": self.batch_size,
            "prompt_format": self.prompt_format,
        }
        old, _ = old_answers(run.model, tokenizer, edits, max_new_tokens=self.max_new_tokens, **form)
        if not old:
            warnings.warn(
                f"ForgetFirst: the model gives none of {len(edits)} old answers: nothing to forget", stacklevel=2
            )
            return f"forgot nothing: the model gives none of {len(edits)} old answers"
        before = measure(run.model, tokenizer, old, texts, 0.0, 0.0, **form)
        base = run.reference
        try:
            difference = self._trained(run, tokenizer, old, base)
            changed = {name: base[name] for name, value in difference.items() if bool(value.any())}
            if not changed:
                raise EditError("ForgetFirst: training on the old answers changed no weight: raise lr")
            length = _norm(difference) / max(_norm(changed), 1e-30)

            def subtracted(coefficient: float, factor: float) -> Measured:
                _subtract(run, base, difference, factor)
                return measure(run.model, tokenizer, old, texts, coefficient, factor, **form)

            self.measured, self.taken, ended = self.guards.search(before, length, subtracted)
        except BaseException:
            write(run.scope, base)
            raise
        best = self.measured[self.taken]
        write(run.scope, base)
        if self.taken:
            _subtract(run, base, difference, best.factor)
        if ended != "forgotten":
            holding = ", ".join(type(callback).__name__ for callback in run.callbacks if callback.constrains)
            also = f"; {holding} held back a part of it" if holding else ""
            warnings.warn(self.guards.shortfall(self.measured, self.taken, ended, length) + also, stacklevel=2)
        return (
            f"forgot, of {len(edits)} edits, {len(old)} old answers that the model gave: coefficient "
            f"{best.coefficient:g} ({best.factor:.3g} times the trained difference), probability "
            f"{before.probability:.3f} -> {best.probability:.3f}, still given {best.given:.2f}, perplexity "
            f"{before.perplexity:.3f} -> {best.perplexity:.3f}, ended by {ended}"
        )

    def _trained(
        self, run: EditRun, tokenizer: Any, old: Sequence[Edit], base: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What training on the old answers changes; the live weights are those that were trained, afterwards.

        The optimizer has parameters of its own: the run takes every step of an optimizer of its scope for its own.
        """
        head = run.head()
        length = context_length(run.model.config)
        rows = EditDataset(old).encode(tokenizer, max_length=length, prompt_format=self.prompt_format)
        pad_id, device = pad_token_id(tokenizer), next(run.model.parameters()).device
        own = {name: nn.Parameter(value.clone()) for name, value in base.items()}
        optimizer = torch.optim.Adam(own.values(), lr=self.lr)
        source = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            for batch in torch.randperm(len(rows), generator=source).split(self.batch_size):
                tensors = collate([rows[int(i)] for i in batch], pad_id=pad_id)
                ids, mask, labels = (tensors[key].to(device) for key in ("input_ids", "attention_mask", "labels"))
                where = labels[:, 1:] != IGNORE_INDEX
                with torch.enable_grad():
                    hidden = head.hidden(input_ids=ids, attention_mask=mask)
                    logits = head.project(hidden[:, :-1][where])
                    loss = nn.functional.cross_entropy(logits.float(), labels[:, 1:][where].to(logits.device))
                if not bool(loss.isfinite()):
                    raise EditError(f"ForgetFirst: the loss on the old answers is {float(loss)}: lower lr={self.lr}")
                # Not backward(): that would touch .grad and everything that hooks into it (DDP's reduction, masks).
                found = torch.autograd.grad(loss, list(run.scope.values()), allow_unused=True)
                for parameter, gradient in zip(own.values(), found, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                write(run.scope, own)
        return {name: value.detach() - base[name] for name, value in own.items()}

    def __repr__(self) -> str:
        guards = self.guards
        told = f"coefficients={list(guards.coefficients)}, scale={guards.scale!r}, bound={guards.bound}"
        return f"ForgetFirst({told}, growth={guards.growth}, epochs={self.epochs}, lr={self.lr})"


def _subtract(run: EditRun, base: Mapping[str, Tensor], difference: Mapping[str, Tensor], factor: float) -> None:
    """``base - factor * difference`` into the live weights, with every constraint holding."""
    write(run.scope, {name: value - factor * difference[name] for name, value in base.items()})
    # Nothing has been stepped: what is done once a step (an anchor's pull) is left out.
    run.steps.learning_rates = {}
    run.steps.apply_constraints()


def _norm(values: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in values.values()))
