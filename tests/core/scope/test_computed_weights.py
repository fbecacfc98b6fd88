"""Weights that torch computes from other parameters: a pattern must not skip them silently."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_weight_norm

from kedit_train.core.scope.scope import resolve_scope
from kedit_train.errors import EditError


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


COMPUTED: dict[str, tuple[Any, str, str]] = {
    "weight_norm": (
        parametrizations.weight_norm,
        r"parametrizations\.weight\.original0, .*parametrizations\.weight\.original1",
        "remove_parametrizations",
    ),
    "own": (
        lambda linear: parametrize.register_parametrization(linear, "weight", Doubled()),
        r"parametrizations\.weight\.original",
        "remove_parametrizations",
    ),
    "old weight_norm": (nn.utils.weight_norm, r"0\.proj\.weight_g, 0\.proj\.weight_v", "remove_weight_norm"),
    "old spectral_norm": (nn.utils.spectral_norm, r"0\.proj\.weight_orig", "remove_spectral_norm"),
    "prune": (lambda linear: prune.l1_unstructured(linear, "weight", 0.5), r"0\.proj\.weight_orig", "prune.remove"),
}
pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")


def model() -> nn.Module:
    block = lambda: nn.ModuleDict({"proj": nn.Linear(4, 4)})  # noqa: E731
    return nn.Sequential(block(), block())


@pytest.mark.parametrize(("compute", "names", "remedy"), COMPUTED.values(), ids=COMPUTED)
def test_a_pattern_that_skips_a_computed_weight_is_an_error(compute: Any, names: str, remedy: str) -> None:
    net = model()
    compute(net[0].proj)
    with pytest.raises(
        EditError,
        match=r"^modules='proj\.weight' matches 0\.proj\.weight, .* "
        rf"computes this weight from .*{names}.*modules='0\.proj'.*{remedy}",
    ) as error:
        resolve_scope(net, modules="proj.weight")
    assert "\n" not in str(error.value)
    # The name of the module selects the parameters from which the weight is computed.
    assert len(resolve_scope(net, modules="proj")) == len(list(net.parameters()))
    assert list(resolve_scope(net, modules="1.proj.weight")) == ["1.proj.weight"]


def test_a_computed_weight_may_stay_frozen() -> None:
    net = model()
    parametrizations.weight_norm(net[0].proj)
    net[0].requires_grad_(False)
    assert list(resolve_scope(net, modules="proj.weight")) == ["1.proj.weight"]


def test_a_weight_whose_computation_was_removed_is_an_ordinary_weight() -> None:
    net = model()
    remove_weight_norm(nn.utils.weight_norm(net[0].proj))
    parametrize.remove_parametrizations(parametrizations.weight_norm(net[1].proj), "weight")
    assert list(resolve_scope(net, modules="proj.weight")) == ["0.proj.weight", "1.proj.weight"]


def test_a_pattern_that_matches_only_computed_weights_names_them() -> None:
    net = model()
    parametrizations.weight_norm(net[0].proj)
    with pytest.raises(EditError, match=r"matches 0\.proj\.weight.*original0"):
        resolve_scope(net, modules="0.proj.weight")
