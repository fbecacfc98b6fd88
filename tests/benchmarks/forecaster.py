"""Fine-tune a small forecaster on a new regime, with and without OutputAnchor, and compare what else changes.

The forecaster is an MLP that predicts the next 12 values of a series from the last 48. It is trained here, in seconds,
on two kinds of series: sums of two sinusoids with short periods, and with long periods, both with a level and noise. In
the new regime, the next values of a series with short periods have the opposite sign. The forecasts of series with long
periods must stay.

    python tests/benchmarks/forecaster.py               # seeds 1, 2 and 3, which are reported
    python tests/benchmarks/forecaster.py --seeds 0     # one of the seeds on which the settings were chosen

Each run prints one JSON line per method: the mean squared error on series of the new regime that were not trained on,
before and after fine-tuning, and the relative change of the forecasts of series with long periods that were not given
to the anchor.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.callbacks import ForecastMetrics, OutputAnchor, editing

PAST, FUTURE = 48, 12
SHORT, LONG = (6.0, 12.0), (20.0, 40.0)


def series(n: int, periods: tuple[float, float], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return windows [n, 48] and the values that follow them [n, 12]: sums of two sinusoids, a level and noise."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, generator=generator)

    time_steps = torch.arange(PAST + FUTURE)
    values = uniform(-1.0, 1.0) + 0.05 * torch.randn(n, PAST + FUTURE, generator=generator)
    for _ in range(2):
        phase = uniform(0.0, 2 * torch.pi)
        values = values + uniform(0.3, 1.0) * torch.sin(2 * torch.pi * time_steps / uniform(*periods) + phase)
    return values[:, :PAST], values[:, PAST:]


def new_regime(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return series with short periods whose future is reflected at 0."""
    past, future = series(n, SHORT, generator)
    return past, -future


class Forecaster(nn.Module):
    """An MLP that normalizes each window, as forecasters with reversible instance normalization do."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(PAST + 1, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, FUTURE)
        )

    def forward(self, windows: Tensor) -> Tensor:
        level, scale = windows.mean(1, keepdim=True), windows.std(1, keepdim=True) + 1e-3
        return self.layers(torch.cat([(windows - level) / scale, level], 1)) * scale + level


def pretrain(generator: torch.Generator, steps: int = 1500) -> Forecaster:
    """Return a forecaster that is trained on both regimes, before any series breaks."""
    model = Forecaster()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        batches = [series(64, periods, generator) for periods in (SHORT, LONG)]
        past, future = (torch.cat(parts) for parts in zip(*batches, strict=True))
        nn.functional.mse_loss(model(past), future).backward()
        optimizer.step()
        schedule.step()
    return model


def methods(kept: Sequence[Tensor], weights: Sequence[float]) -> dict[str, list[Any]]:
    """Return the callbacks of each method."""
    anchors = {f"OutputAnchor(weight={weight})": [OutputAnchor(kept, weight=weight)] for weight in weights}
    return {"fine-tuning": [], **anchors}


def fine_tune(
    model: nn.Module, trained: tuple[Tensor, Tensor], tested: Any, callbacks: list[Any], *, steps: int, rate: float
) -> ForecastMetrics:
    """Train ``model`` on the new regime; return the metrics on the tested series."""
    metrics = ForecastMetrics(tested[0], kept=tested[1], every_n_steps=0)
    past, future = trained
    order = torch.Generator().manual_seed(0)
    with editing(model, [*callbacks, metrics]) as edit:
        optimizer = torch.optim.Adam(edit.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        for _ in range(steps):
            batch = torch.randint(len(past), (32,), generator=order)
            optimizer.zero_grad()
            edit.before_step()
            nn.functional.mse_loss(model(past[batch]), future[batch]).backward()
            optimizer.step()
            schedule.step()
    return metrics


def run(
    seed: int, *, steps: int, rate: float, weights: Sequence[float], kept_windows: int = 512
) -> list[dict[str, Any]]:
    """Return one row of results per method."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    base = pretrain(generator)
    trained = new_regime(1024, generator)
    kept = series(kept_windows, LONG, generator)[0].split(32)
    past, future = new_regime(512, generator)
    tested = ([past], [future]), [series(512, LONG, generator)[0]]
    rows = []
    for name, callbacks in methods(kept, weights).items():
        began = time.perf_counter()
        metrics = fine_tune(copy.deepcopy(base), trained, tested, callbacks, steps=steps, rate=rate)
        assert metrics.last_error is not None
        assert metrics.last_change is not None
        row = {"seed": seed, "method": name, "error before": metrics.unedited_error, "error": metrics.last_error}
        row |= {"change of other forecasts": metrics.last_change, "seconds": time.perf_counter() - began}
        rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.01, 0.1, 1.0])
    options = parser.parse_args()
    for seed in options.seeds:
        for row in run(seed, steps=options.steps, rate=options.rate, weights=options.weights):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
