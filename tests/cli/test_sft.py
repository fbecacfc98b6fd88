"""A recipe in TRL: the same run as the one written by hand, and what TRL cannot do is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from kedit_train import world
from kedit_train.callbacks import EditMetrics, ParameterScope, StopWhenEdited, TokenSmoothing
from kedit_train.cli import recipe, sft
from kedit_train.data import EditDataset
from kedit_train.errors import EditError

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
SHORT = ("--trainer.max_epochs=3", "--data.limit=6", "--data.batch_size=4", "--model.learning_rate=0.002")


def configured(name: str, *arguments: str) -> Any:
    return recipe.load(name, *SHORT, *arguments)


def test_equals_the_trainer_written_by_hand(tmp_path: Path) -> None:
    config = configured("overtone", f"--trainer.default_root_dir={tmp_path}")
    config.trainer.callbacks[-1].init_args.report = None
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
            StopWhenEdited(None, idle_steps=2),
            EditMetrics(edits, every_n_steps=0, show=False),
        ],
    )
    own.train()
    moved = False
    for (name, a), (_, b) in zip(ours.model.named_parameters(), own.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        moved |= not torch.equal(a.cpu(), dict(world.load()[0].named_parameters())[name])
    assert moved


def test_texts_of_ones_own_stand_once_in_the_configuration_that_runs_again(tmp_path: Path) -> None:
    config = recipe.load("kedit_default", "--model.name=mine", "--data.path=edits.jsonl", "--data.texts=mine.txt")
    resolved = tmp_path / "resolved.yaml"
    recipe.parser().save(config, str(resolved), skip_check=True)
    again = recipe.parse(["--config", str(resolved)])
    for one in (config, again):
        assert [c.init_args.texts for c in one.trainer.callbacks if "texts" in c.init_args][:1] == ["mine.txt"]
        assert one.data.init_args.texts is None


def test_nothing_is_run_without_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft, "build", lambda config: pytest.fail("a trainer was built"))
    with pytest.raises(EditError, match=r"give --config RECIPE.yaml; kedit ls lists them"):
        sft.main(["--data.limit=2"])


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning", "ignore:.is_gradient_check:FutureWarning")
@pytest.mark.parametrize("wanted", [False, True])
def test_activations_are_recomputed_where_the_recipe_says_so_and_nowhere_else(wanted: bool, tmp_path: Path) -> None:
    config = configured("ft_m", f"--trainer.default_root_dir={tmp_path}", f"--model.gradient_checkpointing={wanted}")
    config.trainer.callbacks[-1].init_args.report = None
    trainer = sft.build(config)
    trainer.train()
    assert trainer.model.is_gradient_checkpointing == wanted


@pytest.mark.parametrize("name", ["replay", "overtone_lora", "chat"])
def test_what_a_recipe_asks_of_module_and_data_is_done(name: str, tmp_path: Path) -> None:
    options = [f"--trainer.default_root_dir={tmp_path}", "--trainer.max_epochs=1"]
    options += ["--data.augmentation.replay_limit=5", "--data.augmentation.prefixes=2"] if name == "replay" else []
    config = configured(name, *options)
    config.trainer.callbacks[-1].init_args.report = None
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


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--optimizer=torch.optim.SGD", "--optimizer.lr=1e-9"), "what optimizer asks for"),
        (("--lr_scheduler=torch.optim.lr_scheduler.ConstantLR",), "what lr_scheduler asks for"),
        (("--model.learning_rate=-1",), "model: learning_rate must be >= 0, got -1.0"),
        (("--trainer.devices=2",), "leave it out.*: torchrun --nproc-per-node N -m kedit_train sft"),
        (
            ("--trainer.gradient_clip_algorithm=norm",),
            "nothing that does what trainer.gradient_clip_algorithm",
        ),
        (("--data.append_eos=false",), "what data.append_eos=false asks for"),
        (("--trainer.precision=16-true",), "trainer.precision='16-true' is Lightning's own"),
        (("--trainer.logger=CSVLogger", "--trainer.logger.save_dir=x"), "trainer.logger=CSVLogger is Lightning's own"),
        (("--trainer.callbacks+=lightning.pytorch.callbacks.Timer",), "Timer is Lightning's own"),
    ],
)
def test_what_trl_has_no_counterpart_for_is_refused(arguments: tuple[str, ...], told: str) -> None:
    with pytest.raises(EditError) as error:
        sft.build(configured("overtone", *arguments))
    assert re.search(told, str(error.value)), error.value
    assert "\n" not in str(error.value)
