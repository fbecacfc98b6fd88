"""Resuming from checkpoints that are incomplete, missing, or of another adapter."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from conformance.hosts import ARGUMENTS
from core.small_loop import model
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from kedit_train import world
from kedit_train.callbacks import KLLocality, NormBall, ParameterScope, TokenLoss, editing
from kedit_train.callbacks.hosts import transformers_host
from kedit_train.callbacks.hosts.transformers_host import TransformersHost
from kedit_train.core.state_file import save_state
from kedit_train.errors import EditError

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def trainer(net: Any, folder: Path, callbacks: list[Any]) -> Trainer:
    return Trainer(model=net, args=TrainingArguments(str(folder), **ARGUMENTS), callbacks=callbacks)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_checkpoint_without_random_states_or_optimizer_is_a_warning(
    processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_host, "load_stacked_experts", lambda *_: None)
    args = SimpleNamespace(save_only_model=False, world_size=processes, process_index=0, gradient_checkpointing=False)
    host = TransformersHost(args, SimpleNamespace(is_world_process_zero=True), None, None)
    rng = "rng_state_0.pth" if processes > 1 else "rng_state.pth"
    for name in ("optimizer.pt", "scheduler.pt", rng):
        (tmp_path / name).touch()
    host.check_checkpoint(None, str(tmp_path))
    (tmp_path / rng).unlink()
    with pytest.warns(UserWarning, match=rf"has no random state \({rng}\), so the final weights") as found:
        host.check_checkpoint(None, str(tmp_path))
    assert "\n" not in str(found[0].message)
    for name in ("optimizer.pt", "scheduler.pt"):
        (tmp_path / name).unlink()
    args.save_only_model = True
    with pytest.warns(UserWarning, match=r"no optimizer state .* and no scheduler state .* and no random state"):
        host.check_checkpoint(None, str(tmp_path))


def test_resuming_without_a_checkpoint_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    net = world.load()[0]
    made = trainer(net, tmp_path / "nothing", [ParameterScope(3), NormBall(1e-3)])
    assert not all(p.requires_grad for p in net.parameters())
    for _ in range(2):
        with pytest.raises(ValueError, match="No valid checkpoint found"):
            made.train(resume_from_checkpoint=True)
        assert all(p.requires_grad for p in net.parameters())
        assert "_kedit_run" not in net.__dict__
    # The next training sets the scope up again before its optimizer is created.
    made.__dict__["_load_from_checkpoint"].join_again()
    assert not all(p.requires_grad for p in net.parameters())


def lora(rank: int) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(world.load()[0], peft.LoraConfig(r=rank, target_modules=["down_proj"]))


def test_an_adapter_of_another_rank_is_one_line(tmp_path: Path) -> None:
    with editing(lora(2), [ParameterScope(modules="lora_*"), NormBall(1e-3)]) as edit:
        edit.before_step()
        save_state(tmp_path, edit.state_dict())
    made = trainer(lora(4), tmp_path, [ParameterScope(modules="lora_*"), NormBall(1e-3)])
    with pytest.raises(
        EditError, match=r"lora_A.* of shape \(2, 352\), but in the model it has shape \(4, 352\)"
    ) as error:
        made.train(resume_from_checkpoint=str(tmp_path))
    assert "\n" not in str(error.value)


class Module(L.LightningModule):
    """A module that leaves out the second batch."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.net, self.width = model(), width
        self.adapter = torch.nn.Linear(3, width)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor | None:
        return None if index == 1 else self.adapter(self.net(batch)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(module: Any, callbacks: list[Any], batches: Any, **options: Any) -> L.Trainer:
    made = L.Trainer(accelerator="cpu", max_epochs=1, callbacks=callbacks, enable_model_summary=False, **QUIET)
    made.fit(module, DataLoader(batches, batch_size=None), **options)
    return made


def test_weights_of_another_shape_are_one_line_in_lightning(tmp_path: Path) -> None:
    made = fit(Module(), [NormBall(1e-3)], torch.ones(1, 2, 4))
    made.save_checkpoint(tmp_path / "a.ckpt")
    other = Module(width=5)
    with pytest.raises(
        EditError, match=r"with the parameter 'adapter\.weight' of shape \(3, 3\), but .* \(5, 3\)"
    ) as error:
        fit(other, [NormBall(1e-3)], torch.ones(1, 2, 4), ckpt_path=str(tmp_path / "a.ckpt"))
    assert "\n" not in str(error.value)
    assert not other._load_state_dict_pre_hooks
    assert not made.lightning_module._load_state_dict_pre_hooks


class TextModule(L.LightningModule):
    """A module with a language model that leaves out the second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.tokenizer = world.load()
        self.weights: list[torch.Tensor] = []

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor | None:
        self.weights.append(self.model.model.layers[3].mlp.down_proj.weight.detach().clone())
        return None if index == 1 else self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_batch_that_training_step_leaves_out_changes_nothing_in_lightning() -> None:
    module, scope = TextModule(), ParameterScope(3, modules="mlp.down_proj")
    texts = ["The old baker found a coin near the river.", "A red fox slept."]
    ids = torch.tensor(module.tokenizer("A red fox slept.")["input_ids"])
    used = [scope, TokenLoss(), KLLocality(texts, batch_size=1), NormBall(1e-2)]
    made = fit(module, used, ids.repeat(3, 2, 1))
    first, second, third = module.weights
    assert not torch.equal(first, second)
    assert torch.equal(second, third)
    assert scope.run.step == made.global_step == 3
