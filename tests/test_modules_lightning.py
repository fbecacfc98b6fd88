"""EditModule and EditDataModule: batches, optimizer, saved files and errors."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import BertConfig, BertLMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from kedit_train.callbacks import EditMetrics, KLLocality, ParameterScope, SecondOrderLocality, TokenLoss
from kedit_train.errors import EditError
from kedit_train.modules import EditDataModule, EditModule
from kedit_train.pretrained import is_causal, load_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def trainer(**kwargs) -> L.Trainer:
    return L.Trainer(accelerator="cpu", devices=1, **{**QUIET, **kwargs})


class Recorder(L.Callback):
    """Keep every batch and the parameters of the optimizer."""

    def __init__(self) -> None:
        self.batches: list[list[dict]] = []

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.batches.append([])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.trained = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
        self.training = pl_module.model.training
        self.batches[-1].append(batch)


def test_every_epoch_has_every_edit_once_in_a_new_order() -> None:
    torch.set_num_threads(1)
    module, data, recorder = EditModule(learning_rate=1e-3), EditDataModule(limit=10, batch_size=4), Recorder()
    trainer(max_epochs=2, callbacks=[ParameterScope(layers=2, modules="mlp.down_proj"), recorder]).fit(module, data)
    tokenizer, epochs = module.tokenizer, []
    expected = {f"{edit.prompt} {edit.target}{tokenizer.eos_token}": edit.target for edit in data.edits}
    for batches in recorder.batches:
        assert [len(batch["labels"]) for batch in batches] == [4, 4, 2]
        seen = []
        for batch in batches:
            for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
                text = tokenizer.decode(ids[mask.bool()]).removeprefix(tokenizer.bos_token)
                seen.append(text)
                assert tokenizer.decode(labels[labels != -100]) == f" {expected[text]}{tokenizer.eos_token}"
        assert sorted(seen) == sorted(expected)
        epochs.append(seen)
    assert epochs[0] != epochs[1]
    assert recorder.training
    # The optimizer does not get frozen parameters.
    assert [id(p) for p in recorder.trained] == [id(module.model.get_parameter("model.layers.2.mlp.down_proj.weight"))]


def test_the_loss_is_that_of_the_model() -> None:
    module = EditModule()
    batch = {"input_ids": torch.tensor([[0, 9, 8, 7]]), "labels": torch.tensor([[-100, -100, 8, 7]])}
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    logits = module.model(input_ids=batch["input_ids"]).logits[0]
    expected = -(logits[1].log_softmax(-1)[8] + logits[2].log_softmax(-1)[7]) / 2
    torch.testing.assert_close(module.training_step(batch, 0), expected)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_with_shuffled_edits_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    torch.set_num_threads(1)

    def weight(*, seen: int = 0, resume: str | None = None) -> torch.Tensor:
        L.seed_everything(0, verbose=False)
        # A resumed process has drawn other random numbers before its first epoch.
        torch.rand(seen)
        module, data = EditModule(learning_rate=1e-3), EditDataModule(limit=10, batch_size=4)
        folder = tmp_path / ("resumed" if resume else "whole")
        saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=3, save_top_k=-1, filename="{step}")
        callbacks = [ParameterScope(layers=2, modules="mlp.down_proj"), saver]
        run = trainer(max_epochs=4, enable_checkpointing=True, callbacks=callbacks)
        run.fit(module, data, ckpt_path=resume)
        return module.model.get_parameter("model.layers.2.mlp.down_proj.weight").detach().clone()

    whole = weight()
    assert torch.equal(whole, weight(seen=5, resume=str(tmp_path / "whole" / "step=6.ckpt")))


def test_edit_metrics_uses_the_edits_of_the_data_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    metrics = EditMetrics(every_n_steps=0, report_path=str(report), show=False)
    module = EditModule(learning_rate=0.0, save_path=str(tmp_path / "model"))
    data = EditDataModule(limit=3, batch_size=3)
    trainer(max_epochs=1, callbacks=[metrics, ParameterScope(layers=0)]).fit(module, data)
    found = json.loads(report.read_text())
    assert [row["prompt"] for row in found["answers"] if row["question"] == "reliability"] == [
        edit.prompt for edit in data.edits
    ]
    assert "edited model: " in capsys.readouterr().out
    saved, _ = load_model(str(tmp_path / "model"))
    original, _ = load_model("world")
    for name, parameter in original.named_parameters():
        torch.testing.assert_close(saved.get_parameter(name), parameter, rtol=0, atol=0)


@pytest.mark.parametrize("shown", [True, False])
def test_a_run_without_a_terminal_prints_lines_of_progress(shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = [
        ParameterScope(0.7, modules="mlp.down_proj.weight"),
        TokenLoss(),
        SecondOrderLocality(["The sky is blue."]),
        KLLocality(["Grass is green."], batch_size=1),
        EditMetrics(every_n_steps=0, show=False),
    ]
    data = EditDataModule(limit=2, batch_size=2)
    trainer(max_epochs=20, callbacks=callbacks, enable_progress_bar=shown).fit(EditModule(), data)
    lines = capsys.readouterr().err.splitlines()
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert [line.split(",")[0] for line in epochs] == [f"epoch {n} of 20" for n in (1, *range(2, 21, 2)) if shown]
    assert all(", loss " in line for line in epochs)
    for expected in ("reading 1 texts", "statistics of 1 texts", "2 edits before", "2 edits after"):
        assert any(expected in line for line in lines) == shown


def test_edit_metrics_without_edits_is_an_error() -> None:
    class Bare(EditModule):
        def train_dataloader(self):
            return [{"input_ids": torch.tensor([[0, 9, 8]]), "labels": torch.tensor([[-100, 9, 8]])}]

    with pytest.raises(EditError, match="pass edits="):
        trainer(max_epochs=1, callbacks=[EditMetrics()]).fit(Bare())


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        module = EditModule(gradient_checkpointing=checkpointing)
        ids = torch.arange(3, 23).reshape(2, 10)
        for name, parameter in module.model.named_parameters():
            parameter.requires_grad_("layers.1.mlp" in name)
        module(input_ids=ids, labels=ids).loss.backward()
        gradients.append(module.model.get_parameter("model.layers.1.mlp.down_proj.weight").grad)
    assert gradients[0] is not None
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_weights_have_the_given_dtype() -> None:
    assert next(EditModule(dtype="bfloat16").model.parameters()).dtype == torch.bfloat16
    assert next(EditModule().model.parameters()).dtype == torch.float32


SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def test_causal_models_are_distinguished_from_encoders() -> None:
    assert is_causal(LlamaForCausalLM(LlamaConfig(**SMALL)))
    assert is_causal(GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)))
    assert not is_causal(BertLMHeadModel(BertConfig(**SMALL)))


def test_a_model_that_cannot_be_edited_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    LlamaForCausalLM(LlamaConfig(**SMALL)).model.save_pretrained(tmp_path / "headless")
    LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)).save_pretrained(tmp_path / "no_tokenizer")
    for name in ("cut", "mismatch"):
        LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path / name)
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    config = tmp_path / "mismatch" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 24}))
    for name, said in {
        "cut": "cannot be loaded .*: .*header",
        "mismatch": "cannot be loaded .*size",
        "nowhere": "no such folder",
        "empty": "cannot be loaded",
        "t5": "cannot be loaded",
        "headless": "no weights for lm_head.weight",
        "no_tokenizer": "has no tokenizer",
    }.items():
        with pytest.raises(EditError, match=said) as raised:
            load_model(str(tmp_path / name))
        assert "\n" not in str(raised.value)


def test_an_edit_longer_than_the_context_is_named(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "word " * 300, "target": "x"}) + "\n")
    with pytest.raises(EditError, match=r"long.jsonl, edit 1.*at most 256 tokens"):
        trainer(max_epochs=1).fit(EditModule(), EditDataModule(path=str(path)))


def test_a_module_without_tokenizer_is_an_error() -> None:
    class Plain(L.LightningModule):
        def training_step(self, batch, batch_idx):
            raise AssertionError

        def configure_optimizers(self):
            raise AssertionError

    with pytest.raises(EditError, match=r"^EditDataModule: .* attribute 'tokenizer' .* Plain has no such attribute"):
        trainer(max_epochs=1).fit(Plain(), EditDataModule(limit=2))


def test_a_folder_that_cannot_be_created_is_an_error_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    module = EditModule(save_path=str(tmp_path / "file" / "model"))
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(EditError, match=r"EditModule: save_path='.*' cannot be created \(.*\); choose another folder"):
        trainer.fit(module, EditDataModule("world", limit=2))
