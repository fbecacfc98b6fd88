"""SecondOrderLocality: take steps that change predictions on given texts as little as possible."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kedit_train.arguments import Rule, above, check_arguments, integer_from, one_of, optional, within
from kedit_train.callbacks.base import EditCallback
from kedit_train.core.drift.kfac import KFACFactors, kfac_factors
from kedit_train.core.drift.linear_layers import LinearLayer, find_linear_layers
from kedit_train.core.locality.texts import Texts, TextSource
from kedit_train.core.run import EditRun
from kedit_train.functional.precision import wide
from kedit_train.functional.second_order import damped_inverse, precondition, second_order_divergence


class SecondOrderLocality(EditCallback):
    order = 30
    constrains = True

    def __init__(
        self,
        texts: TextSource | Texts,
        *,
        step_size: float = 0.02,
        damping: float = 1e-3,
        momentum: float = 0.8,
        factors: Literal["kfac", "inputs"] = "kfac",
        limit: int | None = None,
        batch_size: int = 8,
        rule: str = "gradient",
    ) -> None:
        self.texts = Texts.of(texts)
        self.step_size, self.damping, self.momentum, self.factors = step_size, damping, momentum, factors
        self.limit, self.batch_size = limit, batch_size
        self.rule = rule

    def prepare(self, run: EditRun) -> None:
        run.causal_model()
        self.texts.check()

    def attach(self, run: EditRun) -> None:
        self._layers = find_linear_layers(run.model, run.scope)
        sequences = self.texts.tokenize(run, limit=self.limit)
        self._moments = kfac_factors(
            run, self._layers, sequences, batch_size=self.batch_size, seed=self.texts.seed, skip_first=True
        )
        self._inverses = {
            name: (
                damped_inverse(self._moments.gradients[name].mean, self.damping) if self.factors == "kfac" else None,
                damped_inverse(self._moments.inputs[name].mean, self.damping),
            )
            for name in self._layers
        }
        self._momentum: dict[str, Tensor] = {}
        self._largest = 0.0
        self._scale = sum(float(wide(run.reference[n]).square().sum()) for n in self._layers) ** 0.5
        self._before: dict[str, Tensor] = {}

    @torch.no_grad()
    def before_optimizer_step(self, run: EditRun) -> None:
        self._before = {name: run.scope[name].detach().clone() for name in self._layers}
        self._gradients = {}
        for name, layer in self._layers.items():
            gradient = run.scope[name].grad
            if gradient is not None:
                self._gradients[name] = precondition(layer.as_matrix(gradient), *self._inverses[name])
        self._loss = run.scores.get("edit/tokens/loss_now", 1.0)

    def constrain(self, weights: dict[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self._before:
            return weights
        for name, direction in self._gradients.items():
            old = self._momentum.get(name)
            self._momentum[name] = direction if old is None else self.momentum * old + direction
        size = sum(float(m.square().sum()) for m in self._momentum.values()) ** 0.5
        now = sum(float(m.square().sum()) for m in self._gradients.values()) ** 0.5
        self._largest = max(self._largest, now)
        factor = now / self._largest if self.rule == "gradient" else min(1.0, max(self._loss, 0.1))
        rate = self.step_size * factor * self._scale / max(size, 1e-30)
        self._now = factor
        changed = dict(weights)
        for name, direction in self._momentum.items():
            old = self._before[name]
            changed[name] = (wide(old) - rate * self._layers[name].as_matrix(direction)).to(old.dtype)
        self._before = {}
        return changed

    def metrics(self, run: EditRun) -> dict[str, float]:
        kl = 0.0
        for name, layer in self._layers.items():
            change = layer.as_matrix(wide(run.scope[name].detach()) - wide(run.reference[name]))
            kl += float(
                second_order_divergence(change, self._moments.gradients[name].mean, self._moments.inputs[name].mean)
            )
        return {"edit/locality/second_order_kl": kl}
