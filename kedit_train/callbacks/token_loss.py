"""TokenLoss: choose the training loss of each token of the new answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from kedit_train.arguments import Rule, at_least, check_arguments, one_of, optional, within
from kedit_train.callbacks.base import EditCallback
from kedit_train.core.processes import is_distributed
from kedit_train.core.requirements import Requirement
from kedit_train.core.run import EditRun
from kedit_train.core.tokens.interfaces import Reduction
from kedit_train.errors import EditError, warn
from kedit_train.functional.cross_entropy import cross_entropy
from kedit_train.functional.dft import dynamic_cross_entropy
from kedit_train.functional.overtone import overtone_statistics
from kedit_train.functional.uniform_smoothing import uniform

Objective = Literal["cross_entropy", "overtone", "uniform", "dft", "prompt_last"]

# Objective -> the arguments that it uses, with their defaults.
DEFAULTS: Mapping[str, Mapping[str, float]] = {
    "cross_entropy": {"epsilon": 0.0},
    "overtone": {"label_weight": 0.1, "epsilon": 0.05, "n_sigma": 0.5},
    "uniform": {"label_weight": 0.9, "epsilon": 0.0},
    "dft": {"epsilon": 0.0},
    "prompt_last": {"epsilon": 0.0},
}
_WIDTH = Rule("> 0 (inf turns the filter off)", lambda value: isinstance(value, int | float) and value > 0)


class TokenLoss(EditCallback):
    """Replace the training loss of each target token by cross-entropy or an objective made for editing.

    The training step must call ``model(..., labels=labels)`` and use the loss that the model returns. Evaluation losses
    do not change. With default arguments, ``TokenLoss()`` computes the same cross-entropy as the trainer. With
    ``reduction="sample"``, the loss is averaged over the tokens of each edit and then over the edits, as in FT-M and
    LocFT.

    If ``epsilon`` is above 0, a token with a loss of at most ``epsilon`` counts as learned, and does not contribute to
    the gradient. If all tokens of an optimizer step are learned, the step is skipped: the weights and the optimizer
    state do not change. If the run has a penalty such as ``KLLocality``, no step is skipped.

    Args:
        objective: how the loss of a token is computed.

            - ``"cross_entropy"``: The target is the label.
            - ``"overtone"``: The target is a mixture of the label and the model's own distribution without unlikely
              tokens. The mixture is recomputed at every step. If the label is not the most probable token of the
              mixture, the target is the label alone.
            - ``"uniform"``: The target is a mixture of the label and the uniform distribution (label smoothing).
            - ``"dft"``: The target is the label. The cross-entropy of a token is multiplied by the model's probability
              of the label.
            - ``"prompt_last"``: The target is the label. The model predicts all tokens of the answer from the last
              position of the prompt, as in FT-L of EasyEdit. It learns which tokens an answer contains, but not their
              order.
        label_weight: weight of the one-hot label in the target mixture, in [0, 1]. Only for ``"overtone"`` (default
            0.1) and ``"uniform"`` (default 0.9).
        epsilon: threshold (clip) in nats. A token with a loss of at most ``epsilon`` has no gradient. Default 0.05 for
            ``"overtone"`` and 0 (no clip) for the other objectives.
        n_sigma: width of the filter that removes unlikely tokens, in standard deviations of the logits. Only for
            ``"overtone"`` (default 0.5).
        reduction: ``"token"`` gives all supervised tokens the same weight, as trainers do. ``"sample"`` gives all
            sequences the same weight, however long their targets are.

    Raises:
        EditError: an argument is out of range, or an argument is given that the objective does not use.

    References:
        - "Mitigating Heterogeneous Token Overfitting in LLM Knowledge Editing" (OverTone), arXiv 2502.00602.
        - "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification" (DFT),
          arXiv 2508.05629.
        - "Fine-tuning Done Right in Model Editing" (LocFT-BF), arXiv 2509.22072.

    Example:
        >>> import torch
        >>> from kedit_train import EditDataset, editing, world
        >>> from kedit_train.callbacks import ParameterScope, TokenLoss
        >>> from kedit_train.data.tokenization import collate
        >>> model, tokenizer = world.load()
        >>> edits = EditDataset.load("world", limit=2)
        >>> batch = collate(edits.encode(tokenizer), pad_id=tokenizer.pad_token_id)
        >>> with editing(model, [ParameterScope(layers=0.7), TokenLoss("overtone")], tokenizer=tokenizer) as edit:
        ...     optimizer = torch.optim.Adam(edit.parameters(), lr=1e-3)
        ...     for _ in range(3):
        ...         edit.before_step()
        ...         loss = model(**batch).loss
        ...         loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> edit.run.scores["edit/tokens/active_now"] > 0
        True
    """

    order = 20
    # Names for the tensors that score() returns after the loss: "active", then the statistics. The mean of each tensor
    # is logged under its name.
    columns: tuple[str, ...] = ("active", "accepted", "survivors", "label_mass")

    def __init__(
        self,
        objective: Objective = "cross_entropy",
        *,
        label_weight: float | None = None,
        epsilon: float | None = None,
        n_sigma: float | None = None,
        reduction: Reduction = "token",
    ) -> None:
        check_arguments(
            self,
            objective=(objective, one_of(get_args(Objective))),
            label_weight=(label_weight, optional(within("[0, 1]"))),
            epsilon=(epsilon, optional(at_least(0))),
            n_sigma=(n_sigma, optional(_WIDTH)),
            reduction=(reduction, one_of(get_args(Reduction))),
        )
        values = {"label_weight": label_weight, "epsilon": epsilon, "n_sigma": n_sigma}
        for name, value in values.items():
            if value is not None and name not in DEFAULTS[objective]:
                message = f'objective="{objective}" does not use {name}={value}; remove this argument.'
                raise EditError(message, component=type(self).__name__)
        chosen = {**DEFAULTS[objective], **{name: value for name, value in values.items() if value is not None}}
        self.objective: Objective = objective
        self.label_weight: float | None = chosen.get("label_weight")
        self.n_sigma: float | None = chosen.get("n_sigma")
        self.epsilon: float = chosen["epsilon"]
        self.reduction: Reduction = reduction

    def provides(self) -> set[str]:
        clip = {"token_clip", "edit/tokens/active_now"} if self.epsilon > 0.0 else set()
        return {"token_loss", "edit/tokens/loss_now"} | clip

    def conflicts(self) -> Sequence[Requirement]:
        message = "another callback of this run already replaces the training loss; keep only one of the two callbacks."
        found = [Requirement(("token_loss",), message)]
        if self.objective == "prompt_last":
            message = (
                'objective="prompt_last" cannot be combined with BatchAnchor: this objective predicts all tokens from '
                "the last position of the prompt, but BatchAnchor compares predictions at the own position of each "
                "token; use another objective, or remove BatchAnchor."
            )
            found.append(Requirement(("batch_anchor",), message))
        return found

    def prepare(self, run: EditRun) -> None:
        if run.language_model is None:
            run.head()
        reason = run.host.loss_unsupported_reason()
        if reason:
            raise EditError(f"the loss of this {run.host.name} run cannot be replaced: {reason}.")

    def attach(self, run: EditRun) -> None:
        self._vocab_size = _true_vocabulary(run)
        self._totals: dict[str, Tensor] = {}
        self._tokens, self._counted_at = 0, (-1, 0)
        # The number of tokens of the current step, and whether a warning about a step without tokens was issued.
        self._tokens_now, self._warned = 0, False
        # Totals of the current step: active tokens, sum of the losses of all tokens, number of tokens.
        self._now = torch.zeros(3, dtype=torch.float64)
        position = "first" if self.objective == "prompt_last" else "own"
        run.loss_head().use(self.score, reduction=self.reduction, position=position, observe=self._observe)

    def score(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Compute the loss of each token. A subclass may override this method.

        Args:
            logits: [N, vocabulary], fp32.
            labels: [N] token ids.

        Returns:
            Two tensors [N]: the loss of each token, and whether the token has a gradient. For ``"overtone"``, three
            more tensors [N] follow: whether the mixture was used, how many tokens of the vocabulary passed the filter
            that removes unlikely tokens, and the probability of the label in the target distribution.
        """
        options: dict[str, Any] = {"epsilon": self.epsilon}
        if self.objective == "cross_entropy":
            return cross_entropy(logits, labels, **options)
        if self.objective == "dft":
            return dynamic_cross_entropy(logits, labels, **options)
        if self.objective == "prompt_last":
            return uniform(logits, labels, label_weight=1.0, **options)
        options |= {"label_weight": self.label_weight, "vocab_size": self._vocab_size}
        if self.objective == "uniform":
            return uniform(logits, labels, **options)
        options["n_sigma"] = self.n_sigma
        return overtone_statistics(logits, labels, **options)

    def skip_step(self, run: EditRun) -> bool:
        if run.steps.is_shared:
            raise EditError(
                "all parameters in scope must belong to one optimizer, got several optimizers in one step. If all "
                "tokens are learned, this callback skips the step, and several optimizers cannot skip the same step; "
                "use a single optimizer."
            )
        if self._counted_at != (run.step, run.steps.skipped):
            raise EditError(
                "the model was not called with labels= since the last optimizer step, so its loss was not replaced; "
                "call model(..., labels=labels) in the training step, and use the loss that the model returns."
            )
        # No warning is issued if ActiveSet may have removed all examples, or if other processes may have tokens.
        if not (self._tokens_now or self._warned or run.loss_head().filter or is_distributed()):
            self._warned = True
            warn(
                f"the batch of step {run.step + 1} contains no token with a label, because all labels are -100, so its "
                "loss is 0; check the data collator and the maximum length of the examples."
            )
        # Reading the loss waits for the device, so the loss is read only if a callback needs it.
        publishes_loss = run.is_required("edit/tokens/loss_now")
        if self.epsilon == 0.0 and not publishes_loss:
            return False
        now = self._now
        if is_distributed():
            # All processes must take the same decision.
            now = now.clone()
            dist.all_reduce(now)
        active, loss, tokens = now.tolist()
        run.publish({"edit/tokens/active_now": active})
        if publishes_loss:
            run.publish({"edit/tokens/loss_now": loss / max(1.0, tokens)})
        return self.epsilon > 0.0 and active == 0.0

    def metrics(self, run: EditRun) -> dict[str, float]:
        """Return statistics of the tokens since the last call.

        Returns:
            ``edit/tokens/active``, which is the fraction of tokens with a gradient. ``"overtone"`` adds three means
            over the tokens. ``edit/tokens/accepted`` is the fraction of tokens for which the mixture was used.
            ``edit/tokens/survivors`` is the number of tokens of the vocabulary that passed the filter, which removes
            unlikely tokens. ``edit/tokens/label_mass`` is the probability of the label in the target distribution.
        """
        if not self._tokens:
            return {}
        means = {f"edit/tokens/{name}": float(total) / self._tokens for name, total in self._totals.items()}
        self._totals, self._tokens = {}, 0
        return means

    def _observe(self, active: Tensor, loss: Tensor, *statistics: Tensor) -> None:
        run = self.run
        # A step that a gradient scaler skips does not increase run.step, so the skipped steps are counted too.
        at = (run.step, run.steps.skipped)
        if self._counted_at != at:
            self._now, self._counted_at = torch.zeros(3, dtype=torch.float64, device=active.device), at
            self._tokens_now = 0
        self._now[0] += active.sum()
        self._now[1] += loss.sum()
        self._now[2] += len(active)
        self._tokens += len(active)
        self._tokens_now += len(active)
        for name, values in zip(self.columns, (active, *statistics), strict=False):
            self._totals[name] = self._totals.get(name, 0.0) + values.sum(dtype=torch.float32)

    def __repr__(self) -> str:
        values = {name: getattr(self, name) for name in DEFAULTS[self.objective]}
        values |= {} if self.reduction == "token" else {"reduction": f'"{self.reduction}"'}
        listed = "".join(f", {name}={value}" for name, value in values.items())
        return f'{type(self).__name__}("{self.objective}"{listed})'


def _true_vocabulary(run: EditRun) -> int | None:
    """Return the tokenizer's number of tokens if the output head has more rows than tokens, and None otherwise.

    The logits of the additional rows are noise. The noise would increase the standard deviation of the logits, and the
    filter of ``"overtone"`` would then keep more tokens.
    """
    try:
        size = len(run.tokenizer())
    except EditError:
        return None
    return size if size < run.head().config.vocab_size else None
