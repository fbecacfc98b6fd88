"""Compute logits from hidden states in the same way as the output head of a causal language model."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.core.fsdp import check_head
from kedit_train.core.scope.adapters import base_model
from kedit_train.errors import EditError
from kedit_train.evaluation_mode import evaluation_mode
from kedit_train.functional.chunked_linear import linear
from kedit_train.functional.precision import HALF

# Model configurations use these names for a number that multiplies or divides the logits.
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


def find_language_model(root: nn.Module) -> nn.Module | None:
    """Return the outermost module in ``root`` that has a language-model head, or None if there is none.

    The returned module may be a PEFT wrapper.
    """
    queue = deque([root])
    while queue:
        module = queue.popleft()
        if (compiled := module._modules.get("_orig_mod")) is not None:
            # torch.compile returns a wrapper, which has the attributes of the module but other parameter names.
            queue.append(compiled)
            continue
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter) and getter() is not None:
            return module
        queue.extend(module.children())
    return None


class OutputHead:
    """Reads the hidden states that enter the output head, and projects hidden states to logits.

    A pre-hook on the head module reads the input of the head. The model has already applied the final norm and any
    scaling to this input. The soft cap of the logits is read from the model's configuration. :meth:`verify` finds the
    scale of the logits, and checks that the projected logits match the logits of the model.

    Args:
        model: a causal language model, possibly with adapters.

    Attributes:
        captured: the hidden states of the last forward pass inside :meth:`capturing`, [batch, length, hidden].
        scale: factor of the logits. It is 1 until :meth:`verify` has run.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        base = base_model(model)
        self.module: nn.Module = base.get_output_embeddings()
        self.config: Any = base.config.get_text_config()
        self.scale: float = 1.0
        self.softcap: Any | None = getattr(self.config, "final_logit_softcapping", None)
        self.captured: Tensor | None = None
        self.autocast: dict[str, Any] = {}
        self._capturing = False
        self._handle = self.module.register_forward_pre_hook(self._enter)

    def __getstate__(self) -> dict[str, Any]:
        # The hooks of a copied or unpickled model must do nothing.
        return {"_capturing": False}

    def remove(self) -> None:
        """Remove the hook from the model."""
        self._handle.remove()

    @contextmanager
    def capturing(self) -> Iterator[OutputHead]:
        """Context manager: store the input of the head, and let the head compute the logits of one position only.

        Computing only one position saves time and memory. The logits of the other positions are not needed, because the
        caller projects the stored hidden states to logits itself.
        """
        self.begin()
        try:
            yield self
        finally:
            self.end()

    @property
    def is_capturing(self) -> bool:
        """Whether the current forward pass stores the hidden states and computes the logits of one position only."""
        return self._capturing

    def begin(self) -> None:
        """Start capturing; :meth:`end` must follow."""
        self.captured, self._capturing = None, True

    def end(self) -> None:
        """Stop capturing."""
        self.captured, self._capturing = None, False

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self._capturing:
            return None
        hidden: Tensor = args[0]
        device = hidden.device.type
        # Hooks on the model run outside of the autocast that accelerate wraps around its forward call, so the autocast
        # state of the projection is read here, inside that call.
        enabled = torch.is_autocast_enabled(device)
        self.autocast = {"device_type": device, "dtype": torch.get_autocast_dtype(device), "enabled": enabled}
        self.captured = hidden
        # The head gets only one position of one row, because one position of each row would be slower to multiply. The
        # slice hidden[:1, -1:] is not used, because it has other strides. On a CPU, torch would then copy a frozen bf16
        # weight for the product.
        return (hidden[0, -1:].unsqueeze(0), *args[1:])

    def hidden(self, **inputs: Any) -> Tensor:
        """Run the model and return the input of its output head, [batch, length, hidden]."""
        # FSDP2 detects the start of the backward pass at the model's output, so the hidden states are added to it.
        handle = self.model.register_forward_hook(self._add_captured, prepend=True)
        try:
            with self.capturing():
                self.model(**inputs, use_cache=False)
                if self.captured is None:
                    raise EditError(
                        f"{type(self.model).__name__} does not call its output head as a module, so its hidden states "
                        "cannot be read; use a model that calls the module returned by get_output_embeddings()."
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
        """Project hidden states to logits, with the autocast settings of the last captured forward pass.

        Args:
            hidden: [N, hidden].
            head: a function to call instead of the head module, for example the head with the weights before the edit.
            fp32_gradients: accumulate the gradients of a half-precision head in fp32, as TRL's fused head does.

        Returns:
            Logits [N, vocabulary] in fp32 (fp64 for fp64 models).
        """
        autocast = self.autocast or {"device_type": hidden.device.type, "enabled": False}
        dtype = self.compute_dtype(hidden)
        module = self.module
        if head is None and type(module) is nn.Linear and "forward" not in vars(module):
            # linear() adds the gradient of a trained weight to the sum over chunks without a second tensor of its size.
            trained = (
                torch.is_grad_enabled() and module.weight.requires_grad and not hasattr(module.weight, "device_mesh")
            )
            if trained or (fp32_gradients and dtype in HALF):
                logits = linear(hidden, module.weight, module.bias, dtype, fp32_gradients=fp32_gradients)
                return self._finish(logits)
        with torch.autocast(**autocast):
            return self._finish((head or self.module)(hidden))

    def compute_dtype(self, hidden: Tensor) -> torch.dtype:
        """Return the dtype of the head's matrix multiplication."""
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
        """The tensors of the head that need a gradient: weight or tied embedding, bias, adapter factors."""
        return [p for p in self.module.parameters() if p.requires_grad]

    @torch.no_grad()
    def verify(self, context: Any) -> None:
        """Check that the model is causal, and find the scale of its logits.

        Args:
            context: the context of the training loop's forward pass, for example autocast.

        Raises:
            EditError: the logits are not finite, the hidden states of a position depend on later tokens, or the output
                head does not reproduce the model's logits.
        """
        name = type(self.model).__name__
        device = next(self.model.parameters()).device
        ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=device) % max(2, self.config.vocab_size)
        forward = inspect.signature(base_model(self.model).forward).parameters
        if "use_cache" not in forward and all(p.kind is not p.VAR_KEYWORD for p in forward.values()):
            raise EditError(
                f"{name} is not a causal language model: its forward() does not accept use_cache; use a model loaded "
                "with AutoModelForCausalLM."
            )
        with evaluation_mode(self.model), context:
            own = self.model(input_ids=ids, use_cache=False).logits.float()
            states = self.hidden(input_ids=ids)
            check_head(self.module)
            with torch.autocast(**self.autocast):
                raw = self.module(states)
        if not bool(own.isfinite().all()):
            raise EditError(
                f"{name} returns NaN or infinite logits before the edit; load other weights or use a wider dtype."
            )
        tolerance = 2e-2 if raw.dtype in HALF else 1e-4
        if not torch.allclose(
            states[0, :-1], states[1, :-1], rtol=tolerance, atol=tolerance * float(states.abs().max())
        ):
            raise EditError(
                f"{name} is not a causal language model: the hidden states of a position depend on later tokens; use "
                "a model loaded with AutoModelForCausalLM."
            )
        given = [float(v) for key in SCALES if (v := getattr(self.config, key, None)) not in (None, 0, 1)]
        # In some configurations, the number multiplies the logits, and in others, it divides them. So both are tried,
        # and the model's own logits decide.
        for scale in [1.0, *(s for v in given for s in (v, 1.0 / v))]:
            self.scale = scale
            if torch.allclose(self._finish(raw).float(), own, rtol=tolerance, atol=tolerance * float(own.abs().max())):
                return
        raise EditError(
            f"the logits of {name} differ from the result of its output head, because the model changes the logits in "
            "a way that its configuration does not describe; remove this callback and use the training loop's own loss."
        )
