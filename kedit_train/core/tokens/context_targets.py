"""Soft targets for the answers of edits: the predictions of the unedited model when it reads the new fact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kedit_train.core.cache.sequence_keys import real_tokens
from kedit_train.core.locality.reference_states import by_length, hidden_states, top_k_log_probs
from kedit_train.core.output_head import evaluation_mode
from kedit_train.core.run import EditRun
from kedit_train.data.chat_format import PromptFormat
from kedit_train.data.fact_in_context import prompt_with_fact
from kedit_train.data.prompts import end_id, pair_ids
from kedit_train.data.tokenization import context_length
from kedit_train.edit import Edit
from kedit_train.errors import EditError, reported_by, warn
from kedit_train.functional.labels import IGNORE_INDEX

# Sequences per forward pass of the unedited model.
BATCH_SIZE = 16
# A warning is issued if none of the first 32 training examples contains an edit. With fewer than 8 edits, only the
# first 4 * (number of edits) examples are read before the warning.
EXAMPLES_WITHOUT_EDIT = 32


@dataclass(frozen=True)
class _Answer:
    """One edit as tokens.

    Args:
        teacher: the token ids that the teacher (the unedited model) reads: the prompt with the fact, then ``answer``.
        prompt: the token ids of the prompt without the fact.
        answer: the token ids of the target, followed by the end token if the prompt format has one.
        ends: 1 if ``answer`` includes an end token, else 0.
    """

    teacher: tuple[int, ...]
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    ends: int

    @property
    def key(self) -> tuple[int, ...]:
        """The tokens by which a training example is recognized: the prompt and the target, without an end token."""
        return self.prompt + self.answer[: len(self.answer) - self.ends]


class ContextTargets:
    """Soft targets for the answer tokens of edits: next-token distributions of the unedited model given the new fact.

    The teacher (the unedited model) reads the prompt with the fact and then the target of the edit (teacher forcing).
    The distributions are computed once, in the constructor. If the teacher's most probable token is not the label, the
    distribution would teach a wrong answer. In this case, the token is trained towards its label.

    Args:
        run: the run. The constructor computes the distributions with the weights before the edit.
        tokenizer: the tokenizer of the training examples.
        edits: the edits.
        context: a template with the fields ``{fact}`` and ``{prompt}``.
        top_k: number of probabilities that are kept for each token.
        prompt_format: the prompt format of the training examples.

    Attributes:
        follows: one bool per edit, True if every token of the target is the teacher's most probable token. Edits with
            the same prompt and target share one bool.

    Raises:
        EditError: ``top_k`` is greater than the vocabulary, the target of an edit has no text, or the teacher would
            have to read more tokens than the context length of the model.
    """

    def __init__(
        self,
        run: EditRun,
        tokenizer: Any,
        edits: Sequence[Edit],
        *,
        context: str,
        top_k: int,
        prompt_format: PromptFormat,
    ) -> None:
        vocabulary = run.head().config.vocab_size
        if top_k > vocabulary:
            raise EditError(f"top_k must be at most {vocabulary}, the size of the vocabulary, got {top_k}.")
        self._prompt_format = prompt_format
        length = context_length(getattr(run.model, "config", None))
        found = [_tokenize(tokenizer, edit, context, prompt_format, length) for edit in edits]
        answers = {answer.key: answer for answer in found}
        self._limit = min(EXAMPLES_WITHOUT_EDIT, 4 * len(answers))
        self._examples, self._has_edit, self._warned = 0, False, False
        self._lengths = sorted({len(key) for key in answers}, reverse=True)
        # Key of an edit -> the edit, and the place of its first answer token in the tensors below.
        self._places: dict[tuple[int, ...], tuple[_Answer, int]] = {}
        columns, places = _top_k(run, list(answers.values()), top_k)
        # [tokens, k + 1], [tokens, k] and [tokens]; the tokens are those of all answers, one after the other.
        self._log_probs, self._tokens, self._taught = columns
        for answer, place in zip(answers.values(), places, strict=True):
            self._places[answer.key] = (answer, place)
        taught = self._taught.tolist()
        self.follows = [all(taught[at : at + len(a.answer) - a.ends]) for a, at in self._places.values()]

    def find(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the soft targets of the N supervised tokens of a batch.

        An example is recognized by its token ids: it must begin with the prompt and the target of an edit. Padding, the
        other examples of the batch and packing do not matter.

        Args:
            inputs: the arguments of the model's forward call by name, with ``labels`` [batch, length].

        Returns:
            Log probabilities [N, k + 1], token ids [N, k], and a bool tensor [N] that is True for tokens with a soft
            target. The first k log probabilities belong to the k token ids. The last one is the logarithm of the total
            probability of all other tokens. The rows of tokens without a soft target have no meaning.
        """
        labels = inputs["labels"].cpu()
        supervised = labels != IGNORE_INDEX
        where = supervised[:, 1:]
        place = torch.full(where.shape, -1)
        for row, columns, tokens in _sequences(inputs, labels):
            is_supervised = supervised[row, columns].tolist()
            if not any(is_supervised):
                continue
            self._examples += 1
            for at, column in self._match(tokens, is_supervised):
                place[row, columns[column] - 1] = at
                self._has_edit = True
        if not self._has_edit and self._examples >= self._limit and not self._warned:
            self._warned = True
            # The model calls this method in its forward pass, where warnings do not name the callback by default.
            with reported_by("ContextTeacher"):
                warn(
                    f"none of the first {self._examples} training examples begins with the tokens of the prompt and "
                    "the target of an edit, so these examples are trained towards their labels. If the training data "
                    "contains the edits, set prompt_format to the format of the training data (now "
                    f"{self._prompt_format!r}), and set edits= to the edits in the training data."
                )
        index = place[where]
        rows = index.clamp(min=0).to(self._taught.device)
        known = (index >= 0).to(rows.device)
        return self._log_probs[rows], self._tokens[rows], self._taught[rows] & known

    def _match(self, tokens: tuple[int, ...], is_supervised: Sequence[bool]) -> Iterator[tuple[int, int]]:
        """Find the answer tokens in a training example that begins with the prompt and the target of an edit.

        Args:
            tokens: the token ids of the example, without padding.
            is_supervised: for each of these tokens, whether it has a label.

        Yields:
            One pair of indices for each answer token: the row of its soft target in the stored tensors, and the index
            of the token in ``tokens``.
        """
        for length in self._lengths:
            answer, place = self._places.get(tokens[:length], (None, 0))
            if answer is None or not all(is_supervised[len(answer.prompt) : length]):
                continue
            for offset, token in enumerate(answer.answer):
                index = len(answer.prompt) + offset
                # The token that ends an answer may be missing in the example.
                if index < len(tokens) and tokens[index] == token and is_supervised[index]:
                    yield place + offset, index
            return


def _tokenize(tokenizer: Any, edit: Edit, context: str, prompt_format: PromptFormat, length: int | None) -> _Answer:
    own = pair_ids(tokenizer, edit.prompt, edit.target, prompt_format, length)
    informed = pair_ids(tokenizer, prompt_with_fact(edit, edit.prompt, context), edit.target, prompt_format, length)
    prompt, answer = own.input_ids[: own.target_start], own.input_ids[own.target_start :]
    # The teacher reads the answer tokens of the training example, even if the tokenizer would split the answer
    # differently after the fact.
    teacher = informed.input_ids[: informed.target_start] + answer
    ends = int(end_id(tokenizer, prompt_format) is not None)
    return _Answer(tuple(teacher), tuple(prompt), tuple(answer), ends)


@torch.no_grad()
def _top_k(run: EditRun, answers: Sequence[_Answer], k: int) -> tuple[tuple[Tensor, Tensor, Tensor], list[int]]:
    """Compute the soft targets of all answers with the unedited model.

    Returns:
        Three tensors with one row per answer token, and a list. The tensors are the log probabilities [tokens, k + 1],
        the token ids [tokens, k], and a bool tensor [tokens] that is True if the answer token is the most probable
        token. The list contains the index of the first row of each answer.
    """
    head, sequences = run.head(), [answer.teacher for answer in answers]
    places, parts, count = [0] * len(answers), [], 0
    with run.reference_model(), evaluation_mode(run.model):
        for chosen in by_length(sequences, BATCH_SIZE, quiet=not run.host.is_main):
            with run.host.forward_context():
                hidden = hidden_states(head, [sequences[i] for i in chosen])
            own = hidden.split([len(sequences[i]) for i in chosen])
            # The state before a token predicts it.
            states = [s[-len(answers[i].answer) - 1 : -1] for s, i in zip(own, chosen, strict=True)]
            labels = torch.tensor([token for i in chosen for token in answers[i].answer], device=hidden.device)
            log_probs, tokens = top_k_log_probs(head, torch.cat(states), k)
            parts.append((log_probs, tokens, tokens[:, 0] == labels))
            for i in chosen:
                places[i], count = count, count + len(answers[i].answer)
    log_probs, tokens, taught = (torch.cat(column) for column in zip(*parts, strict=True))
    return (log_probs, tokens, taught), places


def _sequences(inputs: Mapping[str, Any], labels: Tensor) -> Iterator[tuple[int, list[int], tuple[int, ...]]]:
    """Yield each sequence of a batch: its row, the columns of its tokens, and its token ids, without padding.

    With packing, a row contains several sequences. A sequence begins where the position id is 0.
    """
    ids, positions = inputs.get("input_ids"), inputs.get("position_ids")
    if not isinstance(ids, Tensor) or ids.shape != labels.shape:
        return
    real, ids = real_tokens(inputs.get("attention_mask"), ids).cpu(), ids.cpu()
    starts = torch.zeros_like(real)
    if isinstance(positions, Tensor) and positions.shape[-1] == ids.shape[1] and positions.ndim == 2:
        starts = (positions.cpu() == 0).expand_as(real)
    for row in range(len(ids)):
        columns = real[row].nonzero().squeeze(-1)
        bounds = [*starts[row, columns].nonzero().squeeze(-1).tolist(), len(columns)]
        bounds = bounds if bounds[0] == 0 else [0, *bounds]
        for begin, end in pairwise(bounds):
            own = columns[begin:end]
            yield row, own.tolist(), tuple(ids[row, own].tolist())
