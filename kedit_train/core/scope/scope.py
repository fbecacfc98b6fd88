"""Select the parameters that may change (the scope) by layer and by module pattern, in any model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from fnmatch import fnmatchcase

from torch import nn

from kedit_train.arguments import cut
from kedit_train.core.scope.computed_weights import computed_weights
from kedit_train.core.scope.experts import names_in_dense_model, router_parameters
from kedit_train.core.scope.language_part import language_path, parts_outside_language_model
from kedit_train.data.visible import is_visible
from kedit_train.errors import EditError

Layer = int | float | str
Layers = Layer | Sequence[Layer] | None
Modules = str | Sequence[str] | None
_NUMBER = r"-?\d+(?:\.\d+)?"


def find_layers(model: nn.Module) -> tuple[str, int]:
    """Find the stack of layers of a model.

    The stack is the outermost ``nn.ModuleList`` that has ``config.num_hidden_layers`` entries. If no list has this
    length, the model must have exactly one outermost ``nn.ModuleList``. In a model that also reads images or audio,
    only the lists inside the language model count.

    Returns:
        The dotted name of the stack and the number of its layers.

    Raises:
        EditError: the model has no stack of layers, or several.
    """
    stacks = {name: len(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    language = language_path(model)
    if language is not None:
        stacks = {name: size for name, size in stacks.items() if name.startswith(f"{language}.")}
    outermost = {n: size for n, size in stacks.items() if not any(n.startswith(f"{other}.") for other in stacks)}
    config = getattr(model, "config", None)
    text_config = getattr(config, "get_text_config", lambda: config)()
    depth = getattr(text_config, "num_hidden_layers", None)
    candidates = {name: size for name, size in outermost.items() if size == depth} or outermost
    if len(candidates) != 1:
        problem = f"several stacks of layers ({', '.join(candidates)})" if candidates else "no stack of layers"
        raise EditError(
            f"layers= needs a model with exactly one stack of layers, but {type(model).__name__} has {problem}; remove "
            "layers= and select parameters by their full names, for example "
            f'modules="{next(iter(stacks), "encoder.2.linear")}.*"'
        )
    return next(iter(candidates.items()))


def layer_indices(layers: Layers, depth: int) -> list[int]:
    """Return the sorted indices of the selected layers.

    Args:
        layers: the selection. An int is an index; a negative int counts from the last layer. A float in [0, 1] is a
            fraction of the depth: in a model with 12 layers, 0.7 is layer 8. A string contains indices, fractions and
            inclusive ranges ("4-6", "0.5-0.75"), separated by commas. A sequence contains ints, floats and such
            strings. None selects every layer.
        depth: number of layers.

    Raises:
        EditError: a layer is invalid or out of range, or no layer is selected.

    Example:
        >>> layer_indices("0.5-0.75", 12)
        [6, 7, 8, 9]
        >>> layer_indices([0, "4-6", -1], 12)
        [0, 4, 5, 6, 11]
    """
    if layers is None:
        return list(range(depth))
    indices = {index for item in _items(layers) for index in _expand(item, depth)}
    if not indices:
        raise EditError(f"layers must select at least one layer between 0 and {depth - 1}, got {layers!r}.")
    return sorted(indices)


def check_selection(layers: Layers, modules: Modules) -> None:
    """Check ``layers`` and ``modules`` as far as this is possible without a model.

    Raises:
        EditError: ``layers`` or ``modules`` has a wrong type or contains an empty string, or a string in ``layers``
            does not describe layers.
    """
    for item in () if layers is None else _items(layers):
        for part, ends in _parts(item):
            # Two indices that count from different ends, or an index and a fraction, can be compared only if the number
            # of layers is known.
            if isinstance(ends[0], float) == isinstance(ends[-1], float) and (ends[0] < 0) == (ends[-1] < 0):
                _check_order(part, ends[0], ends[-1])
    _patterns(modules)


def _items(layers: Layers) -> list[Layer]:
    """Return the values in ``layers``."""
    several = isinstance(layers, Sequence | Set) and not isinstance(layers, str | bytes)
    items: list[Layer] = list(layers) if several else [layers]  # type: ignore[arg-type]
    for item in items:
        blank = several and isinstance(item, str) and not is_visible(item)
        if blank or isinstance(item, bool) or not isinstance(item, int | float | str):
            raise EditError(
                "each value in layers must be an index (5, -1), a fraction (0.7) or a range ('4-6'), got "
                f"{cut(repr(item))}{', which is blank' if blank else ''}."
            )
    return items


def _parts(item: Layer) -> list[tuple[str, list[int | float]]]:
    """Split one value in ``layers`` at its commas, and return the text and the numbers of each part.

    A range has two numbers. An index or a fraction has one.
    """
    if not isinstance(item, str):
        return [(str(item), [item])]
    parts = []
    for part in item.split(","):
        match = re.fullmatch(rf"\s*({_NUMBER})\s*(?:[-:]\s*({_NUMBER})\s*)?", part)
        if not match:
            raise EditError(
                "layers must be an index (5, -1), a fraction (0.7), a range ('4-6', '0.5-0.75'), or several of these "
                f"separated by commas ('2,4-6'), got {cut(repr(item))}."
            )
        parts.append((part.strip(), [float(n) if "." in n else int(n) for n in match.groups() if n is not None]))
    return parts


def _expand(item: Layer, depth: int) -> Iterator[int]:
    for part, ends in _parts(item):
        first, last = _index(ends[0], item, depth), _index(ends[-1], item, depth)
        _check_order(part, first, last)
        yield from range(first, last + 1)


def _check_order(part: str, first: float, last: float) -> None:
    if first > last:
        raise EditError(f"a range in layers must start at its lower layer, got {part!r}; write '{last}-{first}'.")


def _index(value: int | float, layers: Layer, depth: int) -> int:
    if isinstance(value, float):
        if not 0.0 <= value <= 1.0:
            raise EditError(
                f"a fraction in layers must be in [0, 1], got {_found(value, layers)}; if you mean an index, write it "
                "without a decimal point."
            )
        # The small number undoes binary rounding: 0.29 of 100 layers is layer 29.
        return min(int(value * depth + 1e-9), depth - 1)
    if not -depth <= value < depth:
        raise EditError(
            f"an index in layers must be from 0 to {depth - 1}, or from -{depth} to -1 to count from the end, got "
            f"{_found(value, layers)}."
        )
    return value % depth


def _found(value: int | float, layers: Layer) -> str:
    return f"{value}" if isinstance(layers, int | float) else f"{value} in {layers!r}"


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern matches a parameter name or consecutive parts of it.

    Name and pattern are split at the dots. Whole parts are compared, so "layers.2" never matches layer 20. ``*`` and
    ``?`` are wildcards within a part. A pattern that names a module matches all of its parameters, including the bias.

    Example:
        >>> matches("model.layers.2.mlp.down_proj.weight", "mlp.*_proj")
        True
        >>> matches("model.layers.20.mlp.down_proj.weight", "layers.2")
        False
    """
    parts, wanted = name.split("."), pattern.split(".")
    starts = range(len(parts) - len(wanted) + 1)
    return any(all(map(fnmatchcase, parts[i : i + len(wanted)], wanted)) for i in starts)


def resolve_scope(model: nn.Module, layers: Layers = None, modules: Modules = None) -> dict[str, nn.Parameter]:
    """Return the trainable parameters in the selected layers and modules.

    A pattern can match a tied weight by any of its names. The result contains the tied weight only once, under its
    name in ``named_parameters()``.

    In a mixture-of-experts model, a pattern also matches the weights of experts by the names that they would have in a
    dense model: "mlp.down_proj" matches ``mlp.experts.down_proj`` and ``mlp.shared_expert.down_proj.weight``. Routers
    are selected only by a pattern that contains the name of the router ("mlp.gate"), or by "*".

    In a model that also reads images or audio, patterns match the parameters of the language model. A part outside of
    the language model is selected only by a pattern that contains its name ("visual.blocks"), or by "*".

    torch computes some weights from other parameters, for example with weight norm. If a pattern matches such a weight,
    the patterns must also match all trainable parameters from which the weight is computed.

    Args:
        model: any module.
        layers: the selected layers, as in :func:`layer_indices`. None also includes parameters outside the layers.
        modules: one pattern or several, as in :func:`matches`. None selects all modules in the selected layers, but no
            routers and no parts outside of the language model.

    Returns:
        A dict from name to parameter.

    Raises:
        EditError: a layer is out of range, a pattern selects no trainable parameter, or the patterns match a computed
            weight but leave out a trainable parameter from which it is computed.
    """
    patterns = _patterns(modules)
    named = list(model.named_parameters(remove_duplicate=False))
    prefixes: tuple[str, ...] = ("",)
    if layers is not None:
        stack, depth = find_layers(model)
        prefixes = tuple(f"{stack}.{index}." for index in layer_indices(layers, depth))
        named = [(name, p) for name, p in named if name.startswith(prefixes)]
    parts = parts_outside_language_model(model)
    _check_computed(model, prefixes, patterns, parts)
    dense, routers = names_in_dense_model(name for name, _ in named), router_parameters(name for name, _ in named)
    # Parameter -> the name that a pattern must contain to select it.
    required = routers | parts
    selected: set[int] = set()
    within = "" if layers is None else f" in layers={layers!r}"
    for pattern in patterns:
        matched = [pair for pair in named if matches(pair[0], pattern) or matches(dense.get(pair[0], ""), pattern)]
        whole_model = modules is not None and pattern == "*"
        matching = [p for name, p in matched if whole_model or required.get(name, "") in ("", *pattern.split("."))]
        if matched and not matching and (part := parts.get(matched[0][0])):
            raise EditError(
                f"modules={pattern!r}{within} matches only parameters outside of the language model, which stay frozen "
                f"unless a pattern contains the name of their part; select other modules, or write {part!r} in the "
                f"pattern, for example modules='{part}.*'."
            )
        if matched and not matching:
            raise EditError(
                f"modules={pattern!r}{within} matches only routers, which stay frozen unless a pattern contains "
                f"their name; select other modules, or set modules={routers[matched[0][0]]!r}."
            )
        if not matching:
            raise EditError(
                f"modules={pattern!r} matches no parameter{within} of {type(model).__name__}; choose from these "
                f"parameters: {_examples(named)}"
            )
        if not any(p.requires_grad for p in matching):
            packed = next((p.dtype for p in matching if not p.dtype.is_floating_point), None)
            if packed is not None:
                raise EditError(
                    f"modules={pattern!r}{within} matches quantized weights ({str(packed).removeprefix('torch.')}), "
                    "which cannot be trained; load the model without quantization, or add a PEFT adapter."
                )
            raise EditError(
                f"modules={pattern!r}{within} matches only frozen parameters; unfreeze them, or select other modules. "
                "In a model with PEFT adapters, select modules that have an adapter."
            )
        selected |= {id(p) for p in matching if p.requires_grad}
    return {name: p for name, p in model.named_parameters() if id(p) in selected}


def _check_computed(
    model: nn.Module, prefixes: tuple[str, ...], patterns: Sequence[str], parts: Mapping[str, str]
) -> None:
    """Raise an error if the patterns match a computed weight without its trainable parameters."""
    for weight in computed_weights(model):
        part = next((parts[name] for name in weight.originals if name in parts), "")
        matching = [p for p in patterns if matches(weight.name, p) and part in ("", *p.split("."))]
        pattern = next((p for p in matching if weight.name.startswith(prefixes)), None)
        trainable = [name for name, parameter in weight.originals.items() if parameter.requires_grad]
        if pattern is not None and not all(any(matches(name, p) for p in patterns) for name in trainable):
            raise EditError(
                f"modules={pattern!r} matches {weight.name}, which is not a parameter: {weight.source} computes this "
                f"weight from {', '.join(trainable)}. To train the weight, set modules={weight.module or trainable!r}, "
                f"or call {weight.remedy} before the edit. To keep it frozen, use a pattern that does not match it."
            )


def _patterns(modules: Modules) -> list[str]:
    """Return the patterns in ``modules``."""
    if modules is None:
        return ["*"]
    several = isinstance(modules, Sequence | Set) and not isinstance(modules, str | bytes)
    patterns = list(modules) if several else [modules]
    # An empty pattern would match every parameter that is not the weight of an expert.
    if not patterns or not all(isinstance(pattern, str) and is_visible(pattern) for pattern in patterns):
        raise EditError(
            'modules must be a pattern (for example "mlp.down_proj"), a list of patterns, or None for all modules, and '
            f"neither a pattern nor the list may be empty, got {cut(repr(modules))}."
        )
    return patterns  # type: ignore[return-value]


def _examples(named: list[tuple[str, nn.Parameter]]) -> str:
    kinds = list(dict.fromkeys(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) for name, _ in named))
    return ", ".join(kinds[:6]) + (", ..." if len(kinds) > 6 else "") if kinds else "none"
