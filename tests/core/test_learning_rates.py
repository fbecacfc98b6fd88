"""The run knows with which learning rate each scoped parameter has just been stepped."""

from __future__ import annotations

import torch
from torch import nn

from kedit_train.callbacks import EditCallback, editing


class Watch(EditCallback):
    """Keeps what constraints get to see."""

    constrains = True

    def attach(self, run):
        self.edit, self.seen = run, []

    def constrain(self, weights, reference):
        self.seen.append(dict(self.edit.steps.learning_rates))
        return weights


def test_rates_are_those_of_the_groups_at_this_step_and_only_of_what_was_stepped():
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "abc"})
    watch = Watch()
    with editing(model, [watch]) as edit:
        a, b, c = (model[name].weight for name in "abc")
        first = torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": 0.5}], lr=0.25)
        second = torch.optim.AdamW([c], lr=torch.tensor(0.125))
        schedule = torch.optim.lr_scheduler.StepLR(first, 1, gamma=0.5)
        for used in ([a, b, c], [a, c]):
            edit.before_step()
            sum(p.sum() for p in used).backward()
            first.step()
            schedule.step()
            second.step()
            first.zero_grad()
            second.zero_grad()
    assert watch.seen == [
        {"a.weight": 0.25, "b.weight": 0.5},
        {"c.weight": 0.125},
        {"a.weight": 0.125},
        {"c.weight": 0.125},
    ]
