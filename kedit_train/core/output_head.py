"""The language-model head of a causal model: from hidden states to logits, exactly as the model itself does it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.core.fsdp import check_head
from kedit_train.errors import EditError
from kedit_train.functional.chunked_linear import linear
from kedit_train.functional.precision import HALF

# What model configurations call the number that logits are multiplied or divided by.
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


def find_language_model(root: nn.Module) -> nn.Module | None:
    """Find the outermost module below ``root`` that has a language-model head (adapters included), or None."""
    queue = deque([root])
    while queue:
        module = queue.popleft()
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter) and getter() is not None:
            return module
        queue.extend(module.children())
    return None


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch every module to evaluation, and each back to what it was."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class OutputHead:
    """Reads what enters the head and projects it where asked.

    Works through a pre-hook on the head module, so whatever the model does to its hidden states before (final norm,
    scaling) is honoured; what it does to the logits after (scale, soft-capping) is read from the configuration and
    checked against the model's own logits once, by :meth:`verify`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        base: Any = model
        base = base.get_base_model() if hasattr(base, "get_base_model") else base
        self.module: nn.Module = base.get_output_embeddings()
        self.config: Any = base.config.get_text_config()
        self.scale, self.softcap = 1.0, getattr(self.config, "final_logit_softcapping", None)
        self.captured: Tensor | None = None
        self.autocast: dict[str, Any] = {}
        self._capturing = False
        self._handle = self.module.register_forward_pre_hook(self._enter)

    def __getstate__(self) -> dict[str, Any]:
        # A copied or pickled model takes its hooks along; there they do nothing.
        return {"_capturing": False}

    def remove(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()

    @contextmanager
    def capturing(self) -> Iterator[OutputHead]:
        """Within, keep what the model's own forward hands to its head, and let the head compute one position only."""
        self.begin()
        try:
            yield self
        finally:
            self.end()

    @property
    def is_capturing(self) -> bool:
        """Whether the forward pass under way is one of which only the hidden states are kept."""
        return self._capturing

    def begin(self) -> None:
        self.captured, self._capturing = None, True

    def end(self) -> None:
        self.captured, self._capturing = None, False

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self._capturing:
            return None
        hidden: Tensor = args[0]
        device = hidden.device.type
        # Hooks on the model run outside of the autocast that accelerate wraps around its forward, so the state in which
        # the model would have projected is noted here, where it is in force.
        enabled = torch.is_autocast_enabled(device)
        self.autocast = {"device_type": device, "dtype": torch.get_autocast_dtype(device), "enabled": enabled}
        self.captured = hidden
        # Of one row: a position of each would be multiplied row by row, a quarter of a step on a CPU.
        return (hidden[:1, -1:], *args[1:])

    def hidden(self, **inputs: Any) -> Tensor:
        """Run the model and return what its head reads, [B, S, d]."""
        # Part of what the model returns, for it is from there that FSDP2 learns of the backward pass.
        handle = self.model.register_forward_hook(self._add_captured, prepend=True)
        try:
            with self.capturing():
                self.model(**inputs, use_cache=False)
                if self.captured is None:
                    raise EditError(
                        f"{type(self.model).__name__} does not call its output head as a module, so its hidden states "
                        "cannot be read; use a model whose forward calls the module that get_output_embeddings() "
                        "returns"
                    )
                return self.captured
        finally:
            handle.remove()

    def _add_captured(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, dict):
            output["hidden_states"] = (self.captured,)
            return output
        return (*output, self.captured) if isinstance(output, tuple) else output

    def project(self, hidden: Tensor, head: Any | None = None, *, fp32_gradients: bool = False) -> Tensor:
        """Project [N, d] to logits [N, V], fp32 (fp64 stays), under the autocast of the captured forward.

        Args:
            head: what to call instead of the head module (its pre-edit weights, for example).
            fp32_gradients: in half precision, accumulate gradients in fp32, as TRL's fused head does.
        """
        autocast = self.autocast or {"device_type": hidden.device.type, "enabled": False}
        dtype = self.compute_dtype(hidden)
        module = self.module
        if head is None and type(module) is nn.Linear and "forward" not in vars(module):
            # The gradient of a trained weight goes into the sum over chunks, not into a second tensor of its size.
            trained = (
                torch.is_grad_enabled() and module.weight.requires_grad and not hasattr(module.weight, "device_mesh")
            )
            if trained or (fp32_gradients and dtype in HALF):
                logits = linear(hidden, module.weight, module.bias, dtype, fp32_gradients=fp32_gradients)
                return self._finish(logits)
        with torch.autocast(**autocast):
            return self._finish((head or self.module)(hidden))

    def compute_dtype(self, hidden: Tensor) -> torch.dtype:
        """The dtype in which the head multiplies."""
        return self.autocast["dtype"] if self.autocast.get("enabled") else hidden.dtype

    def _finish(self, logits: Tensor) -> Tensor:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    @property
    def trained(self) -> list[Tensor]:
        """The tensors of the head that take a gradient (weight or tied embedding, bias, an adapter's factors)."""
        return [p for p in self.module.parameters() if p.requires_grad]

    @torch.no_grad()
    def verify(self, context: Any) -> None:
        """Check causality, and find the logit scale that reproduces the model's own logits.

        Args:
            context: the host's forward context (autocast).

        Raises:
            EditError: the model looks ahead, or its logits cannot be reproduced from its head.
        """
        name = type(self.model).__name__
        device = next(self.model.parameters()).device
        ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=device) % max(2, self.config.vocab_size)
        with evaluation_mode(self.model), context:
            own = self.model(input_ids=ids, use_cache=False).logits.float()
            states = self.hidden(input_ids=ids)
            check_head(self.module)
            with torch.autocast(**self.autocast):
                raw = self.module(states)
        if not bool(own.isfinite().all()):
            raise EditError(
                f"{name} gives NaN or infinite logits before the edit: its weights are broken; load another"
            )
        tolerance = 2e-2 if raw.dtype in HALF else 1e-4
        if not torch.allclose(
            states[0, :-1], states[1, :-1], rtol=tolerance, atol=tolerance * float(states.abs().max())
        ):
            raise EditError(f"{name} is no causal language model: an earlier position changes with a later token")
        given = [float(v) for key in SCALES if (v := getattr(self.config, key, None)) not in (None, 0, 1)]
        # Configurations disagree on whether the number multiplies or divides; the model's own logits decide.
        for scale in [1.0, *(s for v in given for s in (v, 1.0 / v))]:
            self.scale = scale
            if torch.allclose(self._finish(raw).float(), own, rtol=tolerance, atol=tolerance * float(own.abs().max())):
                return
        raise EditError(
            f"the logits of {name} cannot be reproduced from its output head (it changes them in a way that its "
            "configuration does not name), so a loss on them would be wrong; use the host's own loss with this model"
        )
