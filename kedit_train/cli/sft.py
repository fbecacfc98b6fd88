"""The command ``sft``: run a recipe in TRL, with ``EditSFTTrainer``.

    python -m kedit_train sft --config recipes/overtone.yaml
    python -m kedit_train sft --config recipes/overtone.yaml --model.name Qwen/Qwen3-0.6B --data.path edits.jsonl
    torchrun --nproc-per-node 2 -m kedit_train sft --config recipes/overtone.yaml

The command reads the same recipes as ``fit``. Settings of the Lightning trainer become arguments of ``SFTConfig`` with
the same meaning. If a recipe changes a setting for which ``SFTConfig`` has no argument, the command raises an error.
The optimizer is Adam with a constant learning rate, as in ``EditModule``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse import Namespace

from kedit_train.arguments import at_least, check_arguments
from kedit_train.augmentation import AugmentationOptions, augmentation
from kedit_train.callbacks import EditMetrics
from kedit_train.cli import recipe
from kedit_train.cli.edit import class_of
from kedit_train.cli.run_display import print_summary
from kedit_train.core.gate.adapter_folder import remove_stale_gate
from kedit_train.core.gate.adapter_source import check_not_gated
from kedit_train.data import EditDataset, split_documents
from kedit_train.data.chat_format import describe_format, read_format
from kedit_train.data.readers.documents import DOCUMENTS
from kedit_train.data.tokenization import context_length
from kedit_train.errors import EditError
from kedit_train.modules import EditDataModule, EditModule
from kedit_train.pretrained import check_new_adapter, load_model, lora_config
from kedit_train.processes import check_process_count, end_process_group
from kedit_train.trainers import EditSFTConfig, EditSFTTrainer

# The keys of Lightning's trainer that sft accepts. The model summary has no effect, because TRL never prints one.
READ = frozenset((
    "callbacks", "default_root_dir", "enable_model_summary", "accumulate_grad_batches", "gradient_clip_val",
    "log_every_n_steps", "max_epochs", "max_steps", "enable_progress_bar", "enable_checkpointing", "logger",
    "precision", "accelerator",
))  # fmt: skip
PRECISION: dict[str | None, dict[str, bool]] = {
    None: {},
    "32-true": {},
    "32": {},
    "bf16-mixed": {"bf16": True},
    "16-mixed": {"fp16": True},
}
# Keys that sft rejects, because the launcher decides the number of processes before any key is read.
COUNTS = ("devices", "num_nodes")
LOGGERS = {"WandbLogger": "wandb", "TensorBoardLogger": "tensorboard", "MLFlowLogger": "mlflow"}


def main(arguments: Sequence[str]) -> Any:
    """Run a recipe in ``EditSFTTrainer`` and return the trainer.

    Raises:
        EditError: no recipe is given. Without a recipe, the defaults would train all parameters for up to 1000 epochs.
    """
    config = recipe.parse(arguments)
    if not config.get("config"):
        raise EditError("sft: no recipe is given; add --config RECIPE.yaml (kedit ls lists the recipes).")
    trainer = build(config)
    check_process_count(trainer.args.world_size)
    if config.trainer.enable_progress_bar is not False:
        print_summary(trainer.callback_handler.callbacks)
    trainer.train()
    path = config.model.init_args.save_path
    if path is not None:
        trainer.save_model(path)
        if trainer.is_world_process_zero():
            remove_stale_gate(trainer.model, path)
        print(f"edited model: {path}")
    end_process_group()
    return trainer


def build(config: Namespace) -> EditSFTTrainer:
    """Return the trainer that the configuration of a recipe describes.

    Raises:
        EditError: TRL has no counterpart for a key of the recipe, the model is not an ``EditModule``, or the data
            module is not an ``EditDataModule``.
    """
    for key, own in (("model", EditModule), ("data", EditDataModule)):
        if class_of(config[key].class_path) is not own:
            raise EditError(
                f"sft: {key}.class_path must be {own.__name__}, got {config[key].class_path}, which runs in Lightning "
                'only; change this class in the recipe, or run the recipe with "lightning run".'
            )
    args, options = arguments_of(config), config.model.init_args
    # All arguments are checked before a large model is loaded.
    check_arguments("model", learning_rate=(options.learning_rate, at_least(0)))
    callbacks: list[Any] = list(recipe.callbacks(config))
    data = EditDataModule(**config.data.init_args.as_dict())
    check_not_gated(options.name)
    model, tokenizer = load_model(options.name, dtype=options.dtype, trust_remote_code=options.trust_remote_code)
    if options.lora is not None:
        check_new_adapter(model, options.name)
    if options.chat_template is not None:
        tokenizer.chat_template = options.chat_template
    if data.edits.format == DOCUMENTS.name:
        limits = [limit for limit in (args.max_length, context_length(model.config)) if limit]
        limit = min(limits, default=None)
        data.edits = split_documents(data.edits, tokenizer, limit, prompt_format=data.prompt_format)
    examples = data.edits
    if data.augmentation != AugmentationOptions():
        seed, prompt_format = args.seed, data.prompt_format
        augment = augmentation(
            model, tokenizer, data.edits, seed=seed, prompt_format=prompt_format, **vars(data.augmentation)
        )
        print(augment.summary)
        examples = EditDataset(augment.training_edits(data.edits), name=data.edits.name)
    if not any(isinstance(callback, EditMetrics) for callback in callbacks):
        callbacks.append(EditMetrics(data.edits, every_n_steps=0))
    return EditSFTTrainer(
        model,
        args=args,
        edits=data.edits,
        train_dataset=examples,
        processing_class=tokenizer,
        peft_config=None if options.lora is None else lora_config(options.lora),
        callbacks=callbacks,
    )


def arguments_of(config: Namespace) -> EditSFTConfig:
    """Convert the settings of a recipe to an ``EditSFTConfig``."""
    trainer, module, data = config.trainer, config.model.init_args, config.data.init_args
    usual = recipe.parser().get_defaults().trainer
    given: dict[str, Any] = {
        "output_dir": trainer.default_root_dir or "runs/sft",
        "seed": config.seed_everything if isinstance(config.seed_everything, int) else 0,
        "learning_rate": module.learning_rate,
        "per_device_train_batch_size": data.batch_size,
        "gradient_accumulation_steps": trainer.accumulate_grad_batches,
        "max_grad_norm": trainer.gradient_clip_val or 0.0,
        "logging_steps": trainer.log_every_n_steps or 50,
        "num_train_epochs": trainer.max_epochs or 1000,
        "max_steps": trainer.max_steps,
        "disable_tqdm": trainer.enable_progress_bar is False,
        "save_strategy": "epoch" if trainer.enable_checkpointing else "no",
        "report_to": _logger(trainer.logger),
        # TRL turns gradient checkpointing on by default.
        "gradient_checkpointing": module.gradient_checkpointing,
        **{"bf16": False, **_precision(trainer.precision)},
    }
    changed = [key for key in vars(usual) if key not in READ and trainer[key] != usual[key]]
    counts = [f"trainer.{key}" for key in changed if key in COUNTS]
    if counts:
        raise EditError(
            f"sft: {' and '.join(counts)} must not be set, because sft starts no processes; remove the setting and use "
            "a launcher: torchrun --nproc-per-node N -m kedit_train sft --config RECIPE.yaml"
        )
    unread = [key for key in ("optimizer", "lr_scheduler") if config.get(key)]
    unread += [f"trainer.{key}" for key in changed]
    if unread:
        raise EditError(
            f"sft: SFTTrainer has no counterpart for {', '.join(unread)}; remove these settings from the recipe, or "
            'run the recipe with "lightning run".'
        )
    use_cpu = trainer.accelerator == "cpu" or not torch.accelerator.is_available()
    return EditSFTConfig(
        prompt_format=describe_format(_format(data.prompt_format)),
        append_eos=data.append_eos,
        optim="adamw_torch",
        lr_scheduler_type="constant",
        weight_decay=0.0,
        dataloader_pin_memory=not use_cpu,
        # On a CPU, accelerate needs use_cpu=True to connect the processes of a launcher.
        use_cpu=use_cpu,
        **given,
    )


def _format(value: Any) -> Any:
    """Convert the value of ``prompt_format`` in a parsed recipe. A namespace becomes a ``ChatFormat``."""
    return read_format(value.as_dict() if isinstance(value, Namespace) else value)


def _precision(name: Any) -> dict[str, bool]:
    if name not in PRECISION:
        raise EditError(f"sft: trainer.precision must be 32-true, bf16-mixed or 16-mixed, got {name!r}.")
    return PRECISION[name]


def _logger(logger: Any) -> str:
    if logger in (None, False, True):
        return "none"
    name = logger.class_path.rpartition(".")[2] if hasattr(logger, "class_path") else str(logger)
    if name not in LOGGERS:
        raise EditError(f"sft: trainer.logger must be one of {', '.join(LOGGERS)}, got {name}.")
    return LOGGERS[name]
