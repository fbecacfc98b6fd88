"""Recipes in TRL equal a trainer set up by hand, and keys without a counterpart are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from kedit_train import ChatFormat, world
from kedit_train.callbacks import EditMetrics, ParameterScope, StopWhenEdited, TokenSmoothing
from kedit_train.cli import recipe, sft
from kedit_train.data import EditDataset
from kedit_train.errors import EditError

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
SHORT = ("--trainer.max_epochs=3", "--data.limit=6", "--data.batch_size=4", "--model.learning_rate=0.002")


def configured(name: str, *arguments: str) -> Any:
    return recipe.load(name, *SHORT, *arguments)


@pytest.mark.slow
def test_a_recipe_equals_a_trainer_set_up_by_hand(tmp_path: Path) -> None:
    config = configured("overtone", f"--trainer.default_root_dir={tmp_path}")
    config.trainer.callbacks[-1].init_args.report_path = None
    ours = sft.build(config)
    ours.train()
    model, tokenizer = world.load()
    edits = EditDataset.load("world", limit=6)
    own = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=SFTConfig(
            str(tmp_path),
            num_train_epochs=3,
            learning_rate=0.002,
            per_device_train_batch_size=4,
            optim="adamw_torch",
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=0.0,
            bf16=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_steps=4,
            report_to="none",
            seed=0,
        ),
        train_dataset=edits.to_prompt_completion(),
        callbacks=[
            ParameterScope(0.66, modules="mlp.down_proj"),
            TokenSmoothing(label_weight=0.1, epsilon=0.01, n_sigma=0.5, reduction="sample"),
            StopWhenEdited(loss=None, idle_steps=2),
            EditMetrics(edits, every_n_steps=0, show=False),
        ],
    )
    own.train()
    moved = False
    for (name, a), (_, b) in zip(ours.model.named_parameters(), own.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        moved |= not torch.equal(a.cpu(), dict(world.load()[0].named_parameters())[name])
    assert moved


def test_documents_are_split_to_the_context_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "news").mkdir()
    (tmp_path / "news" / "long.txt").write_text("Ada lives in Bern. " * 80)
    config = recipe.load("ft_m", f"--data.path={tmp_path / 'news'}", f"--trainer.default_root_dir={tmp_path}")
    with pytest.warns(UserWarning, match="1 of 1 edits of news have more than 256 tokens and were split"):
        trainer = sft.build(config)
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]  # type: ignore[attr-defined]
    assert len(lengths) > 2
    assert max(lengths) <= 256
    assert len(trainer.args.trained_edits) == len(lengths)  # type: ignore[attr-defined]


def test_the_resolved_configuration_names_texts_once(tmp_path: Path) -> None:
    config = recipe.load("kedit_default", "--model.name=mine", "--data.path=edits.jsonl", "--data.texts=mine.txt")
    resolved = tmp_path / "resolved.yaml"
    recipe.parser().save(config, str(resolved), skip_check=True)
    again = recipe.parse(["--config", str(resolved)])
    for one in (config, again):
        assert [c.init_args.texts for c in one.trainer.callbacks if "texts" in c.init_args][:1] == ["mine.txt"]
        assert one.data.init_args.texts is None


def test_a_recipe_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft, "build", lambda config: pytest.fail("a trainer was built"))
    with pytest.raises(EditError, match=r"add --config RECIPE.yaml"):
        sft.main(["--data.limit=2"])


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning", "ignore:.is_gradient_check:FutureWarning")
@pytest.mark.parametrize("wanted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradient_checkpointing_follows_the_recipe(wanted: bool, tmp_path: Path) -> None:
    config = configured("ft_m", f"--trainer.default_root_dir={tmp_path}", f"--model.gradient_checkpointing={wanted}")
    config.trainer.callbacks[-1].init_args.report_path = None
    trainer = sft.build(config)
    trainer.train()
    assert trainer.model.is_gradient_checkpointing == wanted


@pytest.mark.parametrize("name", ["replay", pytest.param("overtone_lora", marks=pytest.mark.slow), "chat"])
def test_settings_of_module_and_data_are_used(name: str, tmp_path: Path) -> None:
    options = [f"--trainer.default_root_dir={tmp_path}", "--trainer.max_epochs=1"]
    options += ["--data.augmentation.replay_limit=5", "--data.augmentation.prefixes=2"] if name == "replay" else []
    options += ["--trainer.callbacks.SecondOrderLocality.limit=16"] if name == "chat" else []
    config = configured(name, *options)
    config.trainer.callbacks[-1].init_args.report_path = None
    trainer = sft.build(config)
    rows = trainer.train_dataset
    assert len(rows) == (6 + 12 + 5 if name == "replay" else 6)
    if name == "chat":
        first = trainer.processing_class.decode(rows[0]["input_ids"])
        assert " Answer: " in first
        assert first.endswith(trainer.processing_class.eos_token)
    if name == "overtone_lora":
        assert trainer.model.peft_config["default"].r == 8
    trainer.train()


def test_end_of_text_and_system_prompt_follow_the_recipe(tmp_path: Path) -> None:
    options = [f"--trainer.default_root_dir={tmp_path}", "--data.append_eos=false", "--data.prompt_format.system=Hi"]
    trainer = sft.build(configured("chat", *options))
    assert trainer.args.prompt_format == {"system": "Hi", "history": [], "thinking": False}
    chat = ChatFormat(system="Hi")
    edits = EditDataset.load("world", limit=6)
    rows = edits.to_tokens(trainer.processing_class, append_eos=False, prompt_format=chat)
    assert trainer.train_dataset["input_ids"] == rows["input_ids"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--optimizer=torch.optim.SGD", "--optimizer.lr=1e-9"), "no counterpart for optimizer"),
        (("--lr_scheduler=torch.optim.lr_scheduler.ConstantLR",), "no counterpart for lr_scheduler"),
        (("--model.learning_rate=-1",), "model: learning_rate must be >= 0, got -1.0"),
        (("--trainer.devices=2",), "use a launcher: torchrun --nproc-per-node N -m kedit_train sft"),
        (
            ("--trainer.gradient_clip_algorithm=norm",),
            "no counterpart for trainer.gradient_clip_algorithm",
        ),
        (("--trainer.precision=16-true",), "trainer.precision must be .* got '16-true'"),
        (
            ("--trainer.logger=CSVLogger", "--trainer.logger.save_dir=x"),
            "must be one of .* got CSVLogger",
        ),
        (("--trainer.callbacks+=lightning.pytorch.callbacks.Timer",), "Timer runs in Lightning only"),
    ],
)
def test_keys_without_a_counterpart_in_trl_are_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(EditError) as error:
        sft.build(configured("overtone", *arguments))
    assert re.search(message, str(error.value)), error.value
    assert "\n" not in str(error.value)
