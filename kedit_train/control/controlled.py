"""``controlled``: generation in which hidden states move along the gradient of a value function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kedit_train.arguments import Rule, at_least, check_arguments, integer_from
from kedit_train.compatibility import cache_argument
from kedit_train.control.positions import GeneratedPositions
from kedit_train.control.sites import HEAD, Layer, Site, causal_model, find_sites, hidden_size
from kedit_train.control.value import ValueModel, describe_model
from kedit_train.core.scope.scope import find_layers
from kedit_train.errors import EditError, reported_by, warn
from kedit_train.functional.gradient_control import ascend


@dataclass
class Control:
    """The number and the mean size of the changes that a ``controlled`` block has made so far.

    Attributes:
        positions: number of changed hidden states. Each generated position has one hidden state per controlled layer.
            Without a key-value cache, every forward pass changes and counts the earlier generated positions again.
    """

    positions: int = 0
    _change: Tensor | float = 0.0

    @property
    def mean_change(self) -> float:
        """The mean norm of a change, as a fraction of the norm of the hidden state. 0 if nothing was changed."""
        return float(self._change) / max(1, self.positions)

    def count(self, before: Tensor, after: Tensor) -> None:
        """Count changed hidden states.

        Args:
            before: the hidden states before the change, [N, hidden].
            after: the same hidden states after the change, [N, hidden].
        """
        norm = before.float().norm(dim=-1).clamp(min=1e-30)
        self._change = self._change + ((after.float() - before.float()).norm(dim=-1) / norm).sum().detach()
        self.positions += len(before)


@contextmanager
def controlled(
    model: nn.Module,
    value: ValueModel,
    *,
    step_size: float,
    steps: int = 1,
    radius: float = 0.1,
    layers: Sequence[Layer] | None = None,
    first_token: bool = False,
) -> Iterator[Control]:
    """Context manager: during generation, move hidden states along the gradient of a value function.

    At each generated position, ``steps`` gradient steps are made: ``h <- h + step_size * gradient of value(h)``. The
    argument ``radius`` limits the size of the change (trust region). The weights do not change. The hidden states of
    the prompt do not change either, except at its last token if ``first_token`` is True. The layers above a controlled
    layer read the changed hidden state, so the change also affects their key-value cache, and thus later tokens.

    With ``step_size=0``, ``steps=0`` or ``radius=0``, the model computes exactly the same as without the block. When
    the block ends, also with an error, all hooks are removed.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        value: the value function, trained by :class:`~kedit_train.control.ValueModule`.
        step_size: factor by which the gradient is multiplied in each gradient step, 0 or more. With a large
            ``step_size``, every change has the largest norm that ``radius`` allows.
        steps: number of gradient steps at each generated position and each layer, 0 or more.
        radius: the largest norm of a change, as a fraction of the norm of the hidden state, 0 or more.
        layers: the layers to control: indices, or "head" for the input of the output head. ``value`` must have been
            trained on these layers. None: all layers of ``value``.
        first_token: if True, the last token of the prompt is also controlled, because the model generates the first
            token from it. If False, control begins only after the first generated token.

    Yields:
        A :class:`Control` with the number of controlled positions and the mean change.

    Raises:
        EditError: an argument is out of range, ``value`` was not trained on one of the layers, the hidden size of the
            model differs from that of ``value``, or the model has no key-value cache.

    References:
        "Aligning Large Language Models with Representation Editing: A Control Perspective", arXiv 2406.05954.

    Example:
        >>> from kedit_train import generate_answers, world
        >>> from kedit_train.control import ValueModel, controlled
        >>> model, tokenizer = world.load()
        >>> value = ValueModel(["head"], hidden_size=model.config.hidden_size)
        >>> with controlled(model, value, step_size=1.0, radius=0.05) as control:
        ...     answers = generate_answers(model, tokenizer, [world.edits(1)[0].prompt])
        >>> control.mean_change <= 0.05
        True
    """
    with reported_by("controlled"):
        check_arguments(
            "controlled",
            value=(value, Rule("a ValueModel", lambda given: isinstance(given, ValueModel))),
            step_size=(step_size, at_least(0)),
            steps=(steps, integer_from(0)),
            radius=(radius, at_least(0)),
            first_token=(first_token, Rule("True or False", lambda given: isinstance(given, bool))),
        )
        inner, sites = causal_model(model), _sites(model, value, layers)
    control = Control()
    if not (step_size and steps and radius):
        yield control
        return
    positions, device = GeneratedPositions(first_token), next(value.parameters()).device
    mask: Tensor | None = None

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal mask
        mask = positions.read(module, args, kwargs)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal mask
        mask = None

    def change(site: Site, hidden: Tensor) -> Tensor | None:
        if mask is None:
            return None
        # The output head may receive only the last positions (logits_to_keep).
        here = mask[:, mask.shape[1] - hidden.shape[1] :].to(hidden.device)
        if not bool(here.any()):
            return None
        before = hidden[here]
        after = ascend(
            before,
            lambda h: value.at(site.name, h.to(device)).to(h.device),
            step_size=step_size,
            steps=steps,
            radius=radius,
        )
        control.count(before, after)
        return hidden.masked_scatter(here[..., None], after)

    with ExitStack() as stack:
        hooks = [inner.register_forward_pre_hook(enter, with_kwargs=True)]
        # always_call=True: the mask is also removed if the forward pass raises an error.
        hooks.append(inner.register_forward_hook(leave, always_call=True))
        hooks += [site.register(lambda hidden, site=site: change(site, hidden)) for site in sites]
        for hook in hooks:
            stack.callback(hook.remove)
        yield control


def find_value_sites(model: nn.Module, value: ValueModel, layers: Sequence[Layer] | None) -> list[Site]:
    """Return the :class:`Site` of each layer in ``layers``. With ``layers=None``, use all layers of ``value``.

    Raises:
        EditError: a layer does not exist, or has no value function.
    """
    indices = [int(name) for name in value.layers if name != HEAD]
    if layers is None and indices and max(indices) >= (depth := find_layers(causal_model(model))[1]):
        raise EditError(
            f"value was trained on another model: it has a value function for layer {max(indices)}, but this model has "
            f"{depth} layers; use the model that the value function was trained for."
        )
    sites = find_sites(model, value.layers if layers is None else layers)
    for site in sites:
        if site.name not in value.layers:
            raise EditError(
                f"layers must be among the layers of the value function ({', '.join(value.layers)}), got {site.name}; "
                "train a value function for this layer."
            )
    return sites


def _sites(model: nn.Module, value: ValueModel, layers: Sequence[Layer] | None) -> list[Site]:
    """Check the arguments of :func:`controlled`, and return the sites to control."""
    inner = causal_model(model)
    if cache_argument(inner) is None:
        raise EditError(
            f"{type(inner).__name__}.forward must have an argument for a key-value cache, but has none; control needs "
            "the cache to tell generated tokens from the prompt, so use a model with the default key-value cache of "
            "transformers."
        )
    sites = find_value_sites(model, value, layers)
    if hidden_size(model) != value.hidden_size:
        raise EditError(
            f"value must be trained on hidden states of size {hidden_size(model)}, got {value.hidden_size}; use the "
            "model that the value function was trained for."
        )
    if "model_hash" in value.trained_on:
        described = describe_model(model)
        if any(value.trained_on[key] != described[key] for key in described):
            warn(
                "the value function was trained on another model or on other weights: that model has "
                f"{value.trained_on['model_layers']} layers, and this model has {described['model_layers']} layers; "
                "use the model that the value function was trained on, or train a new value function."
            )
    return sites
