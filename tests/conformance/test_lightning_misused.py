"""Unusual uses of a Lightning trainer: a second fit, other losses, averaged weights, and late changes of weights."""

from __future__ import annotations

import re
from typing import Any

import lightning as L
import pytest
import torch
from installed import needs
from lightning.pytorch import callbacks as lightning_callbacks
from torch import nn

from kedit_train.callbacks import GradientMask, NormBall, ParameterScope, WeightAnchor
from kedit_train.errors import EditError

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec")


class Module(L.LightningModule):
    def __init__(self, *, root: bool = False, manual: bool = False) -> None:
        super().__init__()
        self.net, self.root = nn.Linear(4, 4), root
        self.automatic_optimization = not manual

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        loss = self.net(batch).square().mean()
        loss = loss.sqrt() if self.root else loss
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: Module, callbacks: list[Any], epochs: int = 1) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    made = L.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=callbacks, enable_model_summary=False, **quiet)
    made.fit(module, data())
    return made


def data() -> Any:
    return torch.utils.data.DataLoader(torch.ones(4, 4), batch_size=2)


def test_two_balls_in_lightning():
    module = Module()
    before = module.net.weight.detach().clone()
    fit(module, [NormBall(1e-3), NormBall(1e-3, norm="l2")])
    assert float((module.net.weight.detach() - before).norm()) <= 1e-3


def test_a_second_fit_of_a_lightning_trainer_begins_a_new_edit():
    module, ball = Module(), NormBall(1e-3, anchor="previous")
    made = fit(module, [ball])
    before = module.net.weight.detach().clone()
    made.fit_loop.max_epochs = 2
    made.fit(module, data())
    moved = float((module.net.weight.detach() - before).abs().max())
    assert 0.0 < moved <= 1e-3


def test_a_loss_that_cannot_be_changed_in_place_is_an_error():
    anchor = WeightAnchor(strength=0.1, decoupled=False)
    with pytest.raises(EditError, match=r"Sqrt.*loss \* 1.0"):
        fit(Module(root=True, manual=True), [anchor])


@needs("lightning", "2.6")
def test_weight_averaging_is_an_error():
    with pytest.raises(EditError, match="WeightAveraging"):
        fit(Module(), [GradientMask("random", density=0.5), lightning_callbacks.EMAWeightAveraging()])


AFTER_THE_END = r"has changed {} after the edit had ended.*put this callback before the callbacks of kedit_train"


@pytest.mark.parametrize("event", ["on_train_end", "on_fit_end", "module.on_train_end"])
@pytest.mark.parametrize("name", ["net.weight", "net.bias"])
def test_code_that_writes_weights_at_the_end_of_a_lightning_fit_is_one_warning(event, name):
    module, writer = Module(), L.Callback()
    holder = module if "module" in event else writer
    setattr(holder, event.split(".")[-1], lambda *_: module.get_parameter(name).data.add_(1.0))
    with pytest.warns(UserWarning, match=AFTER_THE_END.format(re.escape(name))) as found:
        fit(module, [ParameterScope(modules="*.weight"), NormBall(1e-3), writer])
    assert len([w for w in found if "after the edit" in str(w.message)]) == 1
