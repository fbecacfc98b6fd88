"""The training loops of the conformance tests. Each is an ordinary loop to which callbacks are added."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import lightning as L
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainingArguments

from kedit_train.callbacks import editing
from kedit_train.data.tokenization import collate, pad_token_id

ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "seed": 0,
}


def arguments_of_this_version(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments for ``TrainingArguments`` with the names of the installed version of transformers."""
    newer, older = "activation_checkpointing", "gradient_checkpointing"
    known = {field.name for field in fields(TrainingArguments)}
    if newer not in known:
        arguments = {older if name == newer else name: value for name, value in arguments.items()}
    if arguments.get("train_sampling_strategy") == "sequential" and "train_sampling_strategy" not in known:
        return {name: value for name, value in arguments.items() if name != "train_sampling_strategy"}
    return arguments


def take_in_order(trainer: Any, arguments: dict[str, Any]) -> None:
    """Let a trainer of transformers 4, which has no ``train_sampling_strategy``, take the examples in their order."""
    if arguments.get("train_sampling_strategy") == "sequential" and hasattr(trainer.args, "group_by_length"):
        trainer._get_train_sampler = lambda data=None: SequentialSampler(trainer.train_dataset)


def labels_of(row: dict[str, list[int]]) -> list[int]:
    """Return the labels of an example of ``SFTTrainer``. TRL 0.24 stores a mask of the trained tokens instead."""
    if "labels" in row:
        return row["labels"]
    pairs = zip(row["input_ids"], row["completion_mask"], strict=True)
    return [token if trained else -100 for token, trained in pairs]


def collator(tokenizer: Any) -> Callable[[Any], dict[str, torch.Tensor]]:
    return lambda rows: collate(rows, pad_id=pad_token_id(tokenizer))


class Rows(torch.utils.data.Dataset):
    """Tokenized edits as a dataset. The collator takes the items unchanged."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def transformers_trainer(model: Any, tokenizer: Any, edits: Any, callbacks: list[Any], steps: int, **extra: Any) -> Any:
    resume = extra.pop("resume", False)
    options = {"output_dir": tempfile.mkdtemp(), "max_steps": steps} | ARGUMENTS | extra
    arguments = TrainingArguments(**arguments_of_this_version(options))
    arguments.remove_unused_columns = False
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Rows(edits.encode(tokenizer)),
        data_collator=collator(tokenizer),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    take_in_order(trainer, options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def sft_trainer(model: Any, tokenizer: Any, edits: Any, callbacks: list[Any], steps: int, **extra: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    peft_config, resume = extra.pop("peft_config", None), extra.pop("resume", False)
    options = {"output_dir": tempfile.mkdtemp(), "max_steps": steps} | ARGUMENTS | extra
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**arguments_of_this_version(options)),
        train_dataset=edits.to_prompt_completion(),
        processing_class=tokenizer,
        callbacks=callbacks,
        peft_config=peft_config,
    )
    take_in_order(trainer, options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class PlainModule(L.LightningModule):
    """A user's module that calls a causal language model with labels."""

    def __init__(self, model: Any, tokenizer: Any, optimizer: Any = None) -> None:
        super().__init__()
        self.network, self.tokenizer, self.optimizer = model, tokenizer, optimizer or adamw

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.network(**batch).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def lightning_trainer(model: Any, tokenizer: Any, edits: Any, callbacks: list[Any], steps: int, **extra: Any) -> Any:
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    size, checkpoint = extra.pop("batch_size", 4), extra.pop("ckpt_path", None)
    module = PlainModule(model, tokenizer, extra.pop("optimizer", None))
    rows = Rows(edits.encode(tokenizer))
    sampler = extra.pop("sampler", lambda rows: None)(rows)
    loader = DataLoader(rows, batch_size=size, sampler=sampler, collate_fn=collator(tokenizer))
    trainer = L.Trainer(max_steps=steps, callbacks=callbacks, **(options | extra))
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer


def hand_written_loop(
    setup: Callable[[Any, Any], tuple[Any, Any, Callable[[torch.Tensor], Any]]],
    model: Any,
    tokenizer: Any,
    edits: Any,
    callbacks: list[Any],
    steps: int,
    *,
    batch_size: int = 4,
    accumulate: int = 1,
    optimizer: Any = adamw,
    bf16: bool = False,
    rank: int = 0,
    processes: int = 1,
) -> Any:
    """Train on the edits in their order. ``setup`` wraps model and optimizer and returns the backward function."""
    rows, put = edits.encode(tokenizer), collator(tokenizer)
    model.train()
    with editing(model, callbacks, tokenizer=tokenizer, log_every_n_steps=1) as edit:
        wrapped, stepper, backward = setup(model, optimizer(edit.parameters()))
        start = rank * batch_size
        for _ in range(steps):
            edit.before_step()
            for _ in range(accumulate):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = wrapped(**put(rows[start % len(rows) : start % len(rows) + batch_size])).loss
                backward(loss / accumulate)
                start += batch_size * processes
            stepper.step()
            stepper.zero_grad()
    return edit


def plain_loop(model: Any, tokenizer: Any, edits: Any, callbacks: list[Any], steps: int, **extra: Any) -> Any:
    def setup(model: Any, optimizer: Any) -> Any:
        wrapped = DistributedDataParallel(model) if extra.get("processes", 1) > 1 else model
        return wrapped, optimizer, lambda loss: loss.backward()

    return hand_written_loop(setup, model, tokenizer, edits, callbacks, steps, **extra)


def fabric_loop(model: Any, tokenizer: Any, edits: Any, callbacks: list[Any], steps: int, **extra: Any) -> Any:
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1}
    options |= {name: extra.pop(name) for name in ("precision", "devices", "strategy") if name in extra}
    fabric = L.Fabric(**options)
    fabric.launch()
    return hand_written_loop(
        lambda model, optimizer: (*fabric.setup(model, optimizer), fabric.backward),
        model,
        tokenizer,
        edits,
        callbacks,
        steps,
        **extra,
    )


HOSTS = {
    "Trainer": transformers_trainer,
    "SFTTrainer": sft_trainer,
    "Lightning": lightning_trainer,
    "loop": plain_loop,
    "Fabric": fabric_loop,
}
