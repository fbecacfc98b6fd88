"""Augmentation, prompt formats and adapters in Lightning runs on the bundled world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from installed import older

from kedit_train import world
from kedit_train.augmentation import AugmentationOptions, augmentation
from kedit_train.callbacks import EditMetrics, KLLocality, ParameterScope, SaveDelta, StopWhenEdited, TokenSmoothing
from kedit_train.data import Edit, EditDataset
from kedit_train.delta import EditDelta
from kedit_train.errors import EditError
from kedit_train.evaluation import generate_answers
from kedit_train.evaluation.options import EvaluationOptions
from kedit_train.modules import EditDataModule, EditModule
from kedit_train.pretrained import load_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
LORA = {"r": 8, "lora_alpha": 32, "target_modules": ["down_proj", "q_proj"]}


def trainer(**kwargs: Any) -> L.Trainer:
    return L.Trainer(accelerator="cpu", devices=1, **{**QUIET, **kwargs})


class TextRecorder(L.Callback):
    """Keep the trained texts of an epoch: prompt with target, and the target alone."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.rows: list[tuple[str, str]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        decode = pl_module.tokenizer.decode
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            self.rows.append((decode(ids[mask.bool()]), decode(labels[labels != -100])))


def trained(data: EditDataModule, module: EditModule | None = None) -> list[tuple[str, str]]:
    texts = TextRecorder()
    module = EditModule(learning_rate=0.0) if module is None else module
    trainer(max_epochs=1, callbacks=[texts]).fit(module, data)
    return sorted(texts.rows)


def plain(rows: list[Edit]) -> list[tuple[str, str]]:
    return sorted((f"<bos>{row.prompt} {row.target}<eos>", f" {row.target}<eos>") for row in rows)


def named(rows: list[Edit]) -> list[tuple[str, str]]:
    tokenizer = world.load()[1]
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    return sorted((a.replace("<bos>", bos).replace("<eos>", eos), b.replace("<eos>", eos)) for a, b in plain(rows))


def test_augmentation_adds_examples_to_the_edits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    earlier = EditDataset(world.edits(6, seed=9)[4:]).save(tmp_path / "earlier.jsonl")
    options: dict[str, Any] = {"prefixes": 2, "replay": "world", "replay_limit": 5, "previous_edits": str(earlier)}
    L.seed_everything(7, verbose=False)
    data = EditDataModule(limit=4, batch_size=8, augmentation=AugmentationOptions(**options))
    rows = trained(data)
    edits = list(data.edits)
    made = augmentation(*world.load(), edits, seed=7, **options)
    assert rows == named([*edits, *made(edits)])
    assert len(rows) == 4 + 4 * 2 + 5 + 2
    assert [row for row in data.added if row.id.startswith("earlier")] != []
    line = capsys.readouterr().out
    assert made.summary in line
    L.seed_everything(8, verbose=False)
    assert trained(EditDataModule(limit=4, batch_size=8, augmentation=AugmentationOptions(**options))) != rows
    # Only the edits are evaluated, and a second setup, with an edited model, makes no new examples.
    assert data.edits.hash == EditDataset(world.edits()[:4]).hash
    kept = list(data.added)
    data.setup("validate")
    assert data.added == kept


def test_prompt_formats_are_trained_and_evaluated() -> None:
    data = EditDataModule(limit=3, batch_size=3, prompt_format="question")
    rows = trained(data)
    assert all("Please answer the question.\nQ: How does this sentence end?" in text for text, _ in rows)
    assert sorted(target for _, target in rows) == sorted(t for _, t in named(list(data.edits)))
    metrics = EditMetrics(every_n_steps=0, show=False, evaluation=EvaluationOptions(prompt_format="question"))
    module = EditModule(learning_rate=3e-3)
    trainer(max_epochs=40, callbacks=[ParameterScope(modules="*"), metrics]).fit(module, data)
    assert metrics.report is not None
    assert metrics.report.meta["settings"]["prompt_format"] == "question"
    assert metrics.report.flat()["edit/reliability"] == 1.0
    said = generate_answers(module.model, module.tokenizer, [e.prompt for e in data.edits], prompt_format="question")
    assert [a.text for a in said] == [e.target for e in data.edits]
    with pytest.raises(EditError, match="needs a chat template"):
        trained(EditDataModule(limit=2, prompt_format="chat"))
    with pytest.raises(EditError, match=r"must be .*, got 'quiz'"):
        EditDataModule(limit=2, prompt_format="quiz")  # type: ignore[arg-type]
    with pytest.raises(EditError, match=r"must be .*, got 'quiz'"):
        EvaluationOptions(prompt_format="quiz")  # type: ignore[arg-type]


def test_an_adapter_learns_the_edits_and_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    # Fewer texts than usual, because their reference hidden states take seconds.
    monkeypatch.setattr(world.locality_texts, "__defaults__", (256, 0))
    folder = tmp_path / "adapter"
    L.seed_everything(0, verbose=False)
    module = EditModule(learning_rate=5e-3, lora=LORA, save_path=str(folder))
    assert {n.split(".")[-3] for n, p in module.model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    metrics = EditMetrics(every_n_steps=10, show=False)
    callbacks = [
        TokenSmoothing(),
        KLLocality(texts="world", weight=0.1, batch_size=8),
        metrics,
        StopWhenEdited(loss=None, reliability=1.0),
        SaveDelta(str(tmp_path / "edit.safetensors")),
    ]
    data = EditDataModule(limit=6, batch_size=6)
    trainer(max_epochs=80, callbacks=callbacks).fit(module, data)
    assert metrics.report is not None
    assert metrics.report.flat()["edit/reliability"] == 1.0
    assert f"adapter: {folder}" in capsys.readouterr().out
    prompts = [edit.prompt for edit in data.edits]
    wanted = [edit.target for edit in data.edits]
    base, tokenizer = load_model("world")
    loaded = PeftModel.from_pretrained(base, str(folder))
    assert [a.text for a in generate_answers(loaded, tokenizer, prompts)] == wanted
    own = dict(module.model.named_parameters())
    assert all(torch.equal(p, own[name]) for name, p in loaded.named_parameters())
    plain_base, _ = load_model("world")
    EditDelta.load(tmp_path / "edit.safetensors").apply(plain_base)
    assert [a.text for a in generate_answers(plain_base, tokenizer, prompts)] == wanted


def test_a_scope_restricts_the_adapter() -> None:
    module = EditModule(learning_rate=1e-2, lora=LORA)
    before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    callbacks = [ParameterScope(layers=2, modules="mlp.down_proj")]
    data = EditDataModule(limit=4, batch_size=4, augmentation=AugmentationOptions(prefixes=1))
    trainer(max_epochs=2, callbacks=callbacks).fit(module, data)
    moved = {n for n, p in module.model.named_parameters() if not torch.equal(p, before[n])}
    assert {n.split("layers.")[1].rsplit(".lora_")[0] for n in moved} == {"2.mlp.down_proj"}
    assert len(moved) == 2


def test_an_error_of_peft_is_one_line() -> None:
    for lora, said in (
        ({"rank": 8}, r"LoraConfig of peft has no argument 'rank'"),
        ({"target_modules": ["nowhere"]}, r"not accepted by peft: .*nowhere"),
        ({"r": 0, "target_modules": ["q_proj"]}, r"not accepted by peft"),
    ):
        with pytest.raises(EditError, match=said) as raised:
            EditModule(lora=lora)
        assert "\n" not in str(raised.value)


def test_a_resumed_run_has_the_examples_of_its_first_part(tmp_path: Path) -> None:
    augment = AugmentationOptions(prefixes=2, replay="world", replay_limit=8)
    options: dict[str, Any] = {"limit": 4, "batch_size": 4, "augmentation": augment}
    L.seed_everything(1, verbose=False)
    data, module = EditDataModule(**options), EditModule(learning_rate=3e-2)
    run = trainer(max_epochs=3)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "run.ckpt")
    # The edited model would generate other examples.
    assert augmentation(module.model, module.tokenizer, data.edits, seed=1, **vars(augment))(data.edits) != data.added
    L.seed_everything(1, verbose=False)
    again = EditDataModule(**options)
    # Older versions of Lightning read the whole checkpoint without this argument.
    reading: dict[str, Any] = {} if older("lightning", "2.6") else {"weights_only": False}
    trainer(max_epochs=4).fit(EditModule(learning_rate=3e-2), again, ckpt_path=tmp_path / "run.ckpt", **reading)
    assert again.added == data.added


def test_augmentation_without_a_model_is_an_error() -> None:
    class Bare(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = world.load()[1]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise AssertionError

        def configure_optimizers(self) -> Any:
            raise AssertionError

    with pytest.raises(
        EditError, match=r"^EditDataModule: augmentation needs a language model, but Bare\.model is not a torch\.nn"
    ):
        trainer(max_epochs=1).fit(Bare(), EditDataModule(limit=2, augmentation=AugmentationOptions(prefixes=1)))


def test_a_file_and_the_world_are_read_completely_without_a_limit(tmp_path: Path) -> None:
    """A recipe sets no limit, so that a file in the place of the world is not cut."""
    path = tmp_path / "edits.jsonl"
    EditDataset([Edit(f"{number} is the number of", "apples") for number in range(40)]).save(path)
    assert len(EditDataModule(str(path)).edits) == 40
    assert len(EditDataModule(str(path), limit=30).edits) == 30
    assert len(EditDataModule().edits) == 24
    assert list(EditDataModule(limit=4).edits) == list(EditDataModule().edits[:4])


@pytest.mark.parametrize(
    ("rate", "expected"), [(-1.0, ">= 0"), (float("nan"), ">= 0"), (float("inf"), "finite and >= 0")]
)
def test_a_learning_rate_below_zero_is_an_error(rate: float, expected: str) -> None:
    with pytest.raises(EditError, match=f"^EditModule: learning_rate must be {expected}, got "):
        EditModule(name="nowhere", learning_rate=rate)
