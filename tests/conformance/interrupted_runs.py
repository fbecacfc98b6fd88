"""Train with a set of callbacks, in a trainer or in a plain loop, for tests of interrupted and resumed runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from conformance.hosts import HOSTS, adamw, collator

from kedit_train import world
from kedit_train.callbacks import KLLocality, NormBall, ParameterScope, TokenLoss, editing
from kedit_train.data import EditDataset

TEXTS = ["The baker kept a coin in the old mill.", "The fox kept a rope in the old mill."]


def callbacks(layers: str = "2-3") -> list[Any]:
    return [
        ParameterScope(layers=layers, modules="mlp.down_proj"),
        TokenLoss(),
        KLLocality(texts=TEXTS, batch_size=2),
        NormBall(1e-2),
    ]


def train(model: Any, folder: Path, used: list[Any], host: str = "Trainer", steps: int = 6, **options: Any) -> Any:
    torch.manual_seed(0)
    tokenizer = world.load()[1]
    saving = {"output_dir": str(folder), "save_strategy": "steps", "save_steps": 2}
    return HOSTS[host](model, tokenizer, EditDataset(world.edits(n=12)), used, steps, **(saving | options))


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert [n for n in first if not torch.equal(first[n].view(torch.int32), second[n].view(torch.int32))] == []


def assert_clean(model: Any) -> None:
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "_kedit_run" not in model.__dict__


def loop(model: Any, steps: range, state: dict[str, Any] | None = None, more: Sequence[Any] = ()) -> dict[str, Any]:
    """Train in a plain loop and return a checkpoint, which is empty if there was no step."""
    tokenizer = world.load()[1]
    rows, put = EditDataset(world.edits(n=12)).encode(tokenizer), collator(tokenizer)
    with editing(model, [*callbacks(), *more], tokenizer=tokenizer) as edit:
        optimizer = adamw(edit.parameters())
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            edit.load_state_dict(state["edit"])
        for number in steps:
            edit.before_step()
            model(**put(rows[2 * number : 2 * number + 2])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if not steps:
            return {}
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "edit": edit.state_dict()}
