"""StopWhenEdited over epochs: how many steps an epoch has, and the mean loss over these steps."""

from __future__ import annotations

import pytest
from callbacks.stopped_runs import Publisher, stopped_at
from conformance.hosts import HOSTS

from kedit_train import world
from kedit_train.callbacks import StopWhenEdited, editing
from kedit_train.data import EditDataset
from kedit_train.errors import EditError
from kedit_train.modes import TrainLoop


class EpochPublisher(Publisher):
    """Publishes scores of ten steps, of which only the second has active tokens."""

    def __init__(self) -> None:
        quiet, loud = ({"edit/tokens/active_now": n, "edit/tokens/loss_now": n / 10} for n in (0, 3))
        super().__init__([quiet, loud, *[quiet] * 8])


@pytest.mark.parametrize(("window", "step"), [(1, 5), (2, 4)])
@pytest.mark.parametrize("host", ["Trainer", "SFTTrainer", "Lightning"])
def test_an_epoch_has_as_many_steps_as_the_trainer_takes(host: str, window: int, step: int) -> None:
    """Nine edits in batches of 4 are 3 steps, or 2 steps if two batches make one step."""
    model, tokenizer = world.load()
    stop = StopWhenEdited(None, idle_steps="epoch")
    name = "accumulate_grad_batches" if host == "Lightning" else "gradient_accumulation_steps"
    callbacks = [EpochPublisher(), stop]
    HOSTS[host](model, tokenizer, EditDataset(world.edits(n=9)), callbacks, 10, **{name: window})
    assert stop.run is not None
    assert (stop.run.host.epoch_steps, stop.run.step) == (4 - window, step)
    assert stop.reason == f"no token had a loss above epsilon in {4 - window} steps"


def test_the_loss_of_an_epoch_is_the_mean_over_its_steps() -> None:
    model, tokenizer = world.load()
    stop = StopWhenEdited(0.05)
    HOSTS["Trainer"](model, tokenizer, EditDataset(world.edits(n=9)), [EpochPublisher(), stop], 10)
    assert stop.run is not None
    assert stop.run.step == 5  # the mean of the first epoch, (0 + 0.3 + 0) / 3, is above 0.05


def test_a_plain_loop_passes_the_steps_of_an_epoch() -> None:
    model, tokenizer = world.load()
    edits = world.edits(n=3)
    with pytest.raises(
        EditError, match=r'idle_steps="epoch" needs .* unknown in this plain loop run; .*editing\(epoch_steps=...\)'
    ):
        stopped_at([EpochPublisher(), StopWhenEdited(None, idle_steps="epoch")])
    with editing(model, [stop := StopWhenEdited(None, idle_steps="epoch"), EpochPublisher()], epoch_steps=4) as edit:
        edit.before_step()
        assert stop._idle_limit == 4
        model.zero_grad()
    stop = StopWhenEdited(None, idle_steps="epoch")
    TrainLoop(tokenizer, callbacks=[EpochPublisher(), stop], batch_size=2, epochs=5, stop_loss=0.0)(model, edits)
    assert stop.reason == "no token had a loss above epsilon in 2 steps"
