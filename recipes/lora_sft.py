"""Turn a LoRA run in TRL into a knowledge edit by adding a list of callbacks.

    python recipes/lora_sft.py
    python recipes/lora_sft.py --model Qwen/Qwen3-0.6B --edits edits.jsonl --texts texts_that_must_stay.txt
    python recipes/lora_sft.py --plain          # the same run with EditMetrics as its only callback

Expected: reliability 0.95 to 1.00, generality 0.38 to 0.85, locality 0.90 to 1.00; 39 s (2026-11-22).

The script prints a table of scores. It writes report.json, report.html, the LoRA adapter and edit.safetensors to the
output folder. Use `kedit apply` to apply edit.safetensors to the base model.
"""

from __future__ import annotations

import argparse
import sys

import torch
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from kedit_train import world
from kedit_train.callbacks import EditMetrics, KLLocality, SaveDelta, StopWhenEdited, TokenSmoothing
from kedit_train.data import EditDataset
from kedit_train.errors import EditError
from kedit_train.pretrained import load_model


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Edit a model with LoRA in TRL.")
    parser.add_argument("--model", default=world.NAME, help="a hub name, a folder, or world (default)")
    parser.add_argument("--edits", default=world.NAME, help="a file of edits, or world (default)")
    parser.add_argument(
        "--texts", help="a file of texts on which the model should not change (world has its own texts)"
    )
    parser.add_argument("--output_dir", default="runs/lora_sft")
    parser.add_argument("--learning_rate", type=float, default=5e-3)
    parser.add_argument("--epochs", type=float, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="use no callback except EditMetrics")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.texts is None and (given.model, given.edits) != (world.NAME, world.NAME):
        raise EditError(
            "--texts is missing; give a file of texts on which the predictions of your model should not change "
            "(.txt, one text per line). "
            "The bundled texts fit only the bundled model and edits."
        )
    edits = EditDataset.load(given.edits)
    model, tokenizer = load_model(given.model)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    callbacks = [
        TokenSmoothing(epsilon=0.05),
        KLLocality(texts=given.texts or world.NAME, weight=30.0, batch_size=32),
        StopWhenEdited(loss=None, idle_steps="epoch"),
        SaveDelta(f"{given.output_dir}/edit.safetensors"),
    ]
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=SFTConfig(
            output_dir=given.output_dir,
            num_train_epochs=given.epochs,
            learning_rate=given.learning_rate,
            per_device_train_batch_size=12,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            bf16=False,
            dataloader_pin_memory=torch.accelerator.is_available(),
            use_cpu=not torch.accelerator.is_available(),
            save_strategy="no",
            report_to="none",
            seed=given.seed,
        ),
        train_dataset=edits.to_prompt_completion(),
        peft_config=LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        callbacks=[
            *([] if given.plain else callbacks),
            EditMetrics(edits, every_n_steps=0, report_path=f"{given.output_dir}/report.json"),
        ],
    )
    trainer.train()
    trainer.save_model(f"{given.output_dir}/adapter")


if __name__ == "__main__":
    try:
        main()
    except EditError as error:
        sys.exit(f"error: {error}")
