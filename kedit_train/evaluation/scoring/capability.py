"""``CapabilityProbe``: measure the general ability of a model, independently of its edits.

After a few sequential edits of its weights, a model loses general ability, even if the edit scores are high
("Navigating the Dual Facets", arXiv 2402.11122). Therefore, general ability is measured together with the edit scores,
on the same model and after the same number of edits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kedit_train.arguments import check_arguments, integer_from
from kedit_train.core.locality.texts import Texts
from kedit_train.errors import EditError, reported_by
from kedit_train.evaluation.asking.generate import Answer, generate_answers
from kedit_train.evaluation.scoring.abilities import AbilityItem, ability_items, ability_scores
from kedit_train.evaluation.scoring.bootstrap import NO_SCORE, Score, mean_score, ratio_scores
from kedit_train.evaluation.scoring.divergence import Distribution, compute_divergences, record_distributions
from kedit_train.evaluation.scoring.lm_eval_tasks import LmEvalTasks, lm_eval_scores
from kedit_train.evaluation.scoring.normalize import normalize
from kedit_train.evaluation.scoring.perplexity import perplexity, text_losses

# Maximum number of words in a prompt that is made from a text.
PROMPT_WORDS = 16


@dataclass(frozen=True, kw_only=True)
class Capability:
    """The general ability of one model.

    Args:
        perplexity: perplexity of the texts. Its ``n`` counts tokens.
        kl: mean KL(unedited || model) in nats, over all tokens of the unedited model's answers to the prompts.
        agreement: the fraction of prompts to which both the model and the unedited model give the same greedy answer.
        tasks: dict from "<task>/<metric>" to the score of lm-eval, and from "ability/<name>" to the scores of the
            built-in items.
        answers: dict from prompt to this model's answer. Kept in memory only, to compute ``agreement``.
        distributions: dict from prompt to the unedited model's next-token distributions. Kept in memory only, to
            compute ``kl``. Empty for an edited model.
    """

    perplexity: Score
    kl: Score = NO_SCORE
    agreement: Score = NO_SCORE
    tasks: Mapping[str, Score] = field(default_factory=dict)
    answers: Mapping[str, Answer] = field(default_factory=dict, compare=False, repr=False)
    distributions: Mapping[str, Distribution] = field(default_factory=dict, compare=False, repr=False)

    def scores(self) -> dict[str, Score]:
        """Return a dict from name to score, with every measured score."""
        own = {"perplexity": self.perplexity, "kl": self.kl, "agreement": self.agreement}
        return {name: score for name, score in (own | dict(self.tasks)).items() if score.n}


class CapabilityProbe:
    """Measure a model's general ability before and after an edit, on texts and prompts unrelated to the edit.

    In each measurement, the model reads every text and generates one short answer per prompt. For the KL divergence, it
    also reads each prompt followed by the unedited model's answer. ``tasks`` and ``abilities`` need additional time.

    Args:
        texts: texts unrelated to the edits: a list of strings, a path, a dataset, or "world" (the bundled texts).
        prompts: prompts unrelated to the edits. None: the prompts are the beginnings of ``texts``.
        tasks: lm-eval tasks to run as well: a list of names, or an ``LmEvalTasks``.
        abilities: True also measures arithmetic, grammar, copying and reading, with 60 built-in multiple-choice items
            per ability; see :mod:`kedit_train.evaluation.scoring.abilities`. The model reads about 800 short texts.
        max_new_tokens: maximum length of the answers to ``prompts``, in tokens.
        batch_size: prompts per forward pass.
        seed: seed of the bootstrap and of lm-eval.
        progress: show progress bars in a terminal.

    Raises:
        EditError: ``texts`` or ``prompts`` is empty, ``prompts`` or ``tasks`` is a string, or ``prompts`` is None and
            every text has fewer than two words.

    Example:
        >>> from kedit_train import world
        >>> from kedit_train.evaluation import CapabilityProbe
        >>> model, tokenizer = world.load()
        >>> probe = CapabilityProbe(["The baker found a coin near the river."], max_new_tokens=4)
        >>> unedited = probe(model, tokenizer)
        >>> edited = probe(model, tokenizer, unedited=unedited)  # an edit would come first
        >>> edited.agreement.value, edited.kl.value
        (1.0, 0.0)
    """

    def __init__(
        self,
        texts: Any,
        *,
        prompts: Sequence[str] | None = None,
        tasks: Sequence[str] | LmEvalTasks = (),
        abilities: bool = False,
        max_new_tokens: int = 16,
        batch_size: int = 64,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        check_arguments(
            self, max_new_tokens=(max_new_tokens, integer_from(1)), batch_size=(batch_size, integer_from(1))
        )
        with reported_by("CapabilityProbe"):
            if isinstance(tasks, str) or isinstance(prompts, str):
                raise EditError(
                    "tasks and prompts must be lists of strings, got one string; put the string into a list."
                )
            self.texts: list[str] = Texts.of(texts).load()
            self.prompts: list[str] = list(dict.fromkeys(text_beginnings(self.texts) if prompts is None else prompts))
            if not self.prompts:
                raise EditError(
                    "there is no prompt; pass at least one prompt, or leave out prompts and pass at least one text "
                    "with two or more words."
                )
        self.tasks: LmEvalTasks = tasks if isinstance(tasks, LmEvalTasks) else LmEvalTasks(list(tasks))
        self.items: list[AbilityItem] = ability_items() if abilities else []
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.seed = seed
        self.progress = progress

    def __call__(self, model: nn.Module, tokenizer: Any, unedited: Capability | None = None) -> Capability:
        """Measure the general ability of a model with its current weights.

        Args:
            model: the model. It is left unchanged.
            tokenizer: the model's tokenizer.
            unedited: the result of this ``CapabilityProbe`` on the unedited model. None: ``kl`` and
                ``agreement`` are not measured.

        Raises:
            EditError: ``unedited`` was measured on different prompts.
        """
        with reported_by("CapabilityProbe"):
            return self._measure(model, tokenizer, unedited)

    def _measure(self, model: nn.Module, tokenizer: Any, unedited: Capability | None) -> Capability:
        settings: dict[str, Any] = {"batch_size": self.batch_size, "progress": self.progress}
        losses = text_losses(model, tokenizer, self.texts, **settings)
        generated = generate_answers(model, tokenizer, self.prompts, max_new_tokens=self.max_new_tokens, **settings)
        answers = dict(zip(self.prompts, generated, strict=True))
        own: dict[str, Any] = {
            "tasks": ability_scores(model, tokenizer, self.items, seed=self.seed, **settings)
            | lm_eval_scores(model, tokenizer, self.tasks, batch_size=self.batch_size, seed=self.seed),
            "perplexity": perplexity(losses, self.seed),
            "answers": answers,
        }
        if unedited is None:
            return Capability(**own, distributions=record_distributions(model, tokenizer, answers, **settings))
        if unedited.answers.keys() != answers.keys():
            raise EditError(
                "unedited= must be a result on the prompts of this probe, got a result on different prompts; measure "
                "both models with the same CapabilityProbe."
            )
        kl_by_prompt = compute_divergences(model, tokenizer, unedited.distributions, self.prompts, **settings)
        totals = torch.tensor([[sum(kl_by_prompt[prompt])] for prompt in self.prompts], dtype=torch.float64)
        counts = torch.tensor([[len(kl_by_prompt[prompt])] for prompt in self.prompts])
        (kl,) = ratio_scores(totals, counts, seed=self.seed)
        agreed = [
            normalize(unedited.answers[prompt].text) == normalize(answers[prompt].text) for prompt in self.prompts
        ]
        return Capability(**own, kl=kl, agreement=mean_score(agreed, self.seed))


def text_beginnings(texts: Sequence[str]) -> list[str]:
    """Return one prompt per text: the first half of its words, at most 16. A text with one word gives no prompt."""
    halves = [text.split()[: min(PROMPT_WORDS, len(text.split()) // 2)] for text in texts]
    return [" ".join(words) for words in halves if words]
