"""PolyakStep with a gradient scaler or gradient clipping: neither changes the steps. A skipped step leaves no trace."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from callbacks.inputs import WEIGHT, train_with_scaler
from callbacks.polyak_runs import callbacks

from kedit_train import EditCollator, EditDataset, world
from kedit_train.callbacks import ParameterScope, PolyakStep, TokenLoss, editing


class Module(L.LightningModule):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.model, self.tokenizer = world.load()

    def training_step(self, batch: Any, index: int) -> Any:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3, fused=self.fused)


def loader_for(module: Any) -> Any:
    examples = EditDataset.load("world", limit=8).encode(module.tokenizer, model=module.model)
    return torch.utils.data.DataLoader(examples, batch_size=8, collate_fn=EditCollator(module.tokenizer))


class ClipValues(L.Callback):
    """Collects the clip value that Lightning uses in each step."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.values.append(trainer.gradient_clip_val)


def callbacks_of_run() -> list[Any]:
    return [ParameterScope(0.7, modules="mlp.down_proj.weight"), TokenLoss("cross_entropy"), PolyakStep()]


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

    module = Module(fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    trainer = L.Trainer(
        max_epochs=8, callbacks=callbacks_of_run(), accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
    )  # fmt: skip
    trainer.fit(module, loader_for(module))
    assert scaler.get_scale() < 2.0**24
    assert all(bool(parameter.isfinite().all()) for parameter in module.model.parameters())


def test_lightning_does_not_clip_the_gradients():
    weights = []
    for clip in (None, 1e-3):
        torch.manual_seed(0)
        module, used = Module(fused=False), ClipValues()
        trainer = L.Trainer(
            max_epochs=2, callbacks=[*callbacks_of_run(), used], gradient_clip_val=clip, accelerator="cpu",
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module, loader_for(module))
        messages = [str(w.message) for w in caught if "gradient_clip_val" in str(w.message)]
        assert ["set gradient_clip_val=0 to avoid" in m for m in messages] == ([True] if clip else [])
        assert used.values == [None, None]
        # The argument of the trainer is as before.
        assert trainer.gradient_clip_val == clip
        weights.append({name: p.detach().clone() for name, p in module.model.named_parameters()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
