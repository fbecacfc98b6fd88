"""Workloads of the benchmarks: models with random weights, tokenized edits, and runs as users set them up."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from kedit_train import EditDataset
from kedit_train.callbacks import editing
from kedit_train.data.tokenization import Encoded, collate

SHARED = Path(__file__).resolve().parents[3] / "shared"
COUNTERFACT = SHARED / "data" / "counterfact" / "counterfact_10k.json"
FACTLM = SHARED / "models" / "factlm"
STORIES = SHARED / "models" / "stories260K"

# Layers, width, vocabulary, heads and key/value heads, feed-forward width. 1b and 8b have the shapes of Llama 3: 1b has
# tied embeddings and 1.2 B parameters, and 8b has untied embeddings and 8.0 B parameters.
SIZES: dict[str, tuple[int, ...]] = {
    "tiny": (4, 64, 4096, 2, 2, 128),
    "small": (12, 768, 32_000, 12, 12, 2048),
    "wide": (12, 768, 151_936, 12, 12, 2048),
    "1b": (16, 2048, 128_256, 32, 8, 8192),
    "8b": (32, 4096, 128_256, 32, 8, 14_336),
}


def llama(size: str, options: Any, seed: int = 0) -> Any:
    """Return a Llama with random weights in training mode."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    layers, width, vocab, heads, groups, inner = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=512,
        tie_word_embeddings=size == "1b",
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(seed)
    with torch.device(options.device):
        # The model is created in this dtype, because 8 B parameters in fp32 would take 32 GB.
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).train()


def edited_layer(model: Any) -> int:
    """Return the index of the layer at three quarters of the depth."""
    return model.config.num_hidden_layers * 3 // 4


def matrix(model: Any, layer: int) -> torch.nn.Parameter:
    """Return the down-projection matrix that is edited."""
    return model.model.layers[layer].mlp.down_proj.weight


def twin(model: Any, layer: int | None) -> Any:
    """Return a copy of the model with its own ``down_proj`` in ``layer``, which alone is trainable.

    All other tensors are shared, so that many variants fit into memory. With None, everything is copied and trainable.
    """
    if layer is None:
        return copy.deepcopy(model).requires_grad_(True)
    own = matrix(model, layer)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is own)
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if p is not own})


def rows_of(count: int, vocab: int, seed: int = 0, length: int = 32) -> list[Encoded]:
    """Return random edits of about ``length`` tokens (plus or minus a quarter), the last 4 to 6 of them targets."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        tokens = [draw.randrange(3, vocab) for _ in range(draw.randint(length * 3 // 4, length * 5 // 4))]
        found.append(Encoded(tokens, len(tokens) - draw.randint(4, 6)))
    return found


def words(vocab: int) -> Any:
    """Return a tokenizer of ``vocab`` words, because trainers need one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "</s>", "<pad>", *(f"w{i}" for i in range(3, vocab))]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


def counterfact(count: int) -> EditDataset:
    """Return the first records of CounterFact with different prompts."""
    if not COUNTERFACT.exists():
        raise SystemExit(f"this benchmark needs the records of CounterFact at {COUNTERFACT}")
    return distinct(EditDataset.load(COUNTERFACT), count)


def distinct(edits: EditDataset, count: int) -> EditDataset:
    """Return the first ``count`` edits with different prompts."""
    seen = {edit.prompt: edit for edit in reversed(edits)}
    return EditDataset(list(reversed(seen.values()))[:count], name=edits.name)


def sft(
    model: Any, rows: Sequence[Encoded], tokenizer: Any, options: Any, *, callbacks: Sequence[Any] = (),
    lr: float = 1e-4, batch_size: int = 16, max_steps: int = 1_000_000, lora: Any = None,
) -> Any:  # fmt: skip
    """Return an ``SFTTrainer`` on tokenized edits: shuffled, completion-only loss, AdamW, constant learning rate."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    data = [
        {"input_ids": r.input_ids, "completion_mask": [int(i >= r.target_start) for i in range(len(r.input_ids))]}
        for r in rows
    ]
    return SFTTrainer(
        model,
        args=SFTConfig(
            **_trainer_arguments(options, lr, batch_size, max_steps), max_length=None, completion_only_loss=True
        ),
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=tokenizer,
        callbacks=list(callbacks),
        peft_config=lora,
    )


def plain_trainer(
    model: Any, rows: Sequence[Encoded], tokenizer: Any, options: Any, *, callbacks: Sequence[Any], lr: float,
    batch_size: int,
) -> Any:  # fmt: skip
    """Return the run of :func:`sft` in ``transformers.Trainer``."""
    from transformers import Trainer, TrainingArguments

    return Trainer(
        model,
        args=TrainingArguments(**_trainer_arguments(options, lr, batch_size), remove_unused_columns=False),
        train_dataset=list(rows),  # pyright: ignore[reportArgumentType]
        data_collator=lambda batch: collate(batch, pad_id=tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def _trainer_arguments(options: Any, lr: float, batch_size: int, max_steps: int = 1_000_000) -> dict[str, Any]:
    return {
        "output_dir": tempfile.gettempdir(),
        "per_device_train_batch_size": batch_size,
        "learning_rate": lr,
        "seed": options.seed,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_steps": max_steps,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": options.device == "cpu",
        "dataloader_pin_memory": options.device != "cpu",
        "report_to": [],
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


@contextmanager
def plain_loop(
    model: Any, rows: Sequence[Encoded], pad_id: int, callbacks: Sequence[Any], *, lr: float, batch_size: int,
    batches: Callable[[], Iterator[Sequence[int]]] | None = None,
) -> Iterator[Callable[[], None]]:  # fmt: skip
    """Run a plain loop and yield a function that takes the next step. ``batches`` returns the indices of an epoch."""
    device = next(model.parameters()).device

    def shuffled() -> Iterator[Sequence[int]]:
        yield from (batch.tolist() for batch in torch.randperm(len(rows)).split(batch_size))

    def endless() -> Iterator[Sequence[int]]:
        while True:
            yield from (batches or shuffled)()

    with editing(model, callbacks) as edit:
        optimizer, drawn = torch.optim.AdamW(edit.parameters(), lr=lr, weight_decay=0.0), endless()

        def step() -> None:
            batch = collate([rows[i] for i in next(drawn)], pad_id=pad_id)
            edit.before_step()
            model(**{name: value.to(device) for name, value in batch.items()}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        yield step


def one_edit(
    model: Any, weight: torch.nn.Parameter, row: Encoded, *, lr: float, steps: int = 25, good: float | None = None
) -> Iterator[int]:
    """Train one edit as the FT baselines of ROME and EasyEdit do: batch size 1, full logits, Adam.

    Args:
        good: stop when the loss is below this value, which is 0.01 in both baselines. None takes all steps.

    Yields:
        The number of steps so far, after each step.
    """
    device = weight.device
    ids = torch.tensor([row.input_ids], device=device)
    mask, start = torch.ones_like(ids), row.target_start
    optimizer = torch.optim.Adam([weight], lr=lr)
    for taken in range(1, steps + 1):
        optimizer.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        loss = F.cross_entropy(logits[0, start - 1 : -1].float(), ids[0, start:])
        if good is not None and loss.item() < good:
            return
        loss.backward()
        optimizer.step()
        yield taken
