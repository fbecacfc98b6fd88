"""What a model can still do beside its edits: a cheap probe, and the tasks of lm-eval where they are wanted.

Methods that change weights in sequence lose it after few edits, whatever their own scores say ("Navigating the Dual
Facets", arXiv 2402.11122), so it is measured on the same model, at the same moments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kedit_train.core.locality.texts import Texts
from kedit_train.errors import EditError
from kedit_train.evaluation.asking.generate import Answer, generate_answers
from kedit_train.evaluation.scoring.bootstrap import EditMean, Score, ratio_scores
from kedit_train.evaluation.scoring.divergence import Distribution, distributions, divergences
from kedit_train.evaluation.scoring.lm_eval_tasks import harness_scores
from kedit_train.evaluation.scoring.normalize import normalise
from kedit_train.evaluation.scoring.perplexity import perplexity, text_losses

# Of a text, what is given to be continued: half of its words, and at most so many.
PROMPT_WORDS = 16


@dataclass(frozen=True)
class Capability:
    """One model, probed.

    Args:
        perplexity: of the texts; ``n`` counts tokens.
        kl: KL(unedited || model), nats a token of the unedited model's own answers to the prompts.
        agreement: share of the prompts with the same greedy answer as the unedited model's.
        tasks: ``"<task>/<metric>"`` -> score of lm-eval.
        answers, distributions: by prompt, what the next model is compared with; in memory only.
    """

    perplexity: Score
    kl: Score
    agreement: Score
    tasks: Mapping[str, Score] = field(default_factory=dict)
    answers: Mapping[str, Answer] = field(default_factory=dict, compare=False, repr=False)
    distributions: Mapping[str, Distribution] = field(default_factory=dict, compare=False, repr=False)

    def scores(self) -> dict[str, Score]:
        """Every score by its name; what was not measured is left out."""
        own = {"perplexity": self.perplexity, "kl": self.kl, "agreement": self.agreement}
        return {name: score for name, score in (own | dict(self.tasks)).items() if score.n}


class CapabilityProbe:
    """Measures general ability: ``probe(model, tokenizer)`` before, ``probe(model, tokenizer, before=...)`` after.

    The built-in part costs one pass over the texts and one short answer a prompt.

    Args:
        texts: unrelated to the edits; a list, or what ``KLLocality`` reads (a path, a dataset, "world").
        prompts: unrelated questions; by default the texts' beginnings, to be continued.
        tasks: names of lm-eval's tasks, or paths of task files (``.yaml``); needs the ``eval`` extra.
        task_folder: where further task files are, to be named in ``tasks``.
        task_limit: documents of each task; None takes all.
        shots: examples before each question; None takes the task's own number.
        max_new_tokens: of the answers to ``prompts``; batch_size: rows at a time.
        seed: of the bootstrap, and of what lm-eval draws.
        progress: bars in a terminal.

    Raises:
        EditError: no text, no prompt; when called, what the parts raise.
    """

    def __init__(
        self,
        texts: Any,
        prompts: Sequence[str] | None = None,
        *,
        tasks: Sequence[str] = (),
        task_folder: str | None = None,
        task_limit: int | None = None,
        shots: int | None = None,
        max_new_tokens: int = 16,
        batch_size: int = 64,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        if isinstance(tasks, str) or isinstance(prompts, str):
            raise EditError("CapabilityProbe: tasks and prompts are lists: put the one into a list")
        self.texts = Texts.of(texts).load()
        self.prompts = list(dict.fromkeys(beginnings(self.texts) if prompts is None else prompts))
        if not self.prompts:
            raise EditError("CapabilityProbe: no text has two words to make a prompt of: give prompts")
        self.tasks, self.task_folder, self.task_limit, self.shots = list(tasks), task_folder, task_limit, shots
        self.max_new_tokens, self.batch_size, self.seed, self.progress = max_new_tokens, batch_size, seed, progress

    def __call__(self, model: nn.Module, tokenizer: Any, before: Capability | None = None) -> Capability:
        """Probe a model as it is; ``before`` is what the unedited one gave, of the same probe."""
        common: dict[str, Any] = {"batch_size": self.batch_size, "progress": self.progress}
        losses = text_losses(model, tokenizer, self.texts, **common)
        said = generate_answers(model, tokenizer, self.prompts, max_new_tokens=self.max_new_tokens, **common)
        answers = dict(zip(self.prompts, said, strict=True))
        tasks = harness_scores(
            model,
            tokenizer,
            self.tasks,
            folder=self.task_folder,
            limit=self.task_limit,
            shots=self.shots,
            batch_size=self.batch_size,
            seed=self.seed,
        )
        reading = perplexity(losses, self.seed)
        if before is None:
            kept = distributions(model, tokenizer, answers, **common)
            return Capability(reading, Score(None, 0), Score(None, 0), tasks, answers, kept)
        if before.answers.keys() != answers.keys():
            raise EditError("CapabilityProbe: before is of other prompts: probe both models with the same probe")
        moved = divergences(model, tokenizer, before.distributions, self.prompts, **common)
        same = EditMean(len(answers), seed=self.seed, sync_on_compute=False)
        then = [normalise(before.answers[prompt].text) for prompt in self.prompts]
        now = [normalise(answers[prompt].text) for prompt in self.prompts]
        same.update(range(len(then)), [a == b for a, b in zip(then, now, strict=True)])
        totals = torch.tensor([[sum(moved[prompt])] for prompt in self.prompts], dtype=torch.float64)
        counts = torch.tensor([[len(moved[prompt])] for prompt in self.prompts])
        (kl,) = ratio_scores(totals, counts, seed=self.seed)
        return Capability(reading, kl, same.score(), tasks, answers)


def beginnings(texts: Sequence[str]) -> list[str]:
    """The first half of each text's words, at most 16, as prompts to be continued; a text of one word has none."""
    halves = [text.split()[: min(PROMPT_WORDS, len(text.split()) // 2)] for text in texts]
    return [" ".join(words) for words in halves if words]
