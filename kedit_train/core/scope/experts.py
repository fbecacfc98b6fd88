"""Recognize the experts and the routers of a mixture-of-experts model by the names of its modules.

In such a model, a layer has a block that contains a module ``experts``, a router (``gate`` or ``router``) and sometimes
a shared expert. transformers 5 stores the weights of all experts of a block in one parameter with the shape [experts,
out, in] or [experts, in, out], for example ``mlp.experts.down_proj``. Other models have a list of experts, for example
``mlp.experts.3.down_proj.weight``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

_EXPERTS = "experts"
_SHARED = ("shared_expert", "shared_experts", "shared_mlp")
_ROUTERS = ("gate", "router")
# The gate of a shared expert does not choose experts, but it weights them as a router does.
_GATES = (*_ROUTERS, "shared_expert_gate")


def names_in_dense_model(names: Iterable[str]) -> dict[str, str]:
    """Return, for every weight of an expert, the name that the weight would have in a model without experts.

    Args:
        names: the names of all parameters of a model.

    Returns:
        A dict from the name of an expert's weight to its name in a dense model. Other parameters are left out.

    Example:
        >>> names_in_dense_model(["0.mlp.experts.down_proj", "0.mlp.gate.weight", "0.norm.weight"])
        {'0.mlp.experts.down_proj': '0.mlp.down_proj.weight'}
    """
    names = list(names)
    dense = {}
    for name, block in _in_blocks(names):
        part, *rest = name.removeprefix(f"{block}.").split(".")
        if part == _EXPERTS and len(rest) == 1:
            # The stacked parameter has the name that a module has in a dense model.
            leaf = rest[0]
            rest = [leaf.removesuffix("_bias"), "bias"] if leaf.endswith("_bias") else [leaf, "weight"]
        elif part == _EXPERTS and rest[0].isdigit():
            rest = rest[1:]
        elif part not in _SHARED:
            continue
        dense[name] = ".".join([block, *rest])
    return dense


def router_parameters(names: Iterable[str]) -> dict[str, str]:
    """Find the parameters of the routers and of the gates of shared experts.

    Args:
        names: the names of all parameters of a model.

    Returns:
        A dict. Its keys are the names of the parameters that were found. Each value is the name of the router or gate
        within its block, such as "gate".

    Example:
        >>> router_parameters(["0.mlp.experts.down_proj", "0.mlp.gate.weight", "1.mlp.gate.weight"])
        {'0.mlp.gate.weight': 'gate'}
    """
    parts = {name: name.removeprefix(f"{block}.").split(".")[0] for name, block in _in_blocks(list(names))}
    return {name: part for name, part in parts.items() if part in _GATES}


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the routers that have a weight of shape [experts, hidden].

    A router is left out if this weight is in a submodule of the router.

    Returns:
        A dict from name to router, in the order of the layers.
    """
    modules = dict(model.named_modules())
    parents = [name.removesuffix(_EXPERTS) for name in modules if name.split(".")[-1] == _EXPERTS]
    names = [parent + router for parent in parents for router in _ROUTERS if parent + router in modules]
    found = {name: modules[name] for name in names}
    return {n: m for n, m in found.items() if isinstance(w := getattr(m, "weight", None), Tensor) and w.ndim == 2}


def experts_per_block(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """Return, for each block, the number of experts that have a weight in ``parameters``.

    Shared experts are not counted.

    Args:
        parameters: name -> parameter.

    Example:
        >>> import torch
        >>> experts_per_block({"0.mlp.experts.down_proj": torch.zeros(4, 3, 2), "0.mlp.gate.weight": torch.zeros(4, 3)})
        {'0.mlp': 4}
    """
    listed: dict[str, set[int]] = {}
    for name, block in _in_blocks(list(parameters)):
        part, *rest = name.removeprefix(f"{block}.").split(".")
        if part == _EXPERTS and is_stack(name, parameters[name].shape):
            listed.setdefault(block, set()).update(range(parameters[name].shape[0]))
        elif part == _EXPERTS and rest[0].isdigit():
            listed.setdefault(block, set()).add(int(rest[0]))
    return {block: len(experts) for block, experts in listed.items()}


def is_stack(name: str, shape: Sequence[int]) -> bool:
    """Return whether a parameter of this name and shape contains the weights or biases of all experts of a block."""
    return name.split(".")[-2:-1] == [_EXPERTS] and len(shape) > 1


def _in_blocks(names: list[str]) -> list[tuple[str, str]]:
    """Return the name and the block of each parameter that is in a block with experts."""
    blocks = {name.partition(f".{_EXPERTS}.")[0] for name in names if f".{_EXPERTS}." in name}
    pairs = []
    for name in names:
        parts = name.split(".")
        # The innermost block that contains the parameter.
        owners = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
        if (block := next((owner for owner in owners if owner in blocks), None)) is not None:
            pairs.append((name, block))
    return pairs
