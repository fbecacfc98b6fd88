"""Train the bundled model: generate facts, train a tokenizer and a small Llama on them, save both, and score the model.

    python -m kedit_train.world.pretrain [--out DIR] [--epochs N] [--seed S]

Training the packaged checkpoint took 18 minutes on two CPU cores. All scores in its model card are measured on the
saved files.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from rich.progress import Progress, TimeElapsedColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kedit_train.world import facts, grammar
from kedit_train.world import knowledge_check as measure

CHECKPOINT = Path(__file__).parent / "checkpoint"
BOS, EOS, PAD = "<s>", "</s>", "<pad>"  # ids 0, 1, 2
CONTEXT = 256
BATCH_TOKENS, PEAK_LR, WARM_UP, WEIGHT_DECAY = 2048, 3e-3, 0.03, 0.1
EPOCHS, WORDINGS_PER_EPOCH, PROSE_PER_EPOCH = 48, 3, 400


@dataclass(frozen=True)
class Shape:
    """Size of the tokenizer and of the Llama."""

    vocabulary: int = 1536
    width: int = 128
    inner: int = 352
    layers: int = 6
    heads: int = 4


def train_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that adds ``<s>`` before a text and nothing after it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=[BOS, EOS, PAD], initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, shape: Shape) -> LlamaForCausalLM:
    """Return an untrained Llama with tied embeddings and without dropout."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config)


def epoch_batches(
    stated: Sequence[Sequence[list[int]]], filler: Sequence[list[int]], rng: Random
) -> list[list[list[int]]]:
    """Return the batches of one epoch: some wordings of every fact and some prose.

    A batch has about ``BATCH_TOKENS`` tokens. All its documents have the same length, so there is no padding.
    """
    drawn = [document for wordings in stated for document in facts.shuffled(rng, wordings)[:WORDINGS_PER_EPOCH]]
    drawn += [facts.pick(rng, filler) for _ in range(PROSE_PER_EPOCH)]
    by_length: dict[int, list[list[int]]] = {}
    for document in facts.shuffled(rng, drawn):
        by_length.setdefault(len(document), []).append(document)
    batches = []
    for length, same in sorted(by_length.items()):
        rows = max(1, BATCH_TOKENS // length)
        batches += [same[i : i + rows] for i in range(0, len(same), rows)]
    return facts.shuffled(rng, batches)


def train(model: LlamaForCausalLM, plan: Sequence[list[list[list[int]]]], progress: Progress) -> None:
    """Train on all batches of ``plan`` (one list per epoch) with AdamW, warm-up and cosine decay to zero."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98))
    total = sum(len(batches) for batches in plan)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, total))
    task = progress.add_task("pretraining", total=total)
    model.train()
    for batches in plan:
        for batch in batches:
            ids = torch.tensor(batch)
            logits = model(input_ids=ids).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1, description=f"pretraining, loss {loss.item():.3f}")
    model.eval()


def _warm_cosine(step: int, total: int) -> float:
    progress = (step + 1) / total
    return min(progress / WARM_UP, 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def pretrain(
    out: Path, *, epochs: int = EPOCHS, seed: int = 0, world: facts.World | None = None, shape: Shape | None = None
) -> dict[str, tuple[float, int]]:
    """Train a model, save it with its tokenizer and model card, and return its scores.

    Args:
        out: the folder to write to.
        epochs: number of epochs.
        seed: seed of initialization and data order.
        world: the facts to train on. None generates the default facts.
        shape: size of the model. None uses the default size.

    Returns:
        A dict from the name of a score to a pair: the score, and the number of questions or texts.
    """
    started = time.monotonic()
    torch.manual_seed(seed)
    rng = Random(seed)
    world = world or facts.build()
    shape = shape or Shape()
    stated = facts.training_documents(world)
    filler = grammar.paragraphs(4000, held_out=False)
    tokenizer = train_tokenizer([text for texts in stated for text in texts] + filler, shape.vocabulary)
    model = new_model(tokenizer, shape)

    def encode(text: str) -> list[int]:
        return [*tokenizer(text).input_ids, 1]

    fact_ids, prose_ids = [[encode(text) for text in texts] for texts in stated], [encode(text) for text in filler]
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as progress:
        train(model, [epoch_batches(fact_ids, prose_ids, rng) for _ in range(epochs)], progress)
        out.mkdir(parents=True, exist_ok=True)
        model.generation_config.update(do_sample=False)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        # transformers 4 does not know the name of the class that transformers 5 writes. By default, it also returns
        # token_type_ids, which generate() refuses.
        saved = out / "tokenizer_config.json"
        config = json.loads(saved.read_text()) | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
        }
        saved.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        trained = time.monotonic() - started
        progress.add_task("measuring by greedy generation", total=None)
        scores = measure.scores(*measure.load(out), world)
    measure.write_card(out, scores, epochs=epochs, seed=seed, seconds=trained)
    return scores


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kedit_train.world.pretrain", description="Train the bundled model."
    )
    parser.add_argument(
        "--out", type=Path, default=CHECKPOINT, help="folder to write (default: the packaged checkpoint)"
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="number of epochs (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of initialization and data order (default: %(default)s)"
    )
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    for name, (score, count) in pretrain(chosen.out, epochs=chosen.epochs, seed=chosen.seed).items():
        print(f"{name}: {score:.4f} (n = {count})")


if __name__ == "__main__":
    main()
