"""Compute the outputs of a model on given inputs before the edit and during training."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.arguments import Rule
from kedit_train.core.drift.model_batches import model_input_batch
from kedit_train.core.locality.model_inputs import hash_model_inputs
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError
from kedit_train.evaluation_mode import evaluation_mode

# Selects one tensor of the model's output: its name, its index, or a function of the output.
Selection = str | int | Callable[[Any], Tensor] | None
SELECTION = Rule(
    "a name, an index, a function of the output, or None",
    lambda value: value is None or callable(value) or (isinstance(value, str | int) and not isinstance(value, bool)),
)


class ModelOutputs:
    """Runs a module in evaluation mode on given inputs, and selects one tensor of its output.

    Args:
        run: the run whose model is called.
        items: the inputs, one item per forward pass.
        output: selects the tensor. A string is a key of a dict or the name of an attribute, an integer is an index of a
            tuple, and a function receives the whole output. None requires that the output itself is a tensor.
        module: name of the submodule to call. None calls the model itself.
        argument: name of the argument that holds the inputs, for error messages.

    Raises:
        EditError: there is no submodule with this name.
    """

    def __init__(
        self, run: EditRun, items: Sequence[Any], output: Selection, module: str | None, argument: str
    ) -> None:
        self.run, self.items, self.output, self.argument = run, items, output, argument
        self.module: nn.Module = run.model
        if module is not None:
            try:
                self.module = run.root.get_submodule(module)
            except AttributeError:
                children = ", ".join(name for name, _ in run.root.named_children())
                raise EditError(
                    f"module must be the name of a submodule of {type(run.root).__name__}, got {module!r}; use one of "
                    f"{children}, or leave module out."
                ) from None

    def __call__(self, index: int) -> Tensor:
        """Return the output for one item. If gradients are enabled, the output can be differentiated."""
        batch = model_input_batch(self.items[index], next(self.run.model.parameters()).device)
        with evaluation_mode(self.module), _recurrent_gradients(self.module), self.run.host.forward_context():
            return self._select(batch.call(self.module), index)

    def mask(self, index: int) -> Tensor | None:
        """Return the ``attention_mask`` of an item as bool, or None if the item has none."""
        item = self.items[index]
        mask = item.get("attention_mask") if isinstance(item, Mapping) else None
        return mask.bool() if isinstance(mask, Tensor) else None

    @torch.no_grad()
    def before_training(self) -> list[Tensor]:
        """Return one output per item, as tensors on the CPU.

        Raises:
            EditError: the model cannot be called with an item, or its output is empty or contains NaN or infinite
                values.
        """
        return [self._checked(index) for index in range(len(self.items))]

    def _checked(self, index: int) -> Tensor:
        try:
            value = self(index)
        except EditError:
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            raise EditError(
                f"{type(self.module).__name__} cannot be called with {self.argument}[{index}] ({reason}); pass "
                "keyword arguments as a dict and positional arguments as a tuple, or set module= to another module."
            ) from error
        if not value.numel():
            raise EditError(
                f"the output for {self.argument}[{index}] is empty (shape {tuple(value.shape)}); leave this item out, "
                "or select another tensor with output=."
            )
        if not bool(value.isfinite().all()):
            raise EditError(
                f"the output for {self.argument}[{index}] contains NaN or infinite values before training; leave this "
                "item out, or select finite values with output=."
            )
        return value.detach().to("cpu", copy=True)

    def _select(self, value: Any, index: int) -> Tensor:
        kind = f"output of {type(self.module).__name__} for {self.argument}[{index}]"
        wanted = self.output
        if callable(wanted):
            try:
                chosen = wanted(value)
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
                raise EditError(
                    f"the function output= failed for the {kind} ({reason}); correct this function."
                ) from error
        elif wanted is None:
            chosen = value
        elif isinstance(wanted, int):
            chosen = value[wanted] if isinstance(value, tuple | list) and -len(value) <= wanted < len(value) else None
        else:
            chosen = value.get(wanted) if isinstance(value, Mapping) else getattr(value, wanted, None)
        if isinstance(chosen, Tensor) and chosen.is_floating_point():
            return chosen
        got = f"a tensor of {chosen.dtype}" if isinstance(chosen, Tensor) else type(chosen).__name__
        if isinstance(value, Mapping):
            got += f" (the output has {', '.join(map(str, value))})"
        elif isinstance(value, tuple | list):
            got += f" (the output is a tuple of {len(value)})"
        elif isinstance(value, Tensor) and chosen is None:
            raise EditError(
                f"the {kind} is a tensor, so output= must be None or a function, got {wanted!r}; leave out output=."
            )
        raise EditError(
            f"output must select a tensor of floats from the {kind}, got {got}; set output= to a name, an index or a "
            "function of the output."
        )


class ReferenceOutputs:
    """Stores the outputs of the unedited model, and draws the inputs in shuffled order.

    Args:
        outputs: computes the outputs of the current model.
        seed: seed of the draws. Every item is drawn once before any item is drawn again.

    Attributes:
        before: the outputs of the unedited model, one CPU tensor per item. Empty until the outputs are computed or
            loaded from a checkpoint.
    """

    def __init__(self, outputs: ModelOutputs, seed: int = 0) -> None:
        self.outputs, self.before, self._seed = outputs, list[Tensor](), seed
        self._start_draws()

    def start(self) -> None:
        """Compute the outputs of the model before the edit. A resumed run reads them from its checkpoint instead."""
        if not self.outputs.run.host.resumed:
            self._compute()

    def draw(self, n: int) -> list[int]:
        """Return the indices of the next ``n`` items, or of all items if there are fewer."""
        if not self.before:
            # The checkpoint of a resumed run was written without this callback.
            self._compute()
        self._draws += 1
        return [next(self._order) for _ in range(min(n, len(self.before)))]

    def all_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return the result of :meth:`pair` for every item."""
        if not self.before:
            self._compute()
        return [self.pair(index) for index in range(len(self.before))]

    def pair(self, index: int) -> tuple[Tensor, Tensor]:
        """Return two outputs for one item: the first from the unedited model, the second from the current model.

        Both tensors are on the device of the model.

        Raises:
            EditError: the two outputs have different shapes.
        """
        now, before = self.outputs(index), self.before[index]
        if now.shape != before.shape:
            raise EditError(
                f"the output for {self.outputs.argument}[{index}] must keep the shape {tuple(before.shape)} that it "
                f"had before training, got {tuple(now.shape)}; use a model whose output shape depends only on its "
                "inputs."
            )
        return before.to(now.device, non_blocking=True), now

    @property
    def nbytes(self) -> int:
        """Size of the stored outputs in bytes."""
        return sum(tensor.nbytes for tensor in self.before)

    def state(self) -> dict[str, Any]:
        """Return the checkpoint state: the number of draws, a hash of the inputs, and the stored outputs."""
        outputs = {str(index): tensor for index, tensor in enumerate(self.before)}
        return {"draws": self._draws, "inputs": hash_model_inputs(self.outputs.items), "outputs": outputs}

    def load_state(self, state: dict[str, Any], batch_size: int = 0) -> None:
        """Restore the state of a checkpoint, so that the next draw is the first draw after the checkpoint.

        Args:
            state: as returned by :meth:`state`.
            batch_size: number of items per draw.

        Raises:
            EditError: the checkpoint was written with other inputs.
        """
        if state["inputs"] != hash_model_inputs(self.outputs.items):
            raise EditError(
                f"the checkpoint was written with other {self.outputs.argument}; resume with the same "
                f"{self.outputs.argument}, or start a new run."
            )
        self.before = [state["outputs"][str(index)] for index in range(len(self.outputs.items))]
        self._start_draws()
        for _ in range(state["draws"]):
            self.draw(batch_size)

    def _compute(self) -> None:
        with self.outputs.run.reference_model():
            self.before = self.outputs.before_training()

    def _start_draws(self) -> None:
        self._draws, self._order = 0, self._shuffled(random.Random(self._seed))

    def _shuffled(self, shuffler: random.Random) -> Iterator[int]:
        while True:
            order = list(range(len(self.outputs.items)))
            shuffler.shuffle(order)
            yield from order


@contextmanager
def _recurrent_gradients(module: nn.Module) -> Iterator[None]:
    """Context manager: disable cuDNN if the module has recurrent layers on a GPU.

    cuDNN cannot compute the gradients of recurrent layers in evaluation mode.
    """
    recurrent = any(isinstance(part, nn.RNNBase) and part.weight_ih_l0.is_cuda for part in module.modules())
    if not recurrent:
        yield
        return
    with torch.backends.cudnn.flags(enabled=False):
        yield
