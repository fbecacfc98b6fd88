"""OptimizerSteps.learning_rates: the learning rate of each scoped parameter in the last step."""

from __future__ import annotations

import torch
from torch import nn

from kedit_train.callbacks import EditCallback, editing


class Recorder(EditCallback):
    """Records the learning rates that a constraint can read."""

    constrains = True

    def attach(self, run):
        self.edit, self.recorded = run, []

    def constrain(self, weights, reference):
        self.recorded.append(dict(self.edit.steps.learning_rates))
        return weights


def test_learning_rates_are_those_of_the_parameter_groups_of_this_step():
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "abc"})
    watch = Recorder()
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
    assert watch.recorded == [
        {"a.weight": 0.25, "b.weight": 0.5},
        {"c.weight": 0.125},
        {"a.weight": 0.125},
        {"c.weight": 0.125},
    ]
