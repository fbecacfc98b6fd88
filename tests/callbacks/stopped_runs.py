"""Prepared scores and a plain loop, for the tests of StopWhenEdited."""

from __future__ import annotations

from typing import Any

import torch

from kedit_train.callbacks import EditCallback, editing


class Publisher(EditCallback):
    """Publishes prepared scores, one dict per step, in place of the callbacks that measure them."""

    # At this place in the order, EditMetrics would measure.
    order = 60

    def __init__(self, scores: list[dict[str, float]]) -> None:
        self.scores = scores

    def provides(self) -> set[str]:
        return {"token_clip"}.union(*self.scores)

    def after_step(self, run: Any) -> None:
        run.publish(self.scores[run.step - 1])


def stopped_at(callbacks: list[Any], steps: int = 6) -> int | None:
    """Return the step at which the callbacks end a plain loop, or None if they do not end it."""
    model = torch.nn.Linear(2, 2)
    with editing(model, callbacks) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=0.1)
        for step in range(1, steps + 1):
            edit.before_step()
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if edit.should_stop:
                return step
    return None
