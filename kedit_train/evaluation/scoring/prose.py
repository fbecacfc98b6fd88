"""``measure_prose``: measure a model's perplexity on texts, and compare its predictions with the unedited model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.data.tokenization import Encoded
from kedit_train.evaluation.scoring.bootstrap import Score, ratio_scores
from kedit_train.evaluation.scoring.divergence import KEPT_TOKENS, Distribution
from kedit_train.evaluation.scoring.perplexity import perplexity, text_losses
from kedit_train.functional.top_k_divergence import bucket_divergence, top_log_probs

# The distributions of at most this many tokens are stored. They take 12 KiB per token.
MAX_TOKENS = 20_000


@dataclass(frozen=True)
class TextResult:
    """The measurements on one text. Every sum is over the predicted tokens.

    Args:
        loss: sum of the negative log-probabilities, in nats.
        tokens: number of tokens in ``loss``.
        kl: sum of KL(unedited || model), in nats.
        agreed: number of positions at which both models rank the same token first.
        compared: number of tokens in ``kl`` and ``agreed``. 0 if the unedited model's distributions are unknown.
    """

    loss: float
    tokens: int
    kl: float = 0.0
    agreed: int = 0
    compared: int = 0


@dataclass
class _Reader:
    """Compares the model's next-token distributions with ``reference``, or records them if ``reference`` is None.

    :func:`text_losses` calls the reader for each window. A window is a part of a text that fits into the model's
    context.
    """

    texts: Sequence[str]
    reference: Mapping[str, Distribution] | None
    recorded: dict[str, Distribution] = field(default_factory=dict)
    recorded_tokens: int = 0
    kl: dict[int, float] = field(default_factory=dict)
    agreed: dict[int, int] = field(default_factory=dict)
    compared: dict[int, int] = field(default_factory=dict)

    def __call__(self, number: int, window: int, sequence: Encoded, logits: Tensor) -> None:
        # A report stores these distributions together with those of its prompts. No prompt equals this key.
        key = f"prose, window {window} of: {self.texts[number]}"
        if self.reference is None:
            self._record(key, sequence, logits)
        elif (kept := self.reference.get(key)) is not None and kept.sequence.input_ids == sequence.input_ids:
            tokens = kept.tokens.long().to(logits.device)
            divergence = bucket_divergence(kept.log_probs.to(logits.device), tokens, logits).clamp(min=0.0)
            self.kl[number] = self.kl.get(number, 0.0) + float(divergence.double().sum())
            agreed = int((logits.argmax(dim=-1) == tokens[:, 0]).sum())
            self.agreed[number] = self.agreed.get(number, 0) + agreed
            self.compared[number] = self.compared.get(number, 0) + len(logits)

    def _record(self, key: str, sequence: Encoded, logits: Tensor) -> None:
        if self.recorded_tokens + len(logits) > MAX_TOKENS:
            return
        log_probs, tokens = top_log_probs(logits, min(KEPT_TOKENS, logits.shape[-1]))
        self.recorded[key] = Distribution(sequence, log_probs.cpu(), tokens.cpu().int())
        self.recorded_tokens += len(logits)


def measure_prose(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    reference: Mapping[str, Distribution] | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> tuple[list[TextResult], dict[str, Distribution]]:
    """Measure a model's loss on texts, and compare its next-token distributions with the unedited model's.

    Call the function on the unedited model first, without ``reference``. It then records the next-token distributions
    of this model. On the edited model, pass the recorded distributions as ``reference``.

    Args:
        model: a causal language model. It is left unchanged.
        tokenizer: the model's tokenizer.
        texts: the texts.
        reference: the distributions that the call on the unedited model returned. They cover at most 20,000 tokens. The
            KL divergence and the agreement leave out all other tokens. None: nothing is compared, and the distributions
            of ``model`` are recorded.
        batch_size: windows per forward pass.
        progress: show a progress bar in a terminal.

    Returns:
        One result per text, and the recorded distributions (an empty dict if ``reference`` is given).
    """
    reader = _Reader(texts, reference)
    losses = text_losses(model, tokenizer, texts, batch_size=batch_size, progress=progress, visit=reader)
    results = [
        TextResult(loss, tokens, reader.kl.get(i, 0.0), reader.agreed.get(i, 0), reader.compared.get(i, 0))
        for i, (loss, tokens) in enumerate(losses)
    ]
    return results, reader.recorded


def prose_scores(results: Sequence[TextResult], seed: int = 0) -> dict[str, Score]:
    """Return the scores "perplexity", "kl" (nats per token) and "agreement", with bootstrap intervals over texts.

    Args:
        results: the results of :func:`measure_prose`.
        seed: seed of the bootstrap.
    """
    totals = torch.tensor([[r.kl, float(r.agreed)] for r in results], dtype=torch.float64)
    counts = torch.tensor([[r.compared] * 2 for r in results])
    kl, agreement = ratio_scores(totals, counts, seed=seed)
    return {"perplexity": perplexity([(r.loss, r.tokens) for r in results], seed), "kl": kl, "agreement": agreement}
