"""A model that was loaded from a trainer's checkpoint of an edit that had not ended."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core.small_loop import model, sgd, step

from kedit_train import EditError
from kedit_train.callbacks import NormBall, editing
from kedit_train.core.adapter_scales import adapter_scales
from kedit_train.core.state_file import FILE


def checkpoint(folder: Path, step: int, steps: int) -> Any:
    """Return a model that was loaded from a checkpoint of a transformers trainer."""
    folder.mkdir()
    (folder / FILE).touch()
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": steps}))
    net: Any = model()
    net.config = SimpleNamespace(_name_or_path=str(folder))
    return net


def begin(net: Any, state: Any = None) -> Any:
    with editing(net, [NormBall(0.1)]) as edit:
        if state is not None:
            edit.load_state_dict(state)
        edit.before_step()
        return edit.state_dict()


def test_a_new_edit_of_a_checkpoint_of_an_unfinished_edit_is_a_warning(tmp_path: Path) -> None:
    net = checkpoint(tmp_path / "checkpoint-2", 2, 4)
    expected = r"loaded from .*checkpoint-2, a checkpoint of an unfinished edit \(step 2 of 4\).*train\(resume_"
    with pytest.warns(UserWarning, match=expected) as found:
        state = begin(net)
    assert "\n" not in str(found[0].message)
    # A killed process may have left the state next to the checkpoint, and the trainer's own state may be missing.
    (tmp_path / "checkpoint-2" / FILE).rename(tmp_path / f"checkpoint-2-{FILE}")
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.warns(
        UserWarning, match=r"an unfinished edit\. This run begins a new edit, which uses the half-edited"
    ):
        begin(net)
    # Warnings are errors in these tests.
    begin(net, state)


def test_a_new_edit_of_the_checkpoint_of_the_last_step_is_no_warning(tmp_path: Path) -> None:
    begin(checkpoint(tmp_path / "checkpoint-4", 4, 4))


@pytest.mark.parametrize("change", [{"lora_alpha": 32}, {"use_rslora": True}])
def test_an_adapter_with_another_scale_than_in_the_checkpoint_is_an_error(change: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")

    def adapted(**extra: Any) -> Any:
        return peft.get_peft_model(
            model(), peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["1"]} | extra))
        )

    assert set(adapter_scales(adapted()).values()) == {2.0}
    state = begin(adapted())
    begin(adapted(), state)
    with pytest.raises(EditError, match=r"multiplies its output by 2 in the checkpoint.*same lora_alpha") as error:
        begin(adapted(**change), state)
    assert "\n" not in str(error.value)
    del state["adapter_scales"]
    begin(adapted(**change), state)


def test_a_resumed_optimizer_of_another_kind_is_an_error() -> None:
    net = model()
    with editing(net, [NormBall(0.1)]) as edit:
        optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-2)
        step(edit, net, optimizer)
        state, loaded = edit.state_dict(), optimizer.state_dict()
    again = model()
    with editing(again, [NormBall(0.1)]) as edit:
        again.load_state_dict(net.state_dict())
        edit.load_state_dict(state)
        other = sgd(edit.parameters())
        other.load_state_dict(loaded)
        with pytest.raises(EditError, match=r"another optimizer than SGD: .* no value for dampening, momentum"):
            step(edit, again, other)
        own = torch.optim.AdamW(edit.parameters(), lr=1e-2)
        own.load_state_dict(loaded)
        step(edit, again, own)
