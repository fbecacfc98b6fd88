"""The combinations of settings that ``tune`` tries, and the callbacks of a run with one combination."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from kedit_train import callbacks
from kedit_train.arguments import Rule, at_least, check_arguments, within

Layers = int | float | str

# Every run stops when the mean loss of an epoch is below STOP_LOSS, which kedit_default also uses, or after EPOCHS
# epochs.
EPOCHS, BATCH_SIZE, STOP_LOSS = 80, 25, 0.01
# Texts per step of KLLocality, and prompts per edit that NullSpace preserves (as in kedit_default).
KL_BATCH_SIZE, NEIGHBORS = 2, 24


@dataclass(frozen=True, kw_only=True)
class TuneSetting:
    """One combination of settings.

    Args:
        layers: the layers to train (argument ``layers`` of ``ParameterScope``).
        modules: the modules to train (argument ``modules`` of ``ParameterScope``).
        step_size: how much a step should reduce the loss, as a fraction of the loss (argument of ``PolyakStep``).
        energy: how much of the energy of the layer inputs is preserved, as a fraction (argument of ``NullSpace``).
        kl_weight: weight of ``KLLocality``. 0 leaves the callback out.

    Example:
        >>> str(TuneSetting(layers=0.7, modules="mlp.down_proj.weight", step_size=0.05, energy=0.9, kl_weight=0.0))
        'layers 0.7, step 0.05, energy 0.9, KL 0'
    """

    layers: Layers
    modules: str
    step_size: float
    energy: float
    kl_weight: float

    def callback_arguments(self, texts: Any) -> list[tuple[str, dict[str, Any]]]:
        """Return the class name and the arguments of each callback. Runs and recipes are built from this list.

        Args:
            texts: the texts on which predictions should stay the same.
        """
        kl = {"texts": texts, "weight": self.kl_weight, "batch_size": KL_BATCH_SIZE}
        return [
            ("ParameterScope", {"layers": self.layers, "modules": self.modules}),
            ("TokenLoss", {"objective": "cross_entropy", "reduction": "sample"}),
            ("NullSpace", {"texts": texts, "neighbors": NEIGHBORS, "energy": self.energy, "batch_size": 64}),
            ("PolyakStep", {"step_size": self.step_size}),
            *([("KLLocality", kl)] if self.kl_weight else []),
        ]

    def build_callbacks(self, texts: Any, factors_path: Any, cache: Any) -> list[Any]:
        """Return new callback objects for a run with this setting.

        Args:
            texts: the texts on which predictions should stay the same.
            factors_path: the file with the statistics of the texts. Settings with the same scope share this file.
            cache: the folder of reference hidden states. All settings share this folder.
        """
        shared = {"NullSpace": {"factors_path": factors_path}, "KLLocality": {"cache": cache}}
        return [
            getattr(callbacks, name)(**arguments, **shared.get(name, {}))
            for name, arguments in self.callback_arguments(texts)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the setting as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"layers {self.layers}, step {self.step_size:g}, energy {self.energy:g}, KL {self.kl_weight:g}"


# The settings of recipes/kedit_default.yaml.
RECOMMENDED = TuneSetting(layers="0.5-0.8", modules="mlp.down_proj.weight", step_size=0.05, energy=0.9, kl_weight=0.0)


@dataclass(frozen=True, kw_only=True)
class TuneGrid:
    """The values that :func:`~kedit_train.modes.tune` tries, in all combinations.

    Args:
        layers: values for the argument ``layers`` of ``ParameterScope``. The default has two values: 0.66 is a single
            layer, and "0.5-0.8" is a range of layers in the middle of the network.
        modules: the modules to train in these layers. Only weights of linear layers are supported.
        step_sizes: values for the argument ``step_size`` of ``PolyakStep``, as fractions of the training loss.
        energies: values for the argument ``energy`` of ``NullSpace``.
        kl_weights: values for the argument ``weight`` of ``KLLocality``. A run with the value 0 does not use
            ``KLLocality`` and takes less time.

    Raises:
        EditError: a list is empty, or a value is out of range.

    Example:
        >>> from kedit_train.modes import TuneGrid
        >>> len(TuneGrid().settings())
        12
        >>> len(TuneGrid(layers=[0.7], step_sizes=[0.1], energies=[0.9, 0.95], kl_weights=[0]).settings())
        2
    """

    layers: Sequence[Layers] = (0.66, "0.5-0.8")
    modules: str = "mlp.down_proj.weight"
    step_sizes: Sequence[float] = (0.03, 0.05, 0.1)
    energies: Sequence[float] = (0.9,)
    kl_weights: Sequence[float] = (0.0, 3.0)

    def __post_init__(self) -> None:
        check_arguments(
            self,
            layers=(self.layers, _each(Rule("an index, a fraction or a range", lambda x: isinstance(x, Layers)))),
            step_sizes=(self.step_sizes, _each(within("(0, 1]"))),
            energies=(self.energies, _each(within("(0, 1]"))),
            kl_weights=(self.kl_weights, _each(at_least(0))),
        )

    def settings(self) -> list[TuneSetting]:
        """Return all combinations without repetitions.

        If the grid contains the setting of the recipe ``kedit_default``, this setting comes first. All other settings
        are sorted by KL weight (smallest first), then by layers (in the order of the grid), then by step size (largest
        first).

        This order puts faster runs first, because :func:`~kedit_train.modes.tune` leaves out the last settings if the
        budget is small. If several settings are equally good, the first one is picked.
        """
        kl_weights = sorted({float(weight) for weight in self.kl_weights})
        step_sizes = sorted({float(step) for step in self.step_sizes}, reverse=True)
        lists = (kl_weights, self.layers, step_sizes, map(float, self.energies))
        settings = dict.fromkeys(
            TuneSetting(layers=layers, modules=self.modules, step_size=step, energy=energy, kl_weight=weight)
            for weight, layers, step, energy in product(*lists)
        )
        return sorted(settings, key=lambda setting: setting != RECOMMENDED)


def _each(rule: Rule) -> Rule:
    def holds(values: Any) -> bool:
        return (
            isinstance(values, Sequence)
            and not isinstance(values, str)
            and len(values) > 0
            and all(map(rule.holds, values))
        )

    return Rule(f"a list with at least one value, each {rule.expected}", holds)
