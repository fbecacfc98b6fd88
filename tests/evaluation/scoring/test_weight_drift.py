"""Weight drift against its formulas, in chunks of several sizes."""

from __future__ import annotations

import pytest
import torch

from kedit_train.evaluation.scoring import weight_drift as drift


class Weights(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.randn(7, 11))
        self.nothing = torch.nn.Parameter(torch.zeros(0, 3))
        self.narrow = torch.nn.Parameter(torch.randn(5).bfloat16())

    def generate(self) -> None:
        """The evaluator takes any module with this method for a language model."""


@pytest.mark.parametrize("chunk", [4, 2**22])
def test_weight_drift_does_not_depend_on_the_chunk_size(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "_CHUNK", chunk)
    model = Weights()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.matrix[2] += 0.5
        model.narrow[1] *= 2
    change = torch.cat(
        [(p.detach().double() - before[name].double()).flatten() for name, p in model.named_parameters()]
    )
    size = torch.cat([value.double().flatten() for value in before.values()])
    by_tensor = drift.tensor_drift(model, before)
    found = drift.total_drift(by_tensor)
    assert found["relative"].value == pytest.approx(float(change.norm() / size.norm()), rel=1e-12)
    assert found["largest"].value == float(change.abs().max())
    assert found["moved"].value == 12 / 82
    assert {score.n for score in found.values()} == {82}
    # The norms per tensor, without the tensor that did not change.
    norms = drift.norms_by_tensor(by_tensor)
    assert norms.keys() == {"matrix", "narrow"}
    for name, values in norms.items():
        old = before[name].double()
        assert values["change"] == pytest.approx(
            float((model.get_parameter(name).detach().double() - old).norm()), rel=1e-12
        )
        assert values["before"] == pytest.approx(float(old.norm()), rel=1e-12)
