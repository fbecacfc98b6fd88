"""Where the model may change: parameters found by layer and dotted pattern in whatever model is given."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from kedit_train.errors import EditError

Layer = int | float | str
Layers = Layer | Sequence[Layer] | None
Modules = str | Sequence[str] | None


def find_layers(model: nn.Module) -> tuple[str, int]:
    """Find the stack of layers: the module list that its configuration counts, else the only outermost one.

    Returns:
        (dotted name, number of layers).
    """
    stacks = {name: len(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    outermost = {n: size for n, size in stacks.items() if not any(n.startswith(f"{other}.") for other in stacks)}
    config = getattr(model, "config", None)
    text_config = getattr(config, "get_text_config", lambda: config)()
    depth = getattr(text_config, "num_hidden_layers", None)
    found = {name: size for name, size in outermost.items() if size == depth} or outermost
    if len(found) != 1:
        what = "no stack of layers" if not found else f"several stacks of layers ({', '.join(found)})"
        raise EditError(
            f"ParameterScope: {type(model).__name__} has {what}; leave out layers= and give full parameter patterns, "
            f"such as modules='{next(iter(stacks), 'encoder.2.linear')}.*'"
        )
    return next(iter(found.items()))


def layer_indices(layers: Layers, depth: int) -> list[int]:
    """Turn what a user writes into sorted indices of a stack of ``depth`` layers.

    An int is an index (negative counts from the end); a float in [0, 1] is a fraction of the depth (0.7 of 12 layers
    is layer 8); a string is either of these, an inclusive range "4-6" or "0.5-0.75", or several, separated by commas.
    """
    if layers is None:
        return list(range(depth))
    items = layers if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
    found = {index for item in items for index in _expand(item, depth)}
    if not found:
        raise EditError(f"ParameterScope: layers={layers!r} names no layer; the model has layers 0 to {depth - 1}")
    return sorted(found)


_NUMBER = r"-?\d+(?:\.\d+)?"


def _expand(item: Layer, depth: int) -> Iterator[int]:
    if isinstance(item, bool) or not isinstance(item, int | float | str):
        raise EditError(f"ParameterScope: layers={item!r} is no layer; write an index, a fraction or a range")
    if isinstance(item, int | float):
        yield _index(item, item, depth)
        return
    for part in item.split(","):
        match = re.fullmatch(rf"\s*({_NUMBER})\s*(?:[-:]\s*({_NUMBER})\s*)?", part)
        if not match:
            raise EditError(
                f"ParameterScope: layers={item!r} is not understood; write an index (5, -1), a fraction (0.7), "
                "a range ('4-6', '0.5-0.75') or several ('2,4-6')"
            )
        ends = [float(n) if "." in n else int(n) for n in match.groups() if n is not None]
        first, last = _index(ends[0], item, depth), _index(ends[-1], item, depth)
        if first > last:
            raise EditError(f"ParameterScope: the range {part.strip()!r} runs backwards; write '{last}-{first}'")
        yield from range(first, last + 1)


def _index(value: int | float, written: Layer, depth: int) -> int:
    if isinstance(value, float):
        if not 0.0 <= value <= 1.0:
            raise EditError(f"ParameterScope: layers={written!r}: a fraction of the depth lies between 0.0 and 1.0")
        # 0.29 of 100 layers is layer 29, whatever binary rounding makes of the product.
        return min(int(value * depth + 1e-9), depth - 1)
    if not -depth <= value < depth:
        raise EditError(
            f"ParameterScope: layers={written!r} is out of range; the model has {depth} layers, 0 to {depth - 1}"
        )
    return value % depth


def matches(name: str, pattern: str) -> bool:
    """Tell whether consecutive dotted parts of ``name`` match the parts of ``pattern`` one to one.

    Parts are compared whole ("layers.2" never means layer 20), ``*`` and ``?`` are wildcards within one part. A
    pattern that ends at a module takes every parameter of that module, its bias as well.
    """
    parts, wanted = name.split("."), pattern.split(".")
    starts = range(len(parts) - len(wanted) + 1)
    return any(all(map(fnmatchcase, parts[i : i + len(wanted)], wanted)) for i in starts)


def resolve_scope(model: nn.Module, layers: Layers = None, modules: Modules = None) -> dict[str, nn.Parameter]:
    """Find the trainable parameters of ``model`` in these layers and modules.

    Tied weights count under every name that they have and are returned once, under the name that
    ``named_parameters()`` gives them.

    Raises:
        EditError: nothing matches, a pattern matches nothing, a layer is out of range, or all that matches is frozen.
    """
    patterns = ["*"] if modules is None else [modules] if isinstance(modules, str) else list(modules)
    if not any(patterns):
        raise EditError(f"ParameterScope: modules={modules!r} names no module; leave it out for all of them")
    named = list(model.named_parameters(remove_duplicate=False))
    if layers is not None:
        stack, depth = find_layers(model)
        roots = {f"{stack}.{index}." for index in layer_indices(layers, depth)}
        named = [(name, p) for name, p in named if any(name.startswith(root) for root in roots)]
    chosen: set[int] = set()
    where = "" if layers is None else f" in layers={layers!r}"
    for pattern in patterns:
        found = [p for name, p in named if matches(name, pattern)]
        if not found:
            raise EditError(
                f"ParameterScope: modules={pattern!r} matches no parameter{where} of {type(model).__name__}; "
                f"there are, for example, {_examples(named)}"
            )
        if not any(p.requires_grad for p in found):
            packed = next((p.dtype for p in found if not p.dtype.is_floating_point), None)
            if packed is not None:
                raise EditError(
                    f"ParameterScope: modules={pattern!r} matches{where} weights stored as "
                    f"{str(packed).removeprefix('torch.')} (quantised), which take no gradient; load the model "
                    "unquantised, or give it an adapter (peft), whose factors the same pattern selects"
                )
            raise EditError(
                f"ParameterScope: everything that modules={pattern!r} matches{where} is frozen already; unfreeze it or "
                "choose other modules (of a model with adapters, modules that carry one)"
            )
        chosen |= {id(p) for p in found if p.requires_grad}
    return {name: p for name, p in model.named_parameters() if id(p) in chosen}


def _examples(named: list[tuple[str, nn.Parameter]]) -> str:
    kinds = list(dict.fromkeys(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) for name, _ in named))
    return ", ".join(kinds[:6]) + (", ..." if len(kinds) > 6 else "") if kinds else "none at all"
