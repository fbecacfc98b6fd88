"""KLLocality: a KL penalty that keeps predictions on given texts close to the predictions before the edit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train import world
from kedit_train.arguments import BOOLEAN, at_least, check_arguments, integer_from, one_of
from kedit_train.callbacks.base import EditCallback
from kedit_train.core.locality.consecutive_runs import continues_run, require_edits
from kedit_train.core.locality.divergence_penalty import CAPABILITY, DivergencePenalty
from kedit_train.core.locality.hidden_state_file import ReferenceStates
from kedit_train.core.locality.reference_batches import ReferenceBatches
from kedit_train.core.locality.reference_cache import ReferenceCache
from kedit_train.core.locality.reference_states import hidden_states, reference_hidden_states, teacher_top_k
from kedit_train.core.locality.teacher import Teacher
from kedit_train.core.locality.texts import Texts, TextSource
from kedit_train.core.locality.token_sequences import tokenize_edits
from kedit_train.core.output_head import evaluation_mode
from kedit_train.core.penalty_balance import PenaltyBalance
from kedit_train.core.run import EditRun
from kedit_train.core.training_format import warn_without_chats
from kedit_train.errors import EditError
from kedit_train.functional.chunked_loss import chunk_length, chunked
from kedit_train.functional.divergence import Direction, token_divergence
from kedit_train.functional.top_k_divergence import bucket_divergence


class KLLocality(EditCallback):
    """Penalize the divergence from the model before the edit, on texts unrelated to the edits.

    The divergence measures how much the edit has changed the next-token predictions (see ``direction``). The penalty is
    ``weight`` times the mean divergence over all tokens of the texts. It is added to the training loss. With
    ``direction="forward"``, the penalty is the locality term of MEND. With ``direction="reverse"``, it is the locality
    term of ROME. No second model is kept in memory. Before training, the input of the output head (the last hidden
    states) is computed and stored for each text. In every step, the output head computes the logits of the model before
    the edit from the stored hidden states.

    Each optimizer step draws ``batch_size`` texts, the same texts on every process. Texts that contain an evaluation
    prompt of the edits are left out, with a warning. In a run with :class:`PrefixCache`, the texts have other padding,
    so the rounding errors of the penalty differ.

    For sequential edits, set ``sequential=True`` and use the same instance and the same model object in all runs. Every
    run then penalizes the divergence from the model before the first run. Up to half of each batch consists of previous
    edits, so the model does not forget these edits. Without ``sequential=True``, each run penalizes the divergence from
    the model after the previous run. Unwanted changes from previous runs are then preserved.

    The penalty measures changes only on the texts. To limit changes on other inputs, add a :class:`NormBall` around the
    original weights, as ``recipes/one_by_one.py`` does.

    Args:
        texts: a source of texts (a list of strings or conversations, a path, a dataset, or "world" for the bundled
            texts) or a :class:`Texts`. If you train on chats, some texts should be conversations. ``Texts`` also has
            the arguments ``max_length``, ``tokenizer``, ``seed`` and ``nearest``. ``seed`` is the seed with which each
            step draws texts. ``nearest`` selects the texts most similar to each edit. Use ``nearest`` only in a run
            with few edits.
        weight: factor of the mean divergence in the training loss. The default is large, because the divergence is a
            mean over all tokens, and an edit changes the predictions of only a few tokens.
        direction: the divergence between the model before the edit and the model now. "forward" is KL(before || now),
            "reverse" is KL(now || before), "jsd" is the Jensen-Shannon divergence.
        batch_size: number of texts per optimizer step. More texts preserve more behavior. Each text costs about as much
            as one training example.
        teacher: a second model (a name, a path, a module or a :class:`Teacher`). The reference model is then the
            teacher instead of the model before the edit.
        cache: where to keep the hidden states of the reference model: a directory or a :class:`ReferenceCache`. None
            keeps all hidden states in memory for this run.
        sequential: whether consecutive runs of this instance on one model all use the model before the first run as
            the reference model.

    Raises:
        EditError: an argument is out of bounds, or two arguments exclude each other.

    References:
        Fast Model Editing at Scale (MEND), arXiv 2110.11309.
        Locating and Editing Factual Associations in GPT (ROME), arXiv 2202.05262.

    Example:
        >>> from kedit_train import editing, world
        >>> from kedit_train.callbacks import KLLocality, ParameterScope
        >>> model, tokenizer = world.load()
        >>> locality = KLLocality(["The sky is blue.", "Grass is green."], weight=20.0, batch_size=2)
        >>> scope = ParameterScope(layers=0.7, modules="mlp.down_proj")
        >>> with editing(model, [scope, locality], tokenizer=tokenizer) as edit:
        ...     edit.before_step()
        ...     penalty = locality.penalty(edit.run).item()
        >>> round(penalty, 6)
        0.0
    """

    order = 30
    penalizes = True

    def __init__(
        self,
        texts: TextSource | Texts,
        *,
        weight: float = 20.0,
        direction: Direction = "forward",
        batch_size: int = 8,
        teacher: str | Path | Teacher | nn.Module | Mapping[str, Any] | None = None,
        cache: str | Path | ReferenceCache | Mapping[str, Any] | None = None,
        sequential: bool = False,
    ) -> None:
        check_arguments(
            self,
            weight=(weight, at_least(0)),
            direction=(direction, one_of(("forward", "reverse", "jsd"))),
            batch_size=(batch_size, integer_from(1)),
            sequential=(sequential, BOOLEAN),
        )
        self.texts: Texts = Texts.of(texts)
        self.weight = weight
        self.batch_size = batch_size
        self.sequential = sequential
        self.direction: Direction = direction
        self.teacher: Teacher | None = None if teacher is None else Teacher.of(teacher)
        self.cache: ReferenceCache = ReferenceCache.of(cache)
        self._batches: ReferenceBatches | None = None
        self._balance: PenaltyBalance | None = None
        if not sequential:
            return
        if self.teacher is not None:
            reason = "teacher=, because the reference of all runs is the model before the first run; remove teacher="
        elif self.texts.nearest is not None:
            reason = "Texts(nearest=), which selects texts for the edits of one run only; remove nearest="
        elif batch_size < 2:
            reason = (
                f"batch_size={batch_size}, because up to half of each batch is drawn from the edits of earlier runs; "
                "use batch_size=2 or more"
            )
        else:
            return
        raise EditError(f"sequential=True cannot be combined with {reason}.", component="KLLocality")

    def provides(self) -> set[str]:
        return {"edit/locality/kl", CAPABILITY}

    def prepare(self, run: EditRun) -> None:
        run.causal_model()
        self.texts.check()

    def attach(self, run: EditRun) -> None:
        self._head = run.head()
        if self.sequential:
            require_edits(run, "sequential=True preserves the edits of this run during later runs")
        if self.texts.nearest is not None:
            require_edits(run, f"nearest={self.texts.nearest} selects the texts that are most similar to the edits")
        batches = self._batches if self.sequential else None
        if batches is not None and not continues_run(batches.model, run):
            batches = None
        sequences = self._texts_of(run, first=batches is None).tokenize(run)
        warn_without_chats(run, run.tokenizer(self.texts.tokenizer), sequences)
        self._reference_projection = run.reference_head()
        if self.sequential and self._reference_projection is not None:
            raise EditError(
                "with sequential=True, the output head must not be trained, because later runs need the head of the "
                "first run to compute the reference logits; leave the head (and embeddings that are tied to the head) "
                "out of the scope."
            )
        if batches is None:
            self._batches = ReferenceBatches(
                sequences,
                self._reference_states(run, sequences),
                seed=self.texts.seed,
                run=run,
                head=self._head.module if self.sequential else None,
            )
        else:
            tokenizer = run.tokenizer(self.texts.tokenizer)
            batches.start_next_run(
                run,
                sequences,
                self._head.module,
                tokenize=lambda edits: tokenize_edits(run, edits, tokenizer, self.texts.max_length),
                hidden_states=lambda sequence: hidden_states(self._head, [sequence]),
            )
        self._sum, self._count = torch.zeros(()), 0
        # A ForgettingBudget may change the weight during training.
        self._penalty = DivergencePenalty("texts", self.weight)
        run.penalties.append(self._penalty)
        # The penalty is compared with the loss only in a first run. In a resumed run and in later runs, the loss may be
        # small because the edits are already learned.
        begins = batches is None and run.host.is_main and not run.host.resumed
        self._balance = PenaltyBalance(self._head.model, run.host.summed_micro_batches) if begins else None

    def penalty(self, run: EditRun) -> Tensor | None:
        assert self._batches is not None
        chosen, previous = self._batches.draw(self.batch_size)
        texts = self._batches.texts
        sequences = [*(texts.sequences[i] for i in chosen), *(entry.sequence for entry in previous)]
        with evaluation_mode(run.model), run.host.forward_context():
            hidden = hidden_states(self._head, sequences)
        reference = texts.states.take(chosen)
        if previous:
            reference = [torch.cat([reference[0], *(entry.hidden_states for entry in previous)])]
        reference = [tensor.to(hidden.device, non_blocking=True) for tensor in reference]
        chunk = chunk_length(self._head.config.vocab_size)
        (divergence,) = chunked(self.score, hidden, *reference, chunk=chunk, parameters=self._head.trained)
        mean = divergence.mean()
        self._sum, self._count = self._sum.to(mean.device) + mean.detach(), self._count + 1
        self._penalty.observe(divergence)
        penalty = self._penalty.weight * mean
        if self._balance is not None:
            self._balance.add(penalty)
        return penalty

    def after_step(self, run: EditRun) -> None:
        if self._balance is None:
            return
        if self._penalty.adapted:
            # The weight is chosen during training, so there is nothing to advise.
            self._balance.remove()
            self._balance = None
        else:
            self._balance.after_step(f"set weight= to a smaller number (now {self.weight})")

    def score(self, hidden: Tensor, *reference: Tensor) -> tuple[Tensor, ...]:
        """Return the divergence [N] of each token.

        Args:
            hidden: hidden states [N, hidden] of the model that is trained.
            reference: hidden states [N, hidden] of the reference model. If there is a teacher, pass two tensors
                instead: log probabilities [N, k + 1] and token ids [N, k]. The first k log probabilities belong to the
                k most probable tokens of the teacher. The last log probability belongs to all other tokens together.
        """
        logits = self._head.project(hidden)
        if self.teacher is not None:
            log_probs, tokens = reference
            shared = logits[:, : self._vocabulary]
            return (bucket_divergence(log_probs, tokens.long(), shared, direction=self.direction),)
        with torch.no_grad():
            before = self._head.project(reference[0].to(hidden.dtype), self._reference_projection)
        return (token_divergence(before, logits, direction=self.direction),)

    def metrics(self, run: EditRun) -> dict[str, float]:
        """Return the metrics of the penalty.

        The metrics are the unweighted mean divergence per token in nats, the size of the stored hidden states in bytes
        and, with ``cache``, whether the hidden states were read from a file.
        """
        if not self._count:
            return {}
        mean = float(self._sum) / self._count
        self._sum, self._count = torch.zeros(()), 0
        assert self._batches is not None
        metrics = {"edit/locality/kl": mean, "edit/locality/store_bytes": float(self._batches.texts.states.nbytes)}
        if self.cache.directory is not None:
            metrics["edit/locality/store_hits"] = float(self._was_read)
        return metrics

    def state(self) -> dict[str, Any]:
        return {} if self._batches is None else self._batches.state()

    def load_state(self, state: dict[str, Any]) -> None:
        if self._batches is not None:
            self._batches.load_state(state, self.batch_size)

    def finish(self, run: EditRun) -> None:
        if self.sequential and self._batches is not None:
            self._batches.finish_run(run.edits)

    def detach(self, run: EditRun) -> None:
        if self._balance is not None:
            self._balance.remove()
        if not self.sequential:
            self._batches = None

    def _texts_of(self, run: EditRun, *, first: bool) -> Texts:
        """Return the texts of a run.

        With ``sequential=True`` and the bundled texts, a text is left out if an edit of this run or of an earlier run
        affects its fact.
        """
        if not (self.texts.of_world and self.sequential):
            return self.texts
        if first:
            self._world_texts = self.texts.load(run.edits, keep_leaks=True)
        else:
            self._world_texts = world.unaffected(self._world_texts, run.edits)
        return replace(self.texts, source=self._world_texts)

    def _reference_states(self, run: EditRun, sequences: list[list[int]]) -> ReferenceStates:
        if self.teacher is None:
            states, self._was_read = reference_hidden_states(run, sequences, self.batch_size, self.cache)
            return states
        tokenizer = run.tokenizer(self.texts.tokenizer)
        states, self._was_read, self._vocabulary = teacher_top_k(
            run, sequences, self.batch_size, self.teacher, tokenizer, self.cache
        )
        return states

    def __repr__(self) -> str:
        sequential = ", sequential=True" if self.sequential else ""
        nearest = "" if self.texts.nearest is None else f", nearest={self.texts.nearest}"
        return f"KLLocality(weight={self.weight}, direction={self.direction!r}{nearest}{sequential})"
