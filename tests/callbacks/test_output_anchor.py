"""OutputAnchor: the penalty follows its formula, for every form of inputs and outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.forecaster import HORIZON, KEPT, NEW, Forecaster, assert_same_bits, descend, made, parameters
from safetensors.torch import save_file
from torch import Tensor, nn

from kedit_train.callbacks import ForgettingBudget, OutputAnchor, ParameterScope, editing

DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda before, now: ((now - before) ** 2).mean(),
    "quantile": lambda before, now: (now - before).abs().mean(),
    "kl": lambda before, now: (before.softmax(-1) * (before.log_softmax(-1) - now.log_softmax(-1))).sum(-1).mean(),
}


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_steps_follow_the_formula(distance):
    # batch_size is the number of items, so every step uses all of them and their order does not matter.
    anchor = OutputAnchor(KEPT, distance=distance, weight=3.0, batch_size=len(KEPT))
    model = made()
    reference = copy.deepcopy(model)
    history, _ = descend(model, [anchor], 4)
    by_hand = copy.deepcopy(reference).eval()
    measured = []
    for _ in range(4):
        with torch.no_grad():
            before = reference.eval()(torch.cat(KEPT))
        penalty = DISTANCES[distance](before, by_hand(torch.cat(KEPT)))
        measured.append(penalty.item())
        loss = (by_hand(NEW[0]) - NEW[1]).square().mean() + 3.0 * penalty
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(by_hand.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    for name, expected in by_hand.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=1e-5, atol=1e-6)
    assert [row["edit/locality/output_distance"] for row in history] == pytest.approx(measured, rel=1e-3, abs=1e-7)
    assert measured[-1] > 0.0


def test_the_forecasts_on_kept_windows_change_less_and_those_on_new_ones_are_learned():
    changes, errors = [], []
    for callbacks in ([], [OutputAnchor(KEPT, weight=3.0, batch_size=5)]):
        model = made()
        before = copy.deepcopy(model).eval()
        descend(model, [ParameterScope(modules="*"), *callbacks], 300)
        with torch.no_grad():
            changes.append((model(torch.cat(KEPT)) - before(torch.cat(KEPT))).norm())
            errors.append((model(NEW[0]) - NEW[1]).square().mean() / (before(NEW[0]) - NEW[1]).square().mean())
    assert changes[1] < 0.5 * changes[0]
    assert errors[1] < 0.8


def test_every_item_is_drawn_once_before_any_item_is_drawn_again():
    calls: list[int] = []

    class Counting(Forecaster):
        def forward(self, windows: Tensor, targets: Tensor | None = None) -> Any:
            calls.extend(i for i, kept in enumerate(KEPT) if torch.equal(kept, windows))
            return super().forward(windows)

    def run(seed: int) -> list[int]:
        calls.clear()
        torch.manual_seed(0)
        descend(Counting(), [OutputAnchor(KEPT, batch_size=2, seed=seed)], 10)
        assert calls[: len(KEPT)] == list(range(len(KEPT)))  # the outputs before training
        return calls[len(KEPT) :]

    first = run(0)
    assert [sorted(first[start : start + 5]) for start in range(0, 20, 5)] == [[0, 1, 2, 3, 4]] * 4
    assert first == run(0)
    assert first != run(1)


SELECTIONS: dict[str, tuple[str, Any]] = {
    "a tensor": ("tensor", None),
    "a name": ("object", "forecast"),
    "an index": ("tuple", 1),
    "a function": ("object", lambda output: output.forecast),
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_output_may_be_a_tensor_or_be_selected(selection):
    output, selected = SELECTIONS[selection]
    model: Any = made(output=output)
    with editing(model, [OutputAnchor(KEPT, output=selected, batch_size=5)]) as edit:
        edit.before_step()
        with torch.no_grad():
            model.head.bias += 2.0
        (anchor,) = edit.run.callbacks
        assert anchor.penalty(edit.run).item() == pytest.approx(4.0, rel=1e-5)


@pytest.mark.parametrize("shape", ["tensor", "tuple", "mapping", "nested", "file"])
def test_inputs_may_have_every_form(shape, tmp_path: Path):
    class Nested(Forecaster):
        def forward(self, windows: Any, targets: Tensor | None = None) -> Any:
            return super().forward(windows["past"][0] if isinstance(windows, dict) else windows)

    save_file({"windows": torch.stack(KEPT)}, tmp_path / "kept.safetensors")
    forms: dict[str, Any] = {
        "tensor": torch.cat(KEPT).split(4),
        "tuple": [(kept, None) for kept in KEPT],
        "mapping": [{"windows": kept} for kept in KEPT],
        "nested": [({"past": [kept]},) for kept in KEPT],
        "file": str(tmp_path / "kept.safetensors"),
    }
    results = []
    for inputs in (KEPT, forms[shape]):
        torch.manual_seed(0)
        model = Nested()
        descend(model, [OutputAnchor(inputs, weight=5.0, batch_size=2)], 3)
        results.append(parameters(model))
    assert_same_bits(*results)


def test_positions_of_padding_do_not_count():
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 5)

        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(self.embedding(ids))

    torch.manual_seed(0)
    model = Tagger()
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    ids = torch.tensor([[1, 2, 3], [4, 0, 0]])
    with editing(model, [OutputAnchor([{"ids": ids, "attention_mask": mask}], distance="kl")]) as edit:
        with torch.no_grad():
            before = model(ids, mask)
        edit.before_step()
        with torch.no_grad():
            model.embedding.weight[0] += 3.0
            model.embedding.weight[4] += 1.0
            now = model(ids, mask)
        (anchor,) = edit.run.callbacks
        rows = DISTANCES["kl"](before[mask.bool()], now[mask.bool()])
        assert anchor.penalty(edit.run).item() == pytest.approx(rows.item(), rel=1e-5)
        assert DISTANCES["kl"](before, now).item() > 2 * rows.item()


def test_batch_normalization_and_recurrent_layers_keep_their_state():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.norm, self.head = (
                nn.GRU(1, 4, batch_first=True),
                nn.BatchNorm1d(4),
                nn.Linear(4, HORIZON),
            )

        def forward(self, windows: Tensor) -> Tensor:
            return self.head(self.norm(self.encoder(windows.unsqueeze(-1))[0][:, -1]))

    torch.manual_seed(0)
    model: Any = Recurrent()
    with editing(model, [OutputAnchor(KEPT, batch_size=5)]) as edit:
        edit.before_step()
        assert model.norm.num_batches_tracked.item() == 0
        assert all(module.training for module in model.modules())


def test_a_budget_adapts_the_weight():
    model = made()
    before = copy.deepcopy(model).eval()
    budget: Any = ForgettingBudget(0.05, step_size=0.3)
    history, _ = descend(model, [OutputAnchor(KEPT, weight=0.1, batch_size=5), budget], 200)
    with torch.no_grad():
        change = (model(torch.cat(KEPT)) - before(torch.cat(KEPT))).square().mean().item()
    assert 0.02 < change < 0.055
    assert history[-1]["edit/locality/budget_kl"] == pytest.approx(change, rel=0.05)
    assert budget.weight > 0.3


def test_there_are_no_metrics_before_the_first_step():
    with editing(made(), [OutputAnchor(KEPT)]) as edit:
        assert not [name for name in edit.run.collect() if name.startswith("edit/locality")]
