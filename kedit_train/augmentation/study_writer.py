"""Sample texts about documents from a model, through its chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from kedit_train.data import Edit
from kedit_train.data.tokenization import Encoded, collate, context_length, pad_token_id, shorten, token_ids
from kedit_train.errors import EditError
from kedit_train.evaluation.asking.batching import (
    inference_context,
    model_device,
    progress_bar,
    split_into_batches,
    unwrap_model,
)
from kedit_train.evaluation.asking.decoding import Continuation, can_pad
from kedit_train.evaluation.asking.generate import AnswerEnd

# Kind -> what the model is asked to do with a text.
_TASKS = {
    "paraphrase": "Write this text again in other words. Keep every name and every number.",
    "question": 'Ask three questions about this text. Write each question after "Q:" and its short answer, copied from the text, on the next line after "A:".',  # noqa: E501
    "implication": "Write two sentences that follow from this text.",
    "continuation": "Write two sentences that could come after this text.",
}
KINDS = tuple(_TASKS)
# Kind -> what the prompt of the training example says in front of the title.
_PROMPTS = {"paraphrase": "In other words: ", "implication": "What follows from: ", "continuation": "Continued: "}
# An example shows small models the form of questions and answers.
_EXAMPLE = "The ferry of Lund\n\nThe ferry of Lund sails at noon. Its captain is Orla Berg."
_EXAMPLE_ANSWER = (
    "Q: When does the ferry of Lund sail?\nA: at noon\nQ: Who is the captain of the ferry of Lund?\nA: Orla Berg"
)
_QUESTION = re.compile(r"^\W*Q\w*\W*:\s*(\S.*?)\s*\n+\W*A\w*\W*:\s*(\S.*?)\s*$", flags=re.MULTILINE)
_SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}


def write_texts(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[Edit],
    kinds: Sequence[str],
    per_kind: int,
    seed: int,
    batch_size: int,
    max_new_tokens: int,
) -> list[tuple[int, str, list[tuple[str, str]]]]:
    """Sample ``per_kind`` texts of each kind for each document.

    Returns:
        One tuple per text: the index of its document, its kind, and its training examples as pairs (prompt, target). A
        text that the model did not end has no examples. A text of the kind "question" has one example for each question
        with an answer.

    Raises:
        EditError: the tokenizer has no chat template, or a document is too long for the model.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise EditError(
            "the tokenizer must have a chat template, but has none; set tokenizer.chat_template, or call "
            "study_rows with a chat model and pass its result as study=."
        )
    inner = unwrap_model(model)
    context = context_length(inner.config)
    jobs = [(at, kind, n) for at in range(len(documents)) for kind in kinds for n in range(1, per_kind + 1)]
    sequences = []
    for at, kind, _ in jobs:
        ids = _request(tokenizer, documents[at], kind)
        if context is not None and len(ids) + max_new_tokens > context:
            raise EditError(
                f"the document {shorten(documents[at].prompt)!r} and max_new_tokens={max_new_tokens} must fit into "
                f"the context of the model ({context} tokens), got {len(ids) + max_new_tokens} tokens; split the "
                "documents with split_documents, or lower max_new_tokens."
            )
        sequences.append(ids)
    texts = _sample(inner, tokenizer, sequences, seed, batch_size, max_new_tokens)
    return [
        (at, kind, _examples(documents[at], kind, n, text)) for (at, kind, n), text in zip(jobs, texts, strict=True)
    ]


def _request(tokenizer: Any, document: Edit, kind: str) -> list[int]:
    """Return the token ids of a chat that asks for a text about a document."""

    def asked(text: str) -> dict[str, str]:
        return {"role": "user", "content": f"{_TASKS[kind]}\n\n{text}"}

    shown = [asked(_EXAMPLE), {"role": "assistant", "content": _EXAMPLE_ANSWER}] if kind == "question" else []
    messages = [*shown, asked(f"{document.prompt.strip()}\n\n{document.target}")]
    # The chat templates of thinking models read enable_thinking. All other templates ignore this argument.
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    return token_ids(tokenizer, str(tokenizer.apply_chat_template(messages, **options)), special=False)


def _sample(
    model: Any, tokenizer: Any, sequences: Sequence[list[int]], seed: int, batch_size: int, max_new_tokens: int
) -> list[str | None]:
    """Sample one text per sequence. A text that the model did not end is None."""
    is_end, pad_id, device = AnswerEnd(model, tokenizer, (), "chat"), pad_token_id(tokenizer), model_device(model)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=sorted(is_end.ids), pad_token_id=pad_id, **_SAMPLING
    )
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    texts: list[str | None] = [None] * len(sequences)
    with (
        inference_context(model),
        torch.random.fork_rng(),
        progress_bar(len(order), "writing study rows", progress=True) as bar,
    ):
        torch.manual_seed(seed)
        for chosen in split_into_batches(order, batch_size if can_pad(model) else 1):
            rows = [Encoded(sequences[i], len(sequences[i])) for i in chosen]
            batch = collate(rows, pad_id=pad_id, padding_side="left")
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
            made = model.generate(**inputs, generation_config=settings)[:, inputs["input_ids"].shape[1] :]
            for i, ids in zip(chosen, made.tolist(), strict=True):
                length = next((n + 1 for n, token in enumerate(ids) if token in is_end.ids), None)
                if length is not None:
                    texts[i] = is_end.read(Continuation(ids[:length], ended=True)).text.strip()
            bar.update(len(chosen))
    return texts


def _examples(document: Edit, kind: str, number: int, text: str | None) -> list[tuple[str, str]]:
    """Return the training examples in a text."""
    if not text:
        return []
    if kind == "question":
        return [(question, answer) for question, answer in _QUESTION.findall(text)]
    title = document.prompt.rstrip()
    count = f" ({number})" if number > 1 else ""
    return [(f"{_PROMPTS[kind]}{title}{count}{document.prompt[len(title) :]}", text)]
