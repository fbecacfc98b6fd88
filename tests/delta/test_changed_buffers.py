"""SaveDelta and persistent buffers, which a delta does not contain: a change during the run is a warning."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from core.small_loop import sgd, step
from torch import nn

from kedit_train.callbacks import ParameterScope, SaveDelta, editing

CHANGED = r"the run has changed the buffer {} \(and {} more\), which the delta does not contain.*save the whole model"


def model() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    net.register_buffer("seen", torch.zeros(2))
    net.register_buffer("scratch", torch.zeros(2), persistent=False)
    return net


def run(net: nn.Module, path: Path, state: dict[str, Any] | None = None, change: Any = lambda: None) -> dict[str, Any]:
    with editing(net, [ParameterScope(modules="2"), SaveDelta(str(path))]) as edit:
        if state is not None:
            edit.load_state_dict(state)
        optimizer = sgd(edit.parameters())
        for _ in range(2):
            step(edit, net, optimizer)
            change()
        return edit.state_dict()


def test_changed_buffers_are_one_warning_that_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = model()
    with pytest.warns(UserWarning, match="^SaveDelta: " + CHANGED.format(r"1\.running_mean", 2)) as found:
        run(net, tmp_path / "edit.safetensors")
    assert len(found) == 1
    assert "bit for bit; 3 changed buffers are not in the file" in capsys.readouterr().out


def test_unchanged_buffers_and_scratch_buffers_give_no_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = model().eval()
    run(net, tmp_path / "edit.safetensors", change=lambda: net.scratch.add_(1))
    assert re.search(r"bit for bit\)$", capsys.readouterr().out.strip())


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.seen.add_(1),
        lambda net: net.register_buffer("late", torch.ones(1)),
        lambda net: setattr(net, "seen", None),
    ],
)
def test_a_buffer_that_is_written_added_or_removed_is_a_change(change: Any, tmp_path: Path) -> None:
    net = model().eval()
    done: list[Any] = []
    with pytest.warns(UserWarning, match=r"the run has changed the buffer (seen|late), which the delta does not"):
        run(net, tmp_path / "edit.safetensors", change=lambda: done or done.append(change(net)))


def test_a_resumed_run_compares_with_the_buffers_before_its_first_part(tmp_path: Path) -> None:
    net = model()
    with pytest.warns(UserWarning, match="changed the buffer"):
        state = run(net, tmp_path / "first.safetensors")
    with pytest.warns(UserWarning, match=CHANGED.format(r"1\.running_mean", 2)):
        run(net.eval(), tmp_path / "second.safetensors", state)
