"""ForecastMetrics: values from the formulas, at the right steps, in every loop; wrong uses are errors."""

from __future__ import annotations

import copy
import doctest
import inspect
from pathlib import Path
from typing import Any, cast

import lightning as L
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils.generic import ModelOutput

from kedit_train.callbacks import ForecastMetrics, OutputAnchor, editing
from kedit_train.errors import EditError

LEVELS = [0.1, 0.5, 0.9]
GENERATOR = torch.Generator().manual_seed(0)
# The second forward pass has fewer windows than the first.
INPUTS = [torch.randn(n, 4, generator=GENERATOR) for n in (5, 2)]
TARGETS = [torch.randn(n, 3, generator=GENERATOR) for n in (5, 2)]
KEPT = [torch.randn(6, 4, generator=GENERATOR), torch.randn(3, 4, generator=GENERATOR)]


class Forecaster(nn.Module):
    def __init__(self, outputs: tuple[int, ...] = (3,)) -> None:
        super().__init__()
        self.layer, self.dropout, self.shape = nn.Linear(4, torch.Size(outputs).numel()), nn.Dropout(0.5), outputs

    def forward(self, windows: Tensor, targets: Tensor | None = None) -> Any:
        forecast = self.layer(self.dropout(windows)).view(-1, *self.shape)
        return forecast if targets is None else ModelOutput(loss=(forecast - targets).square().mean(), out=forecast)


def made(outputs: tuple[int, ...] = (3,)) -> Forecaster:
    torch.manual_seed(0)
    return Forecaster(outputs)


def train(model: nn.Module, callbacks: list[Any], steps: int, state: Any = None) -> tuple[Any, Any]:
    with editing(model, callbacks, log_every_n_steps=100) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=0.1)
        if state is not None:
            edit.load_state_dict(state)
        for _ in range(steps):
            optimizer.zero_grad()
            edit.before_step()
            model(KEPT[0]).square().mean().backward()
            optimizer.step()
        saved = edit.state_dict()
    return edit.history, saved


@torch.no_grad()
def by_hand(model: nn.Module, before: nn.Module, levels: list[float] | None = None) -> tuple[float, float]:
    """Return the error over all target values, and the relative change, from their formulas."""
    model, before = copy.deepcopy(model).eval(), before.eval()
    output, target = model(torch.cat(INPUTS)), torch.cat(TARGETS)
    if levels is None:
        error = ((output - target) ** 2).mean()
    else:
        level = torch.tensor(levels)
        above = target[..., None] - output
        error = torch.where(above > 0, level * above, (level - 1) * above).mean()
    now, old = model(torch.cat(KEPT)), before(torch.cat(KEPT))
    return error.item(), ((now - old).square().sum() / old.square().sum()).sqrt().item()


@pytest.mark.parametrize("quantiles", [None, LEVELS])
def test_error_and_change_follow_their_formulas(quantiles):
    model = made((3,) if quantiles is None else (3, 3))
    before = copy.deepcopy(model)
    error = "mse" if quantiles is None else "quantile"
    metrics = ForecastMetrics((INPUTS, TARGETS), kept=KEPT, every_n_steps=2, error=error, quantiles=quantiles)
    history, _ = train(model, [metrics], 5)
    unedited, _ = by_hand(before, before, quantiles)
    last_error, change = by_hand(model, before, quantiles)
    assert metrics.unedited_error == pytest.approx(unedited, rel=1e-5)
    assert metrics.last_error == pytest.approx(last_error, rel=1e-5)
    assert metrics.last_change == pytest.approx(change, rel=1e-5)
    assert change > 0.01
    rows = [row for row in history if "edit/forecast/error" in row]
    # Every second step, and once more at the end.
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert rows[-1]["edit/forecast/change"] == metrics.last_change
    assert rows[0]["edit/forecast/change"] < rows[-1]["edit/forecast/change"]


def test_zero_measures_before_and_after_training_only():
    metrics = ForecastMetrics((INPUTS, TARGETS), kept=KEPT, every_n_steps=0)
    history, _ = train(made(), [metrics], 4)
    assert [row["step"] for row in history if "edit/forecast/error" in row] == [4]
    assert metrics.provides() == set()
    assert ForecastMetrics((INPUTS, TARGETS), kept=KEPT).provides() == {"edit/forecast/error", "edit/forecast/change"}


def test_the_weights_are_the_same_with_and_without_the_metrics():
    with_metrics, without = made(), made()
    torch.manual_seed(5)
    train(with_metrics, [ForecastMetrics((INPUTS, TARGETS), kept=KEPT, every_n_steps=1)], 4)
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(without.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        without(KEPT[0]).square().mean().backward()
        optimizer.step()
    assert torch.equal(with_metrics.layer.weight, without.layer.weight)


def test_a_resumed_run_compares_with_the_model_before_the_edit():
    model, metrics = made(), cast(Any, ForecastMetrics((INPUTS, TARGETS), kept=KEPT))
    before = copy.deepcopy(model)
    _, state = train(model, [metrics], 3)
    resumed: Any = ForecastMetrics((INPUTS, TARGETS), kept=KEPT)
    train(model, [resumed], 3, state)
    assert resumed.unedited_error == metrics.unedited_error
    assert resumed.last_change == pytest.approx(by_hand(model, before)[1], rel=1e-5)
    assert resumed.last_change > metrics.last_change > 0.0


def test_a_file_holds_inputs_and_targets(tmp_path: Path):
    inputs, targets = torch.stack([KEPT[0], -KEPT[0]]), torch.ones(2, 6, 3)
    save_file({"windows": inputs, "targets": targets}, tmp_path / "new.safetensors")
    save_file({"windows": torch.stack([INPUTS[0]])}, tmp_path / "kept.safetensors")
    results = []
    for new, kept in (
        (str(tmp_path / "new.safetensors"), tmp_path / "kept.safetensors"),
        ((list(inputs), list(targets)), INPUTS[:1]),
    ):
        torch.manual_seed(1)
        metrics = ForecastMetrics(new, kept=kept)
        train(made(), [metrics], 2)
        results.append((metrics.unedited_error, metrics.last_error, metrics.last_change))
    assert results[0] == results[1]
    with pytest.raises(EditError, match=r'kept\.safetensors must contain a tensor named "targets", got only "windows"'):
        train(made(), [ForecastMetrics(str(tmp_path / "kept.safetensors"), kept=KEPT)], 1)


def test_a_transformers_trainer_keeps_the_checkpoint_with_the_smallest_error(tmp_path: Path):
    class Seen(TrainerCallback):
        errors: list[float] = []  # noqa: RUF012 (one instance)

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            self.errors.append(metrics["eval_edit_forecast_error"])

    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        use_cpu=True, report_to=[], disable_tqdm=True, load_best_model_at_end=True, learning_rate=0.1, optim="sgd",
        metric_for_best_model="edit_forecast_error", greater_is_better=False,
    )  # fmt: skip
    rows = [{"windows": past, "targets": future} for past, future in zip(INPUTS[0], TARGETS[0], strict=True)]
    metrics, seen = ForecastMetrics((INPUTS, TARGETS), kept=KEPT, every_n_steps=0), Seen()
    data: Any = rows
    trainer = Trainer(made(), arguments, train_dataset=data, eval_dataset=data, callbacks=[metrics, seen])
    trainer.train()
    assert len(set(seen.errors)) == 2
    assert trainer.state.best_metric == min(seen.errors)
    assert metrics.last_error == pytest.approx(min(seen.errors))
    assert trainer.state.log_history[-1]["edit/forecast/change"] == metrics.last_change


def test_lightning_logs_the_metrics():
    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = made()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.mse_loss(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    metrics = ForecastMetrics((INPUTS, TARGETS), kept=KEPT, every_n_steps=2, module="network")
    trainer = L.Trainer(
        max_steps=4, callbacks=[metrics], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(TensorDataset(INPUTS[0], TARGETS[0]), batch_size=5))
    assert float(trainer.callback_metrics["edit/forecast/change"]) == pytest.approx(metrics.last_change, rel=1e-5)


@pytest.mark.parametrize("callback", [ForecastMetrics, OutputAnchor])
def test_the_example_runs(callback: type):
    tests = doctest.DocTestParser().get_doctest(inspect.getdoc(callback) or "", {}, callback.__name__, None, 0)
    runner = doctest.DocTestRunner()
    runner.run(tests)
    assert runner.tries > 0
    assert not runner.failures


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no pair": ({"new": INPUTS[0]}, r"new must be a pair of two lists \(inputs, targets\), got Tensor"),
    "numbers differ": ({"new": (INPUTS, TARGETS[:1])}, "one target per forward pass, got 2 inputs and 1 targets"),
    "one target": (
        {"new": (INPUTS, TARGETS[0])},
        r"must be a list with one tensor per forward pass; for a single forward pass, pass",
    ),
    "no targets": (
        {"new": (INPUTS, None)},
        r"must be a list with one tensor per forward pass; for a single forward pass, pass",
    ),
    "an empty target": (
        {"new": ([torch.zeros(0, 6)], [torch.zeros(0, 3)])},
        r"the target for new\[0\]\[0\] must not be empty, got shape \(0, 3\)",
    ),
    "NaN in a target": (
        {"new": (INPUTS, [TARGETS[0], torch.full_like(TARGETS[1], float("nan"))])},
        r"the target for new\[0\]\[1\] must contain only finite numbers",
    ),
    "empty kept inputs": ({"kept": [torch.zeros(0, 4)]}, r"the output for kept\[0\] is empty \(shape \(0, 3\)\)"),
    "shapes differ": (
        {"new": (INPUTS, [target[:, :2] for target in TARGETS])},
        r"the output for new\[0\]\[0\] must have the shape \(5, 2\) to fit its target .* got \(5, 3\)",
    ),
    "quantiles": ({"error": "quantile"}, r"quantiles must be a list of numbers in \(0, 1\), got None"),
    "levels": ({"error": "quantile", "quantiles": [0.5, 1.0]}, r"numbers in \(0, 1\), got \[0.5, 1.0\]"),
    "quantile shape": (
        {"error": "quantile", "quantiles": LEVELS},
        r"must have the shape \(5, 3, 3\) to fit its target of shape \(5, 3\), got \(5, 3\)",
    ),
    "kept": ({"kept": None}, "kept must be a list of model inputs with one item per forward pass"),
    "error": ({"error": "mae"}, 'error must be "mse" or "quantile"'),
    "steps": ({"every_n_steps": -1}, "every_n_steps must be an integer >= 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_uses_are_errors_before_the_first_step(name):
    options, message = REFUSED[name]
    with pytest.raises(EditError, match=rf"^ForecastMetrics: .*{message}") as error:
        train(made(), [ForecastMetrics(**({"new": (INPUTS, TARGETS), "kept": KEPT} | options))], 1)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 300
