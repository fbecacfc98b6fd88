"""What must stay? The model's answers on given texts, held to those before the edit by a KL penalty."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from kedit_train.callbacks.base import EditCallback
from kedit_train.core.output_head import evaluation_mode
from kedit_train.core.run import EditRun
from kedit_train.core.texts import load_texts, pad, text_rows
from kedit_train.errors import EditError
from kedit_train.functional.chunking import chunk_length, chunked
from kedit_train.functional.divergence import Direction, token_divergence


class KLLocality(EditCallback):
    """Add ``weight`` times the mean divergence from the unedited model, over tokens of texts unrelated to the edits.

    The term of MEND (arXiv 2110.11309) with ``direction="forward"``, KL(before || now), and of ROME's value
    optimisation (arXiv 2202.05262) with "reverse". It is taken at every position of the texts, prompt and answer alike.
    The reference costs no second model: the hidden states that the unedited model hands to its output head are taken
    once, ``d`` numbers a token, and projected through the head when they are needed.

    Args:
        texts: a list of texts, a path to ``.txt`` (one a line), ``.jsonl`` or ``.json``, a dataset with a column
            ``text``, or "world". Texts that hold a prompt the edits are scored on are left out, with a warning.
        weight: factor of the penalty beside the host's loss.
        direction: "forward", "reverse" or "jsd".
        batch_size: texts for each optimizer step, drawn in shuffled rounds; the same on every process.
        max_length: tokens a text; longer ones are cut into several, none is cut off.
        tokenizer: an object, a name or a path; by default the host's, else the one saved with the model.
        seed: of the shuffling.
    """

    order = 30
    penalises = True

    def __init__(
        self,
        texts: Any,
        weight: float = 1.0,
        direction: Direction = "forward",
        batch_size: int = 8,
        max_length: int = 256,
        tokenizer: Any = None,
        seed: int = 0,
    ) -> None:
        for name, value, good in (
            ("weight", weight, weight >= 0.0),
            ("direction", direction, direction in ("forward", "reverse", "jsd")),
            ("batch_size", batch_size, batch_size > 0),
            ("max_length", max_length, max_length > 0),
        ):
            if not good:
                bounds = "weight >= 0, direction forward|reverse|jsd, batch_size and max_length > 0"
                raise EditError(f"KLLocality: {name}={value!r} is out of bounds ({bounds})")
        # Read more than once: by prepare, by attach, and by a second run of the same instance.
        self.texts = list(texts) if isinstance(texts, Iterator) else texts
        self.weight = weight
        self.direction: Direction = direction
        self.batch_size, self.max_length, self.tokenizer, self.seed = batch_size, max_length, tokenizer, seed

    def prepare(self, run: EditRun) -> None:
        if run.language_model is None:
            run.head("KLLocality")
        if self.texts != "world":
            load_texts(self.texts)

    def attach(self, run: EditRun) -> None:
        self._head = run.head("KLLocality")
        self._rows = text_rows(
            run, self.texts, needed_by="KLLocality", tokenizer=self.tokenizer, max_length=self.max_length
        )
        self._reference = self._take_reference(run)
        self._project_reference = run.reference_head()
        self._order, self._drawn = self._rounds(), 0
        self._sum, self._count = torch.zeros(()), 0

    def penalty(self, run: EditRun) -> Tensor:
        chosen = [next(self._order) for _ in range(self.batch_size)]
        self._drawn += self.batch_size
        with evaluation_mode(run.model), run.host.forward_context():
            hidden = self._hidden(run, chosen)
        reference = torch.cat([self._reference[i] for i in chosen]).to(hidden.device, non_blocking=True)

        def score(states: Tensor, before: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                target = self._head.project(before, self._project_reference)
            return (token_divergence(target, self._head.project(states), direction=self.direction),)

        chunk = chunk_length(2 * self._head.config.vocab_size)
        (divergence,) = chunked(score, hidden, reference, chunk=chunk, parameters=self._head.trained)
        mean = divergence.mean()
        self._sum, self._count = self._sum.to(mean.device) + mean.detach(), self._count + 1
        return self.weight * mean

    def metrics(self, run: EditRun) -> dict[str, float]:
        """Mean divergence a token, in nats, before weighting."""
        if not self._count:
            return {}
        mean = float(self._sum) / self._count
        self._sum, self._count = torch.zeros(()), 0
        return {"edit/locality/kl": mean}

    def state(self) -> dict[str, Any]:
        return {"drawn": getattr(self, "_drawn", 0)}

    def load_state(self, state: dict[str, Any]) -> None:
        self._drawn = state["drawn"]
        for _ in range(self._drawn):
            next(self._order)

    def detach(self, run: EditRun) -> None:
        self._reference, self._rows = [], []

    @torch.no_grad()
    def _take_reference(self, run: EditRun) -> list[Tensor]:
        """Hidden states [tokens, d] of the unedited model for each text."""
        by_length = sorted(range(len(self._rows)), key=lambda i: len(self._rows[i]))
        batches = [by_length[i : i + self.batch_size] for i in range(0, len(by_length), self.batch_size)]
        reference: list[Tensor] = [torch.empty(0)] * len(self._rows)
        quiet = not run.host.is_main or len(batches) < 64
        with run.unedited(), evaluation_mode(run.model), run.host.forward_context():
            for batch in tqdm(batches, desc="answers before the edit", leave=False, disable=quiet):
                hidden = self._hidden(run, batch).split([len(self._rows[i]) for i in batch])
                for i, states in zip(batch, hidden, strict=True):
                    reference[i] = states.clone()
        return reference

    def _hidden(self, run: EditRun, chosen: list[int]) -> Tensor:
        ids, mask = pad([self._rows[i] for i in chosen])
        device = next(run.model.parameters()).device
        ids, mask = ids.to(device), mask.to(device)
        return self._head.hidden(input_ids=ids, attention_mask=mask)[mask.bool()]

    def _rounds(self) -> Iterator[int]:
        shuffler = random.Random(self.seed)
        while True:
            order = list(range(len(self._rows)))
            shuffler.shuffle(order)
            yield from order

    def __repr__(self) -> str:
        return f"KLLocality(weight={self.weight}, direction={self.direction!r})"
