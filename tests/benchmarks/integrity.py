"""Time of a step with the integrity checks and without them, and with constraints and without any callback.

    python tests/benchmarks/integrity.py --clock cpu
    python tests/benchmarks/integrity.py --setting small-half --rounds 5 --clock cpu

A step of a plain loop trains down-projection matrices with AdamW. The constraints are ParameterScope, GradientMask and
NormBall. The checks are those of ``kedit_train/core/integrity.py``; they are switched off in this script only. All
variants take their steps in turn.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from paired import alternate, arguments, clock, ratios, record, spread, table
from workload import SIZES, llama, plain_loop, rows_of

from kedit_train import world
from kedit_train.callbacks import GradientMask, NormBall, ParameterScope
from kedit_train.core import steps

NONE, SCOPE = "no callback, frozen to the scope", "ParameterScope"
ALL = "ParameterScope + GradientMask + NormBall"
UNCHECKED = f"{ALL}, checks off"


class NoChecks:
    """Has the methods of ``Integrity``, which do nothing."""

    def __init__(self, run: Any) -> None:
        pass

    def start(self) -> None:
        pass

    def before_step(self) -> bool:
        return False

    def check_optimizer(self, optimizer: Any) -> None:
        pass

    def frozen_checksums(self) -> dict[str, int]:
        return {}

    def check_frozen_gradients(self) -> None:
        pass

    def check_gradients(self, names: Any) -> None:
        pass

    def after_step(self) -> None:
        pass

    def finish(self) -> bool:
        return False

    def record_scope(self) -> None:
        pass

    def record_frozen(self) -> None:
        pass

    def end(self) -> None:
        pass

    def changed(self) -> str | None:
        return None

    def changed_in_scope(self) -> list[str]:
        return []


class Setting(NamedTuple):
    """A model of ``SIZES`` or the bundled one, the layers in scope, sequences per step and steps per measurement."""

    model: str
    layers: range
    batch: int
    steps: int


SETTINGS = {
    "world": Setting("world", range(3, 6), 12, 5),
    "small-one": Setting("small", range(9, 10), 16, 1),
    "small-half": Setting("small", range(6, 12), 16, 1),
    "tiny": Setting("tiny", range(2, 4), 4, 2),
}


def scoped(model: Any, layers: range) -> list[torch.nn.Parameter]:
    return [model.model.layers[i].mlp.down_proj.weight for i in layers]


def twin(model: Any, layers: range) -> Any:
    """Return a copy of the model with its own matrices in scope. All other tensors are shared."""
    own = {id(p) for p in scoped(model, layers)}
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in own})


def without_callbacks(model: Any, rows: Any, pad_id: int, setting: Setting) -> Callable[[], None]:
    from kedit_train.data.tokenization import collate

    own = {id(p) for p in scoped(model, setting.layers)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in own)
    optimizer = torch.optim.AdamW(scoped(model, setting.layers), lr=1e-4, weight_decay=0.0)

    def step() -> None:
        batch = collate([rows[i] for i in torch.randperm(len(rows))[: setting.batch].tolist()], pad_id=pad_id)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(name: str, options: argparse.Namespace) -> None:
    setting = SETTINGS[name]
    model = world.load()[0].train() if setting.model == "world" else llama(setting.model, options)
    vocab = model.config.vocab_size
    rows = rows_of(2 * setting.batch, vocab)
    scope = lambda: ParameterScope(f"{setting.layers[0]}-{setting.layers[-1]}", modules="mlp.down_proj")  # noqa: E731
    constrained = lambda: [scope(), GradientMask(score="random"), NormBall()]  # noqa: E731
    built: dict[str, Callable[[], None]] = {}
    with ExitStack() as stack:
        # Parameters that several variants share keep one requires_grad flag, so each variant sets the same flags.
        for variant, callbacks in {SCOPE: lambda: [scope()], ALL: constrained, UNCHECKED: constrained}.items():
            with patch.object(steps, "Integrity", NoChecks if variant == UNCHECKED else steps.Integrity):
                loop = plain_loop(twin(model, setting.layers), rows, 2, callbacks(), lr=1e-4, batch_size=setting.batch)
                built[variant] = stack.enter_context(loop)
        built[NONE] = without_callbacks(twin(model, setting.layers), rows, 2, setting)

        def repeat(step: Callable[[], None]) -> Callable[[], None]:
            return lambda: [step() for _ in range(setting.steps)] and None

        for step in built.values():
            # The first step compares all frozen parameters.
            step()
            step()
        taken = alternate({n: repeat(s) for n, s in built.items()}, options.rounds, clock(options))
    entries = sum(p.numel() for p in scoped(model, setting.layers)), sum(p.numel() for p in model.parameters())
    times = [[n, f"{1000 * statistics.median(s) / setting.steps:.1f}"] for n, s in taken.items()]
    bars = [
        ["the checks: on / off", spread(ratios(taken[ALL], taken[UNCHECKED]), 3), "<= 1.05"],
        [f"{ALL} / no callback", spread(ratios(taken[ALL], taken[NONE]), 3), "<= 1.05"],
        ["the same, checks off / no callback", spread(ratios(taken[UNCHECKED], taken[NONE]), 3), ""],
    ]
    layers, width, *_ = SIZES.get(setting.model, (model.config.num_hidden_layers, model.config.hidden_size))
    body = (
        f"{setting.model}: {layers} layers, width {width}, {entries[0] / 1e6:.2f} of {entries[1] / 1e6:.1f} million "
        f"entries in scope; {setting.batch} sequences of about 32 tokens a step; {options.rounds} rounds of "
        f"{setting.steps} steps.\n\n{table(['variant', 'ms a step'], times)}\n\n"
        f"{table(['ratio', 'median (least to greatest)', 'bar'], bars)}"
    )
    record(f"Cost of the integrity checks, {name}", body, options)


def main() -> None:
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--setting", choices=list(SETTINGS), help="default: all but tiny")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [options.setting] if options.setting else [name for name in SETTINGS if name != "tiny"]
    if options.quick:
        chosen, options.rounds = ["tiny"], 2
    for name in chosen:
        measure(name, options)


if __name__ == "__main__":
    main()
