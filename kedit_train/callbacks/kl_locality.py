"""What must stay? The model's answers on given texts, held to those before the edit by a KL penalty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kedit_train import world
from kedit_train.callbacks.base import EditCallback
from kedit_train.core.cache.hidden_state_store import parse_bytes
from kedit_train.core.locality.batch_anchor import BatchAnchor
from kedit_train.core.locality.consecutive_runs import check_known, goes_on
from kedit_train.core.locality.hidden_state_file import Answers
from kedit_train.core.locality.reference_sequence import HeldSequence
from kedit_train.core.locality.reference_states import hidden_states, row_states, teachers_answers
from kedit_train.core.locality.texts import Texts, TextSource, edit_rows
from kedit_train.core.output_head import evaluation_mode
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError
from kedit_train.functional.chunked_loss import chunk_length, chunked
from kedit_train.functional.divergence import Direction, token_divergence
from kedit_train.functional.top_k_divergence import bucket_divergence

# Factors of the penalty where none is given.
ON_TEXTS, ON_BATCH = 20.0, 1.0


class KLLocality(EditCallback):
    """Add ``weight`` times the mean divergence from the unedited model, over tokens of texts unrelated to the edits.

    The term of MEND (arXiv 2110.11309) with ``direction="forward"``, KL(before || now), and of ROME's value
    optimisation (arXiv 2202.05262) with "reverse". It is taken at every position of the texts, prompt and answer alike.
    The reference costs no second model: the hidden states that the unedited model hands to its output head are taken
    once, ``d`` numbers a token, and projected through the head (as it was, where it is in scope) when needed. With
    ``store`` they are kept in a file and found there by a later run on the same model and texts, whatever its scope.

    With ``texts="batch"`` the model is anchored on the training batches themselves: every supervised token's loss gets
    ``weight`` times its own divergence ("Anchored Supervised Fine-Tuning", arXiv 2509.23753), averaged as the host
    averages its loss, whose logged value it is part of. What the unedited model answers is taken at first sight of a
    row, in one more forward pass with the scope's old values in place, and kept by content, so that later epochs cost
    none; packed rows count as one row each. The scope's old values are kept for it, in full fine-tuning without
    ``ParameterScope`` a copy of all weights. Under DDP every process keeps the rows it has met.

    Edits that come one after the other need ``sequential``: a penalty that refers in each run to the model of that run
    holds what the runs before have lost. With it the answers are those before the first run, and what was edited since
    is held as well, as the model answers it when the next run begins: half of every batch. The instance and the model
    have to live on between runs, so it is for ``editing``, ``run_edits`` and trainers called again in one process.
    Of many edits a ``NormBall`` around the first weights keeps what no text says (recipes/one_by_one.py).

    Beside ``PrefixCache`` the texts are served too; as every round puts other texts together, with other padding, the
    penalty is the same as without it within rounding, not bit for bit.

    Args:
        texts: a list of texts, a path to ``.txt`` (one a line), ``.jsonl`` or ``.json``, a dataset with a column
            ``text``, or "world". Texts that hold a prompt the edits are scored on are left out, with a warning. Or
            "batch": the training batches, which leave nothing to ``batch_size``, ``max_length``, ``tokenizer`` and
            ``seed``: they are refused then.
        weight: factor of the penalty beside the host's loss: by default 20 with texts (the mean runs over every token
            of them, of which an edit moves few; chosen on two small models, recipes/README.md) and 1 with "batch".
        direction: "forward", "reverse" or "jsd".
        batch_size: texts for each optimizer step, at most all of them, drawn in shuffled rounds; the same on every
            process. More of them hold better and cost as much as so many edits: 64 short ones in
            ``recipes/kedit_default.yaml``.
        max_length: tokens a text; longer ones are cut into several, none is cut off.
        tokenizer: an object, a name or a path; by default the host's, else the one saved with the model.
        seed: of the shuffling.
        store: a folder for the answers before the edit. Their file is found again by what the model computes and the
            texts' tokens; to know that, every weight is read and hashed (about a second for each GB). With "batch":
            where rows beyond ``memory_limit`` go, as long as the run lasts.
        store_dtype: "float32", "bfloat16" or "float16" for the answers; None loses nothing (the dtype in which the head
            multiplies; float32 for a teacher). A narrower one says by a warning what it costs.
        memory_limit: bytes, or "2GB", that answers may take in memory: larger ones are memory-mapped from ``store``,
            or refused without one. None knows no limit.
        teacher: another model with the same tokens (a name, a path or a module) in place of the unedited one. Of its
            answers the ``top_k`` most probable tokens and the mass of the rest are kept, and the divergence is that of
            these buckets, in any direction; at most the full one.
        top_k: tokens kept of a teacher's answer.
        sequential: later runs of this instance on the same model keep the answers of the first, on the texts that do
            not hold what they are scored on, and hold the edits of the runs before, each as prompt and target without
            any template; an edit of the same prompt supersedes the earlier one.
        nearest: hold no more than so many texts for each edit, those nearest to it
            (:func:`~kedit_train.data.nearest_texts.nearest_texts`). For a few edits and many texts: what they change
            elsewhere is their neighbours, which a random text is not; 24 of them, with weight=200 and 3e-4, is what
            recipes/README.md has measured of one edit at a time. It needs to know the edits, and is not for a
            sequence, whose texts are those of its first run.
    """

    order = 30

    def __init__(
        self,
        texts: TextSource | Texts,
        weight: float | None = None,
        direction: Direction = "forward",
        batch_size: int = 8,
        max_length: int = 256,
        tokenizer: Any = None,
        seed: int = 0,
        store: str | None = None,
        store_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        memory_limit: int | str | None = None,
        teacher: Any = None,
        top_k: int = 256,
        sequential: bool = False,
        nearest: int | None = None,
    ) -> None:
        for name, value, good in (
            ("weight", weight, weight is None or weight >= 0.0),
            ("direction", direction, direction in ("forward", "reverse", "jsd")),
            ("batch_size", batch_size, batch_size > 0),
            ("max_length", max_length, max_length > 0),
            ("store_dtype", store_dtype, store_dtype in (None, "float32", "bfloat16", "float16")),
            ("top_k", top_k, top_k > 0),
        ):
            if not good:
                bounds = "weight >= 0, direction forward|reverse|jsd, batch_size and max_length > 0"
                if name in ("store_dtype", "top_k"):
                    bounds = "store_dtype float32|bfloat16|float16 or None, top_k > 0"
                raise EditError(f"KLLocality: {name}={value!r} is out of bounds ({bounds})")
        if nearest is not None and (not isinstance(nearest, int) or nearest < 1):
            raise EditError(f"KLLocality: nearest={nearest!r} is no number of texts (1 or more, or None for all)")
        if store == "":
            raise EditError("KLLocality: store='' names no folder; give one, or None to keep the answers for this run")
        self.texts = Texts.of(texts, max_length=max_length, nearest=nearest, tokenizer=tokenizer, seed=seed)
        self.direction: Direction = direction
        self.batch_size, self.max_length, self.tokenizer, self.seed = batch_size, max_length, tokenizer, seed
        self.store = None if store is None else Path(store)
        self.dtype: torch.dtype | None = None if store_dtype is None else getattr(torch, store_dtype)
        self.memory_limit = None if memory_limit is None else parse_bytes(memory_limit, "KLLocality")
        self.teacher, self.top_k, self.sequential = teacher, top_k, sequential
        self.anchors = isinstance(texts, str) and texts == "batch"
        self.weight = weight if weight is not None else ON_BATCH if self.anchors else ON_TEXTS
        self.penalises = not self.anchors
        self._anchor: BatchAnchor | None = None
        self._held: HeldSequence | None = None
        if sequential and (self.anchors or teacher is not None):
            other = "texts='batch'" if self.anchors else "a teacher"
            raise EditError(
                f"KLLocality: sequential=True keeps the unedited model's answers on texts over several runs, and "
                f"{other} has none of them; leave one out"
            )
        if sequential and nearest is not None:
            raise EditError(
                "KLLocality: nearest chooses texts by the edits of one run, and sequential=True keeps the texts of the "
                "first; leave one out"
            )
        if sequential and batch_size < 2:
            raise EditError(
                "KLLocality: sequential=True holds texts and earlier edits in one batch; give batch_size=2 or more"
            )
        if self.anchors and teacher is not None:
            raise EditError(
                "KLLocality: texts='batch' anchors on the unedited model; give texts where teacher is given"
            )
        unused = {"batch_size": batch_size != 8, "max_length": max_length != 256, "seed": seed != 0}
        unused |= {"tokenizer": tokenizer is not None, "nearest": nearest is not None}
        if self.anchors and any(unused.values()):
            names = ", ".join(name for name, given in unused.items() if given)
            raise EditError(
                f"KLLocality: texts='batch' takes the training batches and does not read {names}; leave out"
            )

    def provides(self) -> set[str]:
        return {"edit/locality/kl", "batch_anchor"} if self.anchors else {"edit/locality/kl"}

    def prepare(self, run: EditRun) -> None:
        if run.language_model is None:
            run.head()
        if self.anchors:
            if any(other.anchors for other in run.callbacks if other is not self):
                raise EditError(
                    "KLLocality: two anchors on the training batch of one model; keep one, with both weights"
                )
            reason = run.host.objective_refused()
            if reason:
                raise EditError(f"KLLocality(texts='batch') cannot join the loss of this {run.host.name} run: {reason}")
        else:
            self.texts.check()

    def attach(self, run: EditRun) -> None:
        self._head = run.head()
        if self.anchors:
            self._anchor = run.loss_head().term = BatchAnchor(
                run,
                weight=self.weight,
                direction=self.direction,
                dtype=self.dtype,
                memory=self.memory_limit,
                folder=self.store,
            )
            return
        if self.sequential:
            check_known(run, "sequential=True holds this run's edits in the next")
        if self.texts.nearest is not None:
            check_known(run, f"nearest={self.texts.nearest} chooses texts by their edits")
        held = self._held if self.sequential else None
        if held is not None and not goes_on(held.model, run):
            held = None
        rows = self._texts(run, held is None).tokenize(run)
        self._project_reference = run.reference_head()
        if self.sequential and self._project_reference is not None:
            raise EditError(
                "KLLocality: sequential=True keeps hidden states over several runs, which the output head has to turn "
                "into the same answers every time; leave the head (and what it is tied to) out of the scope"
            )
        if held is None:
            self._held = HeldSequence(
                rows,
                self._take_answers(run, rows),
                seed=self.seed,
                run=run,
                head=self._head.module if self.sequential else None,
            )
        else:
            tokenizer = run.tokenizer(self.tokenizer)
            held.go_on(
                run,
                rows,
                self._head.module,
                rows_of=lambda edits: edit_rows(run, edits, tokenizer, self.max_length),
                answer=lambda row: row_states(self._head, [row]),
            )
        self._sum, self._count = torch.zeros(()), 0

    def penalty(self, run: EditRun) -> Tensor | None:
        if self.anchors:
            return None
        assert self._held is not None
        chosen, earlier, states = self._held.draw(self.batch_size)
        texts = self._held.texts
        with evaluation_mode(run.model), run.host.forward_context():
            hidden = row_states(self._head, [*(texts.rows[i] for i in chosen), *earlier])
        answers = texts.answers.take(chosen)
        if earlier:
            answers = [torch.cat([answers[0], *states])]
        answers = [a.to(hidden.device, non_blocking=True) for a in answers]
        chunk = chunk_length(self._head.config.vocab_size)
        (divergence,) = chunked(self.score, hidden, *answers, chunk=chunk, parameters=self._head.trained)
        mean = divergence.mean()
        self._sum, self._count = self._sum.to(mean.device) + mean.detach(), self._count + 1
        return self.weight * mean

    def score(self, states: Tensor, *answers: Tensor) -> tuple[Tensor, ...]:
        """Divergence [N] of what the head makes of hidden states [N, d] from the answers that are kept."""
        logits = self._head.project(states)
        if self.teacher is not None:
            log_probs, tokens = answers
            shared = logits[:, : self._shared]
            return (bucket_divergence(log_probs, tokens.long(), shared, direction=self.direction),)
        with torch.no_grad():
            before = self._head.project(answers[0].to(states.dtype), self._project_reference)
        return (token_divergence(before, logits, direction=self.direction),)

    def skip_step(self, run: EditRun) -> bool:
        if self._anchor is not None and self._anchor.seen_at != run.step:
            raise EditError(
                "KLLocality(texts='batch'): the model was not called with labels= since the last optimizer step, so "
                "there was no batch to anchor on; let the training step call model(..., labels=labels) and use the "
                "loss that it returns"
            )
        return False

    def metrics(self, run: EditRun) -> dict[str, float]:
        """Mean divergence a token, in nats, before weighting; bytes of the answers kept, and the share found there."""
        if self._anchor is not None:
            return self._anchor.metrics()
        if not self._count:
            return {}
        mean = float(self._sum) / self._count
        self._sum, self._count = torch.zeros(()), 0
        assert self._held is not None
        found = {"edit/locality/kl": mean, "edit/locality/store_bytes": float(self._held.texts.answers.nbytes)}
        return found if self.store is None else {**found, "edit/locality/store_hits": float(self._reused)}

    def state(self) -> dict[str, Any]:
        return {} if self._held is None else self._held.state()

    def load_state(self, state: dict[str, Any]) -> None:
        if self._held is not None:
            self._held.load_state(state, self.batch_size)

    def finish(self, run: EditRun) -> None:
        if self.sequential and self._held is not None:
            self._held.end(run.edits)

    def detach(self, run: EditRun) -> None:
        if self._anchor is not None:
            self._anchor.kept.close()
        self._anchor = None
        if not self.sequential:
            self._held = None

    def _texts(self, run: EditRun, first: bool) -> Texts:
        """What to hold. The world's texts are drawn for the first run's edits; later runs leave out those of theirs."""
        if self.texts.of_world and self.sequential:
            found = self.texts.load(run.edits, keep_leaks=True) if first else self._worlds
            self._worlds = found if first else world.unaffected(found, run.edits)
            return replace(self.texts, source=self._worlds)
        return self.texts

    def _take_answers(self, run: EditRun, rows: Sequence[Sequence[int]]) -> Answers:
        keep: dict[str, Any] = {"store": self.store, "dtype": self.dtype, "memory_limit": self.memory_limit}
        if self.teacher is None:
            answers, self._reused = hidden_states(run, rows, self.batch_size, **keep)
            return answers
        tokenizer = run.tokenizer(self.tokenizer)
        answers, self._reused, self._shared = teachers_answers(
            run, rows, self.batch_size, self.teacher, self.top_k, tokenizer, **keep
        )
        return answers

    def __repr__(self) -> str:
        sequential = ", sequential=True" if self.sequential else ""
        nearest = "" if self.texts.nearest is None else f", nearest={self.texts.nearest}"
        return f"KLLocality(weight={self.weight}, direction={self.direction!r}{nearest}{sequential})"
