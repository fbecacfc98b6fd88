"""Modules with the interfaces of Chronos-2, darts and neuralforecast, trained as these libraries train them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.utils.generic import ModelOutput

from kedit_train.callbacks import ForecastMetrics, OutputAnchor, SaveDelta

PAST, PATCH, LEVELS = 8, 4, [0.1, 0.5, 0.9]


def windows(n: int, seed: int) -> Tensor:
    return torch.randn(n, PAST, generator=torch.Generator().manual_seed(seed))


@dataclass
class QuantileOutput(ModelOutput):
    loss: Tensor | None = None
    quantile_preds: Tensor | None = None


class QuantileModel(PreTrainedModel):
    """Takes a context and a number of output patches, and returns quantiles [batch, levels, steps] and a loss."""

    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.patches = nn.Sequential(nn.Linear(PAST, 16), nn.Tanh(), nn.Linear(16, len(LEVELS) * PATCH))
        self.post_init()

    def forward(
        self, context: Tensor, num_output_patches: int = 1, future_target: Tensor | None = None
    ) -> QuantileOutput:
        patch = self.patches(context).view(-1, len(LEVELS), PATCH)
        forecast = torch.cat([patch] * num_output_patches, -1)
        loss = None
        if future_target is not None:
            above = future_target.unsqueeze(1) - forecast
            levels = torch.tensor(LEVELS).view(1, -1, 1)
            loss = torch.maximum(levels * above, (levels - 1) * above).mean(-1).sum(-1).mean()
        return QuantileOutput(loss=loss, quantile_preds=forecast)


class Batches(Dataset):
    """A dataset whose items are whole batches."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        past = windows(6, 100 + index)
        return {"context": past, "future_target": 3.0 + past[:, :1].expand(6, 2 * PATCH), "num_output_patches": 2}


class BatchTrainer(Trainer):
    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataset, batch_size=None)  # type: ignore[arg-type]


def fit(model: QuantileModel, folder: Path, callbacks: list[Any]) -> QuantileModel:
    """Train and return a copy of the model, like a pipeline whose ``fit`` returns a new pipeline."""
    tuned = QuantileModel(copy.deepcopy(model.config))
    tuned.load_state_dict(model.state_dict())
    arguments = TrainingArguments(
        str(folder), max_steps=150, learning_rate=3e-2, optim="adamw_torch_fused", use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, prediction_loss_only=True, save_only_model=True,
    )  # fmt: skip
    BatchTrainer(tuned, arguments, train_dataset=Batches(150), callbacks=callbacks).train()
    return tuned


def test_a_quantile_model_in_a_transformers_trainer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, kept = QuantileModel(PretrainedConfig()), windows(64, 1) + 4.0
    inputs = [{"context": rows, "num_output_patches": 2} for rows in kept.split(16)]
    past = windows(32, 2)
    found = []
    for anchors in ([], [OutputAnchor(inputs, distance="quantile", output="quantile_preds", weight=3.0, batch_size=4)]):
        metrics: Any = ForecastMetrics(
            (
                [{"context": past, "num_output_patches": 2}],
                [3.0 + past[:, :1].expand(32, 2 * PATCH)],
            ),
            kept=[{"context": windows(64, 3) + 4.0, "num_output_patches": 2}],
            error="quantile",
            quantiles=LEVELS,
            output=lambda output: output.quantile_preds.movedim(1, -1),
        )
        before = copy.deepcopy(model.state_dict())
        tuned = fit(model, tmp_path, [*anchors, metrics, SaveDelta(str(tmp_path / "edit.safetensors"))])
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        with torch.no_grad():
            now, old = (one(**inputs[0]).quantile_preds for one in (tuned, model))
        found.append((metrics.last_error, metrics.last_change, (now - old).abs().mean().item()))
        assert metrics.last_error < 0.5 * metrics.unedited_error
    (_, free, moved), (_, anchored, held) = found
    assert anchored < 0.5 * free
    assert held < 0.5 * moved


class TupleModule(pytorch_lightning.LightningModule):
    """Takes one tuple (past, static) and returns [batch, steps, components, parameters]."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.layers = form, nn.Sequential(nn.Linear(PAST, 16), nn.Tanh(), nn.Linear(16, PATCH))

    def forward(self, batch: Any) -> Tensor:
        past = batch[0] if self.form == "tuple" else batch["insample_y"]
        return self.layers(past.squeeze(-1))[..., None, None]

    def pack(self, past: Tensor) -> Any:
        past = past.unsqueeze(-1)
        return (past, None) if self.form == "tuple" else {"insample_y": past, "stat_exog": None}

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.mse_loss(self(self.pack(batch[0]))[..., 0, 0], batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_a_module_with_one_packed_argument_in_a_trainer_of_pytorch_lightning(form: str) -> None:
    past = windows(32, 2)
    targets = 2.0 + past[:, :1].expand(32, PATCH)
    found = []
    for weight in (None, 3.0):
        torch.manual_seed(0)
        module = TupleModule(form)
        kept = [(module.pack(rows),) for rows in (windows(64, 1) + 4.0).split(16)]
        metrics: Any = ForecastMetrics(
            ([(module.pack(past),)], [targets]),
            kept=[(module.pack(windows(64, 3) + 4.0),)],
            every_n_steps=50,
            output=lambda output: output[..., 0, 0],
        )
        callbacks: Any = [*([] if weight is None else [OutputAnchor(kept, weight=weight)]), metrics]
        trainer = pytorch_lightning.Trainer(
            max_steps=150, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, log_every_n_steps=1,
            callbacks=callbacks,
        )  # fmt: skip
        trainer.fit(module, DataLoader(TensorDataset(past, targets), batch_size=32))
        assert metrics.last_error < 0.3 * metrics.unedited_error
        assert float(trainer.callback_metrics["edit/forecast/change"]) == pytest.approx(metrics.last_change, rel=1e-5)
        found.append(metrics.last_change)
    assert found[1] < 0.5 * found[0]
