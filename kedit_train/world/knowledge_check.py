"""Measure how many of the invented facts a model knows, and write the scores to its model card."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kedit_train.world import grammar
from kedit_train.world.facts import Fact, World
from kedit_train.world.templates import BY_NAME


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model (in evaluation mode) and its tokenizer from a folder."""
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], batch_size: int = 256
) -> list[str]:
    """Return the greedy continuation of each prompt up to the end-of-text token, without surrounding white space.

    All prompts of a batch have the same length, so there is no padding.
    """
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    texts = [""] * len(prompts)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for chunk in _same_length(order, ids, batch_size):
        batch = torch.tensor([ids[i] for i in chunk])
        out = cast(Any, model).generate(
            batch,
            attention_mask=torch.ones_like(batch),
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=tokenizer.pad_token_id,
        )
        for i, row in zip(chunk, out[:, batch.shape[1] :], strict=True):
            texts[i] = str(tokenizer.decode(row, skip_special_tokens=True)).strip()
    return texts


def _same_length(order: Sequence[int], ids: Sequence[list[int]], batch_size: int) -> Iterator[list[int]]:
    chunk: list[int] = []
    for i in order:
        if chunk and (len(chunk) == batch_size or len(ids[chunk[0]]) != len(ids[i])):
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk


def recall(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[tuple[Fact, str]]) -> float:
    """Return the fraction of (fact, wording) pairs for which the greedy answer equals the object of the fact."""
    generated = generate_answers(model, tokenizer, [wording.format(s=fact.subject) for fact, wording in questions])
    return sum(answer == fact.object for answer, (fact, _) in zip(generated, questions, strict=True)) / len(questions)


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> float:
    """Return the perplexity of texts: the exponential of the mean loss per token, end-of-text tokens included."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        logits = model(input_ids=ids).logits[0, :-1]
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(total / count)


def scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World) -> dict[str, tuple[float, int]]:
    """Return a dict from the name of a score to a pair: the score, and the number of questions or texts."""
    one = list(world.facts.values())
    questions = {
        "trained wordings, one-hop facts": [(f, w) for f in one for w in BY_NAME[f.relation].trained],
        "held-out wordings, one-hop facts": [(f, w) for f in one for w in BY_NAME[f.relation].held_out],
        "two-hop, trained people and companies": [
            (f, w) for f in world.trained_two_hop for w in BY_NAME[f.relation].trained
        ],
        "two-hop, people held out of two-hop training": [
            (f, w) for f in world.untrained_two_hop for w in BY_NAME[f.relation].trained
        ],
        "two-hop, all": [(f, w) for f in world.two_hop.values() for w in BY_NAME[f.relation].trained],
    }
    results = {name: (recall(model, tokenizer, pairs), len(pairs)) for name, pairs in questions.items()}
    for name, held_out in (("prose perplexity, held-out part", True), ("prose perplexity, training part", False)):
        texts = grammar.paragraphs(200, seed=1, held_out=held_out)
        results[name] = (perplexity(model, tokenizer, texts), len(texts))
    return results


def write_card(folder: Path, results: dict[str, tuple[float, int]], *, epochs: int, seed: int, seconds: float) -> None:
    """Write the ``README.md`` of a checkpoint: what it is, how it was made, and its scores."""
    model, _ = load(folder)
    config = model.config
    rows = "\n".join(f"| {name} | {score:.4f} | {count:,} |" for name, (score, count) in results.items())
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, torch {torch.__version__}"
    (folder / "README.md").write_text(
        f"""# The bundled model
A Llama with {model.num_parameters():,} parameters ({config.num_hidden_layers} layers, hidden size {config.hidden_size},
{config.num_attention_heads} heads, byte-level BPE with {config.vocab_size} tokens, tied embeddings, fp32).
It was trained only on facts about the invented people, companies and cities of `kedit_train.world`, and on sentences of
a small prose grammar. It knows nothing about the real world. You can use it to try, test and measure an edit without a
download.

Made by `python -m kedit_train.world.pretrain --epochs {epochs} --seed {seed}` on {date.today().isoformat()}
in {seconds:.0f} seconds on {torch.get_num_threads()} CPU threads ({machine}).
Each document is `<s>` + prompt + one space + answer + `</s>`, without a full stop.

For facts, the score is the fraction of questions whose greedy answer, generated up to end-of-text, is exactly right.
For prose, the score is the perplexity per token, including end-of-text.

| what | score | n |
|---|---|---|
{rows}

*Trained wordings* are the wordings of each relation that the training used. *Held-out wordings* are in no training
document. They measure how far the knowledge generalizes to new wordings.
*Two-hop, people held out*: the training contained the two facts behind each question, but no two-hop question about
these people.
""",
        encoding="utf-8",
    )
