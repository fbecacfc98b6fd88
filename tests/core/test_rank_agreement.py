"""Processes that begin with other arguments or weights get an error, in every process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from core.small_loop import model, sgd, step
from torch import nn

from kedit_train.callbacks import EditCallback, NormBall, ParameterScope, editing
from kedit_train.core import rank_agreement
from kedit_train.errors import EditError


class Other:
    """Stands for process 1: changes a copy of what process 0 has gathered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, change: Any, also_connected: bool = True) -> None:
        self.change, self.also_connected = change, also_connected
        monkeypatch.setattr(rank_agreement, "is_distributed", lambda: True)
        monkeypatch.setattr(rank_agreement, "world_size", lambda: 2)
        monkeypatch.setattr(rank_agreement.dist, "all_gather_object", self.gather)

    def gather(self, found: list[Any], own: Any) -> None:
        if not self.also_connected:
            raise RuntimeError("Connection closed by peer")
        self.own, other = own, copy.deepcopy(own)
        self.change(other)
        found[:] = [own, other]


def train(callbacks: list[EditCallback]) -> nn.Module:
    net = model()
    with editing(net, callbacks) as edit:
        step(edit, net, sgd(edit.parameters()))
    return net


def callbacks() -> list[EditCallback]:
    return [ParameterScope(modules="1"), NormBall(1e-3)]


def test_equal_processes_train(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Other(monkeypatch, lambda _: None)
    train(callbacks())
    assert other.own["callbacks"]["NormBall.0"]["radius"] == 1e-3
    assert set(other.own["weights"]) == {"1.weight (before the edit)", "1.weight (in scope)"}


def test_another_argument_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    Other(monkeypatch, lambda other: other["callbacks"]["NormBall.0"].update(radius=0.5))
    with pytest.raises(
        EditError, match=r"^NormBall: radius must be the same in every process, got 0\.001 in process 0"
    ):
        train(callbacks())


def test_a_missing_callback_is_an_error_if_it_changes_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    Other(monkeypatch, lambda other: other["callbacks"].pop("NormBall.0"))
    with pytest.raises(EditError, match=r"^NormBall: every process must use the same callbacks, but process 0 uses"):
        train(callbacks())
    Other(monkeypatch, lambda other: other["callbacks"].pop("EditCallback.0"))
    train([ParameterScope(modules="1"), EditCallback()])


def test_other_weights_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    Other(monkeypatch, lambda other: other["weights"].update({"1.weight (before the edit)": 0}))
    with pytest.raises(EditError, match=r"same weights, but 1\.weight \(before the edit\) differs between process 0"):
        train(callbacks())


def test_an_error_in_one_process_is_an_error_in_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    Other(monkeypatch, lambda other: other.update(error="the model has no head."))
    with pytest.raises(
        EditError, match=r"process 1 failed before the first step, so process 0 stops too: the model has no head\."
    ):
        train(callbacks())
    Other(monkeypatch, lambda _: None, also_connected=False)
    with pytest.raises(EditError, match="another process ended before the first step"):
        train(callbacks())


def test_an_own_error_is_raised_after_the_other_process_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Needs(EditCallback):
        def requires(self) -> Any:
            raise EditError("something is missing.")

    other = Other(monkeypatch, lambda other: other.update(error=None))
    with pytest.raises(EditError, match=r"^something is missing"):
        train([*callbacks(), Needs()])
    assert other.own["error"] == "something is missing."


def test_files_and_printing_may_differ() -> None:
    class Prints(EditCallback):
        def __init__(self) -> None:
            self.show, self.report_path, self.cache_dir, self.kind = True, "a.html", "c", "data/texts"
            self.rate, self.values = 0.5, torch.ones(2)

    assert rank_agreement._arguments(Prints()) == {"trains": False, "rate": 0.5}
