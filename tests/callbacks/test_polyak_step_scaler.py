"""PolyakStep with a gradient scaler: the scale does not change the steps, and a skipped step leaves no trace."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from callbacks.inputs import WEIGHT, train_with_scaler
from callbacks.polyak_runs import callbacks

from kedit_train import EditCollator, EditDataset, world
from kedit_train.callbacks import ParameterScope, PolyakStep, TokenLoss, editing


@pytest.mark.parametrize("fused", [False, True])
# A scale below 1 makes the gradients smaller than those of the loss.
@pytest.mark.parametrize("scale", [2.0**10, 2.0**-10])
def test_a_gradient_scaler_does_not_change_the_steps(make, words, ids, fused, scale):
    weights = []
    for init_scale in (None, scale):
        torch.manual_seed(0)
        model = make("llama")
        scaler = torch.amp.GradScaler("cpu", init_scale=init_scale or 1.0, enabled=init_scale is not None)
        with editing(model, callbacks(PolyakStep()), tokenizer=words) as edit:
            train_with_scaler(model, edit, ids, scaler, fused=fused)
        weights.append(model.get_parameter(WEIGHT["llama"]).detach().clone())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_gradient_scaler_skips_leaves_no_trace(make, words, ids, fused, value):
    weights = []
    for factors in ((1.0, 1.0, 1.0), (1.0, value, 1.0, 1.0)):
        torch.manual_seed(0)
        model = make("llama")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        with editing(model, callbacks(PolyakStep()), tokenizer=words) as edit:
            train_with_scaler(model, edit, ids, scaler, fused=fused, factors=factors)
            assert edit.run.step == 3
        weights.append(model.get_parameter(WEIGHT["llama"]).detach().clone())
    # After the skipped step, the scale is smaller.
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
def test_lightning_lowers_the_scale_until_the_gradients_are_finite(fused):
    from lightning.pytorch.plugins import MixedPrecision

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.tokenizer = world.load()

        def training_step(self, batch: Any, index: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-3, fused=fused)

    module = Module()
    examples = EditDataset.load("world", limit=8).encode(module.tokenizer, model=module.model)
    loader = torch.utils.data.DataLoader(examples, batch_size=8, collate_fn=EditCollator(module.tokenizer))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    made = [ParameterScope(0.7, modules="mlp.down_proj.weight"), TokenLoss("cross_entropy"), PolyakStep()]
    trainer = L.Trainer(
        max_epochs=8, callbacks=made, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
    )  # fmt: skip
    trainer.fit(module, loader)
    assert scaler.get_scale() < 2.0**24
    assert all(bool(parameter.isfinite().all()) for parameter in module.model.parameters())
