"""ContextTeacher: train the model on the predictions that the unedited model makes when it reads the new fact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kedit_train.arguments import check_arguments, integer_from, optional, within
from kedit_train.callbacks.token_loss import TokenLoss
from kedit_train.core.locality.consecutive_runs import given_edits, readable_again
from kedit_train.core.run import EditRun
from kedit_train.core.tokens.context_targets import ContextTargets
from kedit_train.core.tokens.interfaces import Reduction
from kedit_train.core.training_format import training_format
from kedit_train.data import Edit, EditDataset
from kedit_train.data.chat_format import PROMPT_FORMAT, PromptFormat, check_format, read_format
from kedit_train.data.fact_in_context import CONTEXT, CONTEXT_TEMPLATE
from kedit_train.errors import EditError
from kedit_train.functional.distillation import distillation


class ContextTeacher(TokenLoss):
    """Train the model on the predictions that the unedited model makes when it reads the new fact.

    This method is called context distillation. The teacher is the unedited model. Before the first step, the teacher
    reads one text for each edit: a sentence that states the new fact, followed by the prompt and the target of the
    edit. For each token of the target, the teacher's next-token distribution is stored: the probabilities of the
    ``top_k`` most probable tokens, and the total probability of all other tokens. The model in training learns these
    distributions, but does not read the fact. The loss is the KL divergence of the trained model from the teacher. A
    step costs about as much as a step with cross-entropy, because the distributions are computed only once.

    If the label of a token is not the teacher's most probable token, the token is trained towards its label, as with
    cross-entropy. The tokens of training examples that are not edits, such as replayed facts, are also trained towards
    their labels.

    Not every model follows a fact in its context. The metric ``edit/tokens/followed`` is the fraction of the edits for
    which the unedited model gives the target when it reads the fact. If this fraction is less than ``min_followed``, an
    error is raised before the first step.

    The training step must call ``model(..., labels=labels)`` and use the loss that the model returns, as for
    :class:`TokenLoss`. An example of a batch counts as an edit if its token ids begin with the prompt and the target of
    the edit.

    Args:
        edits: the edits that are trained: a path or a sequence of edits. None takes the edits of ``EditMetrics`` or of
            the training loop.
        context: a template for the text that the teacher reads instead of the prompt. ``{fact}`` is a sentence with the
            prompt and the target of the edit, and ``{prompt}`` is the prompt. In a chat, the filled template is the
            user's message.
        top_k: number of probabilities to store for each token.
        min_followed: smallest accepted value of ``edit/tokens/followed``, in [0, 1]. With 0, every model is accepted.
            If you train edits one at a time, use 0, because the fraction of a single edit is either 0 or 1.
        prompt_format: the prompt format of the training examples: "plain", "chat", "question" or a ``ChatFormat``. None
            detects the format from the data of the trainer. In a plain loop, None means "plain".
        epsilon: threshold (clip) in nats. A token with a loss of at most ``epsilon`` has no gradient.
        reduction: ``"token"`` gives all supervised tokens the same weight. ``"sample"`` gives all sequences the same
            weight.

    Raises:
        EditError: an argument is out of range, the edits are unknown, or the unedited model follows too few of the
            facts.

    References:
        - "In-Context Editing: Learning Knowledge from Self-Induced Distributions", arXiv 2406.11194.
        - "Learning by Distilling Context", arXiv 2209.15189.

    Example:
        >>> import torch
        >>> from kedit_train import EditCollator, EditDataset, editing, world
        >>> from kedit_train.callbacks import ContextTeacher, ParameterScope
        >>> model, tokenizer = world.load()
        >>> edits = EditDataset.load("world", limit=2)
        >>> batch = EditCollator(tokenizer)(edits.encode(tokenizer))
        >>> teacher = ContextTeacher(edits, min_followed=0.0)  # The small bundled model follows no fact.
        >>> callbacks = [ParameterScope(layers=0.7), teacher]
        >>> with editing(model, callbacks, tokenizer=tokenizer, log_every_n_steps=1) as edit:
        ...     optimizer = torch.optim.Adam(edit.parameters(), lr=1e-3)
        ...     edit.before_step()
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        >>> 0 <= edit.history[0]["edit/tokens/followed"] <= 1
        True
    """

    columns: tuple[str, ...] = ("active", "taught")

    def __init__(
        self,
        edits: EditDataset | Sequence[Edit] | str | Path | None = None,
        *,
        context: str = CONTEXT,
        top_k: int = 64,
        min_followed: float = 0.25,
        prompt_format: PromptFormat | None = None,
        epsilon: float = 0.0,
        reduction: Reduction = "token",
    ) -> None:
        super().__init__("cross_entropy", epsilon=epsilon, reduction=reduction)
        prompt_format = read_format(prompt_format)
        check_arguments(
            self,
            context=(context, CONTEXT_TEMPLATE),
            top_k=(top_k, integer_from(1)),
            min_followed=(min_followed, within("[0, 1]")),
            prompt_format=(prompt_format, optional(PROMPT_FORMAT)),
        )
        self.edits: Any = readable_again(edits)
        self.context = context
        self.top_k = top_k
        self.min_followed = min_followed
        self.prompt_format: PromptFormat | None = prompt_format
        self._followed = 0.0

    def prepare(self, run: EditRun) -> None:
        super().prepare(run)
        if self.edits is not None:
            EditDataset.of(self.edits)

    def attach(self, run: EditRun) -> None:
        super().attach(run)
        edits = given_edits(run, self.edits)
        tokenizer = run.tokenizer()
        prompt_format = self.prompt_format or training_format(run, tokenizer, edits) or "plain"
        check_format(prompt_format, tokenizer)
        targets = ContextTargets(
            run, tokenizer, edits, context=self.context, top_k=self.top_k, prompt_format=prompt_format
        )
        count, total = sum(targets.follows), len(targets.follows)
        self._followed = count / total
        if self._followed < self.min_followed:
            raise EditError(
                "with the new fact in its context, the unedited model gives the new answer for only "
                f"{self._followed:.3f} of the edits ({count} of {total}), but min_followed={self.min_followed:g}; use "
                "a larger model or another context=, or train with TokenLoss instead."
            )
        run.loss_head().soft_targets = targets.find

    def score(self, logits: Tensor, labels: Tensor, *soft_targets: Tensor) -> tuple[Tensor, ...]:
        """Compute the loss of each token.

        Args:
            logits: [N, vocabulary], fp32.
            labels: [N] token ids.
            soft_targets: the teacher's log probabilities [N, k + 1] and token ids [N, k], and a bool tensor [N] that is
                True for tokens that are trained towards the teacher's distribution.

        Returns:
            Three tensors [N]: the loss of each token, whether the token has a gradient, and whether the token is
            trained towards the teacher's distribution.
        """
        log_probs, tokens, taught = soft_targets
        loss, active = distillation(logits, labels, log_probs, tokens, taught, epsilon=self.epsilon)
        return loss, active, taught

    def metrics(self, run: EditRun) -> dict[str, float]:
        """Return the metrics of the loss since the last call.

        Returns:
            A dict with three fractions. ``edit/tokens/active``: tokens with a gradient. ``edit/tokens/taught``: tokens
            that are trained towards the teacher's distribution. ``edit/tokens/followed``: edits for which the unedited
            model gives the target when it reads the fact.
        """
        means = super().metrics(run)
        return means | {"edit/tokens/followed": self._followed} if means else {}

    def __repr__(self) -> str:
        return (
            f"ContextTeacher(context={self.context!r}, top_k={self.top_k}, min_followed={self.min_followed}, "
            f"epsilon={self.epsilon}, reduction={self.reduction!r})"
        )
