"""The hosts that every callback is run through, each the stock loop with nothing of ours but the callbacks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from kedit_train.callbacks import editing
from kedit_train.data.tokenise import collate, pad_token_id

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


def collator(tokenizer: Any) -> Callable[[Any], dict[str, torch.Tensor]]:
    return lambda rows: collate(rows, pad_id=pad_token_id(tokenizer))


class Rows(torch.utils.data.Dataset):
    """Tokenised edits, as a dataset for a collator that takes them as they are."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def transformers_trainer(model: Any, tokenizer: Any, edits: Any, callbacks: list[Any], steps: int, **extra: Any) -> Any:
    resume = extra.pop("resume", False)
    arguments = TrainingArguments(**({"output_dir": tempfile.mkdtemp(), "max_steps": steps} | ARGUMENTS | extra))
    arguments.remove_unused_columns = False
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Rows(edits.encode(tokenizer)),
        data_collator=collator(tokenizer),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def sft_trainer(model: Any, tokenizer: Any, edits: Any, callbacks: list[Any], steps: int, **extra: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    peft_config, resume = extra.pop("peft_config", None), extra.pop("resume", False)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**({"output_dir": tempfile.mkdtemp(), "max_steps": steps} | ARGUMENTS | extra)),
        train_dataset=edits.to_prompt_completion(),
        processing_class=tokenizer,
        callbacks=callbacks,
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class PlainModule(L.LightningModule):
    """Somebody's module: it calls a causal language model with labels and knows nothing of edits."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.network, self.tokenizer = model, tokenizer

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.network(**batch).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


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
    rows = Rows(edits.encode(tokenizer))
    sampler = extra.pop("sampler", lambda rows: None)(rows)
    loader = DataLoader(rows, batch_size=size, sampler=sampler, collate_fn=collator(tokenizer))
    trainer = L.Trainer(max_steps=steps, callbacks=callbacks, **(options | extra))
    trainer.fit(PlainModule(model, tokenizer), loader, ckpt_path=checkpoint)
    return trainer


def plain_loop(model: Any, tokenizer: Any, edits: Any, callbacks: list[Any], steps: int, **extra: Any) -> Any:
    rows, put = edits.encode(tokenizer), collator(tokenizer)
    model.train()
    with editing(model, callbacks, tokenizer=tokenizer, log_every_n_steps=1) as edit:
        optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-3)
        for step in range(steps):
            edit.before_step()
            start = 4 * step % len(rows)
            model(**put(rows[start : start + 4])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return edit


def fabric_loop(model: Any, tokenizer: Any, edits: Any, callbacks: list[Any], steps: int, **extra: Any) -> Any:
    fabric = L.Fabric(accelerator="cpu", devices=1, **extra)
    rows, put = edits.encode(tokenizer), collator(tokenizer)
    model.train()
    with editing(model, callbacks, tokenizer=tokenizer, log_every_n_steps=1) as edit:
        wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(edit.parameters(), lr=1e-3))
        for step in range(steps):
            edit.before_step()
            start = 4 * step % len(rows)
            fabric.backward(wrapped(**put(rows[start : start + 4])).loss)
            optimizer.step()
            optimizer.zero_grad()
    return edit


HOSTS = {
    "Trainer": transformers_trainer,
    "SFTTrainer": sft_trainer,
    "Lightning": lightning_trainer,
    "loop": plain_loop,
    "Fabric": fabric_loop,
}
