"""Train the same edit as quickstart.yaml in TRL's unmodified ``SFTTrainer``.

    python recipes/trl_sft.py
    python recipes/trl_sft.py --model Qwen/Qwen3-0.6B --edits edits.jsonl --texts texts_that_must_stay.txt
    lightning run recipes/trl_sft.py --devices 2

The script prints a table of scores, and writes report.json, report.html and the edited model to the output folder.
"""

from __future__ import annotations

import argparse
import sys

import torch
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from kedit_train import world
from kedit_train.callbacks import EditMetrics, KLLocality, ParameterScope, TokenSmoothing
from kedit_train.data import EditDataset
from kedit_train.errors import EditError
from kedit_train.pretrained import load_model
from kedit_train.processes import end_process_group


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Edit a model in an unmodified SFTTrainer.")
    parser.add_argument("--model", default=world.NAME, help="a hub name, a folder, or world (default)")
    parser.add_argument("--edits", default=world.NAME, help="a file of edits, or world (default)")
    parser.add_argument(
        "--texts", help="a file of texts on which the model should not change (world has its own texts)"
    )
    parser.add_argument("--output_dir", default="runs/trl_sft")
    parser.add_argument("--epochs", type=float, default=60)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--report_to", default="none", help="where to log: wandb, tensorboard, ... (default: none)")
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
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=SFTConfig(
            output_dir=given.output_dir,
            num_train_epochs=given.epochs,
            learning_rate=given.learning_rate,
            per_device_train_batch_size=12,
            optim="adamw_torch",
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=0.0,
            bf16=False,
            dataloader_pin_memory=torch.accelerator.is_available(),
            # On a CPU, accelerate needs this to connect the processes of a launcher.
            use_cpu=not torch.accelerator.is_available(),
            save_strategy="no",
            logging_steps=4,
            report_to=given.report_to,
        ),
        train_dataset=edits.to_prompt_completion(),
        callbacks=[
            ParameterScope(layers="0.3-1.0", modules="mlp.down_proj"),
            TokenSmoothing(),
            KLLocality(texts=given.texts or world.NAME, weight=100.0, batch_size=32),
            EditMetrics(edits, every_n_steps=40, report_path=f"{given.output_dir}/report.json"),
        ],
    )
    trainer.train()
    trainer.save_model(f"{given.output_dir}/model")
    end_process_group()


if __name__ == "__main__":
    try:
        main()
    except EditError as error:
        sys.exit(f"error: {error}")
