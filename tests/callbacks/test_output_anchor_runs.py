"""OutputAnchor in training runs: accumulation, resumed runs, Lightning and transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from callbacks.forecaster import KEPT, NEW, assert_same_bits, descend, made, parameters
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

from kedit_train.callbacks import OutputAnchor, ParameterScope, editing
from kedit_train.errors import EditError


def test_gradient_accumulation_adds_the_penalty_once():
    results = []
    for parts in (1, 4):
        model = made()
        with editing(model, [OutputAnchor(KEPT, weight=4.0, batch_size=2)]) as edit:
            optimizer = torch.optim.SGD(edit.parameters(), lr=0.1)
            model.eval()
            for _ in range(3):
                optimizer.zero_grad()
                edit.before_step()
                for past, future in zip(NEW[0].chunk(parts), NEW[1].chunk(parts), strict=True):
                    ((model(past) - future).square().mean() / parts).backward()
                optimizer.step()
        results.append(parameters(model))
    for name, whole in results[0].items():
        torch.testing.assert_close(results[1][name], whole, rtol=1e-5, atol=1e-6)


def test_a_resumed_loop_ends_with_the_same_weights_bit_for_bit():
    def anchor() -> list[Any]:
        return [OutputAnchor(KEPT, weight=2.0, batch_size=2)]

    whole, parts = made(), made()
    descend(whole, anchor(), 9)
    _, state = descend(parts, anchor(), 4)
    saved = copy.deepcopy(parts)
    descend(parts, anchor(), 5, state=state)
    assert_same_bits(parameters(whole), parameters(parts))
    other = [OutputAnchor(KEPT[1:], weight=2.0, batch_size=2)]
    with pytest.raises(EditError, match="OutputAnchor: the checkpoint was written with other inputs"):
        descend(saved, other, 1, state=state)


class Module(L.LightningModule):
    """A LightningModule without a forward method, as many projects have."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.mse_loss(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def lightning(network: Any, callbacks: list[Any], steps: int, **options: Any) -> None:
    checkpoint = options.pop("ckpt_path", None)
    settings: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    settings |= {"enable_checkpointing": False, "enable_model_summary": False, "log_every_n_steps": 1}
    trainer = L.Trainer(max_steps=steps, callbacks=callbacks, **(settings | options))
    module = Module(network)
    network.dropout.p = 0.0
    trainer.fit(module, DataLoader(TensorDataset(*NEW), batch_size=8), ckpt_path=checkpoint)


def transformers(network: Any, callbacks: list[Any], steps: int, folder: Path) -> None:
    arguments = TrainingArguments(
        str(folder), max_steps=steps, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", use_cpu=True,
        per_device_train_batch_size=8, report_to=[], disable_tqdm=True, save_strategy="no", max_grad_norm=0.0,
    )  # fmt: skip
    network.dropout.p = 0.0
    rows = [{"windows": past, "targets": future} for past, future in zip(*NEW, strict=True)]
    Trainer(network, arguments, train_dataset=rows, callbacks=callbacks).train()  # type: ignore[arg-type]


def test_lightning_and_transformers_end_with_the_weights_of_a_plain_loop(tmp_path: Path):
    results = []
    for host in ("loop", "Lightning", "Trainer"):
        model = made(output="object" if host == "Trainer" else "tensor")
        anchor = OutputAnchor(
            KEPT,
            weight=3.0,
            batch_size=2,
            output="forecast" if host == "Trainer" else None,
            module="network" if host == "Lightning" else None,
        )
        if host == "loop":
            descend(model, [anchor], 5)
        elif host == "Lightning":
            lightning(model, [anchor], 5)
        else:
            transformers(model, [anchor], 5, tmp_path)
        results.append(parameters(model))
    plain = made()
    descend(plain, [ParameterScope(modules="*")], 5)
    for name, expected in results[0].items():
        for found in results[1:]:
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(plain.get_parameter(name), expected, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_lightning_run_needs_no_copy_of_the_weights(tmp_path: Path):
    def anchor() -> OutputAnchor:
        return OutputAnchor(KEPT, weight=3.0, batch_size=2, module="network")

    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")

    whole, resumed = made(), made(seed=9)
    lightning(whole, [anchor(), saver()], 6, enable_checkpointing=True)
    checkpoint = str(tmp_path / "step=3.ckpt")
    lightning(resumed, [anchor(), saver()], 6, enable_checkpointing=True, ckpt_path=checkpoint)
    assert_same_bits(parameters(whole), parameters(resumed))
