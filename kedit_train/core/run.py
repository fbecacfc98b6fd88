"""One edit of one model: what all its callbacks share, and the order in which things happen."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from kedit_train.core.full_precision import FullPrecision
from kedit_train.core.host import Host
from kedit_train.core.output_head import OutputHead, find_language_model
from kedit_train.core.reference import holding, snapshot
from kedit_train.core.sharding import check_gradients, check_precision, placed_like, reshard, whole
from kedit_train.data.edit import Edit
from kedit_train.errors import EditError

_ATTRIBUTE = "_kedit_run"


class EditRun:
    """The state of one edit. The hosts know *when*; this knows *what*, once for all callbacks on the model.

    Its callbacks are :class:`kedit_train.callbacks.base.EditCallback`, which describes their lifecycle.

    Attributes:
        root: the module that the loop trains (a LightningModule, say); model: the language model in it, or ``root``.
        scope: name -> parameter that may change; names are those of ``model``.
        reference: name -> its value before the edit, for the scope.
        step: optimizer steps taken.
        learning_rates: name -> the learning rate (None where the optimizer has none of its own) with which a scoped
            parameter has just been stepped; without those that were passed over for want of a gradient.
        scores: the latest value of every metric that a callback published, for other callbacks to read.
        edits: what is being edited, where a callback or the host knows it.
    """

    def __init__(self, root: nn.Module, host: Host) -> None:
        self.root = root
        reshard(root)
        self.host: Any = host
        self.language_model = find_language_model(root)
        self.model = self.language_model or root
        self.callbacks: list[Any] = []
        self.reference: dict[str, Tensor] = {}
        self.step = 0
        self.learning_rates: dict[str, float | None] = {}
        self.scores: dict[str, float] = {}
        self.edits: Sequence[Edit] = ()
        self.closed = self.stopped = False
        self._trainable = {p: p.requires_grad for p in root.parameters()}
        self.scope: dict[str, nn.Parameter] = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.full_precision = False
        self._masters: FullPrecision | None = None
        self._shapes = {name: p.shape for name, p in self.model.named_parameters()}
        self._head: OutputHead | None = None
        self._attached: set[int] = set()
        self._penalised: bool | None = None
        self._steppers: set[int] = set()
        # From the beginning, so that a loop that never reaches the run is noticed; weakly, so that they keep no model.
        self._handles: list[Any] = [
            register_optimizer_step_pre_hook(_weakly(self._before_optimizer)),
            register_optimizer_step_post_hook(_weakly(self._after_optimizer)),
        ]
        self._saved: dict[Any, dict[str, Any]] = {}
        root.__dict__[_ATTRIBUTE] = self

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or pickled model is an ordinary model: the edit under way belongs to the original.
        return type(None), ()

    # -- joining and leaving

    @classmethod
    def join(cls, root: nn.Module, callback: Any, host: Host) -> EditRun:
        """Let ``callback`` take part in the edit of ``root`` by this host; the first to come opens it.

        An edit of the same model that another loop left unfinished is closed first: its hooks go, what it froze is
        given back.
        """
        run: EditRun | None = root.__dict__.get(_ATTRIBUTE)
        if run is not None and run.host.owner is not host.owner:
            run.close()
            run = None
        run = run or cls(root, host)
        if callback not in run.callbacks:
            run.callbacks = sorted([*run.callbacks, callback], key=lambda c: c.order)
            try:
                callback.prepare(run)
            except BaseException:
                run.close()
                raise
        return run

    def leads(self, callback: Any) -> bool:
        """Whether this callback is the one through which the host's events reach the run."""
        return not self.closed and self.callbacks[0] is callback

    def set_scope(self, scope: Mapping[str, nn.Parameter]) -> None:
        """Let these parameters change and nothing else, and remember what they were."""
        self.scope = dict(scope)
        chosen = {id(p) for p in scope.values()}
        for parameter in self._trainable:
            parameter.requires_grad_(id(parameter) in chosen)
        if self.full_precision:
            self._masters = FullPrecision(self.root, self.scope)
        self.reference = snapshot(self.scope)

    def attach(self, callback: Any) -> None:
        """Start one callback's work; every callback has been prepared."""
        if not self._attached:
            self._follow_strategy()
            self._follow_dtype()
            if self.host.resumed:
                self._restore(self.host.saved_state())
            if not self.reference and any(callback.constrains for callback in self.callbacks):
                with self.unedited():
                    self.reference = snapshot(self.scope)
        if id(callback) not in self._attached:
            self._attached.add(id(callback))
            callback.attach(self)
            if callback in self._saved:
                callback.load_state(self._saved.pop(callback))

    def finish(self, callback: Any) -> None:
        """End one callback's work; the last to go closes the run."""
        if self.closed or id(callback) not in self._attached:
            return
        self._settle()
        callback.finish(self)
        self._attached.discard(id(callback))
        if not self._attached:
            self.close()

    def close(self) -> None:
        """Leave an ordinary model: no hooks, ``requires_grad`` as it was found."""
        if self.closed:
            return
        self._settle()
        for callback in self.callbacks:
            callback.detach(self)
        for handle in self._handles:
            handle.remove()
        if self._head is not None:
            self._head.remove()
        for parameter, trainable in self._trainable.items():
            parameter.requires_grad_(trainable)
        self.closed = True
        self.root.__dict__.pop(_ATTRIBUTE, None)

    def _follow_strategy(self) -> None:
        """Strategies may have replaced parameters since: FSDP2 makes them DTensors of the same name and shape.

        One that changes names or shapes (FSDP1 and DeepSpeed flatten and slice) would leave the constraints without
        the weights that they hold.
        """
        reshard(self.root)
        # Noted when the run was set up: FSDP1 slices the very objects.
        shapes = {name: self._shapes[name] for name in self.scope}
        now = dict(self.model.named_parameters())
        lost = next((name for name in shapes if name not in now or now[name].shape != shapes[name]), None)
        reason = self.host.refused()
        if lost is not None:
            reason = f"the parameter {lost} of shape {tuple(shapes[lost])} has been flattened, sliced or renamed"
        if reason is not None:
            raise EditError(
                f"this strategy would void the edit's constraints: {reason}; use DDP, FSDP2 "
                "(fully_shard) or one process"
            )
        self.scope = {name: now[name] for name in shapes}
        check_precision(self.scope.values(), widened=self._masters is not None and bool(self._masters.dtypes))
        self.reference = {name: placed_like(value, self.scope[name]) for name, value in self.reference.items()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold for the edit to go on as if it had not been interrupted."""
        callbacks = {name: callback.state() for name, callback in self._named().items()}
        reference = {name: whole(value) for name, value in self.reference.items()}
        return {"step": self.step, "reference": reference, "callbacks": callbacks}

    def _named(self) -> dict[str, Any]:
        names = [type(callback).__name__ for callback in self.callbacks]
        return {
            f"{name}.{names[:i].count(name)}": c for i, (name, c) in enumerate(zip(names, self.callbacks, strict=True))
        }

    def _restore(self, state: dict[str, Any] | None) -> None:
        if state is None:
            raise EditError(
                "the checkpoint holds no state of this edit, so the weights before it are unknown; resume from one "
                "written with these callbacks (with transformers in output_dir), or begin anew from the unedited model"
            )
        if set(state["reference"]) != set(self.reference):
            raise EditError(
                f"the checkpoint was written with another scope ({len(state['reference'])} tensors, now "
                f"{len(self.reference)}); resume with the same ParameterScope"
            )
        named = self._named()
        missing = [name for name, callback in named.items() if callback.state() and name not in state["callbacks"]]
        if missing:
            raise EditError(f"the checkpoint was written without {', '.join(missing)}; resume with the same callbacks")
        # Never what the model held when the run was set up: it may have been loaded from the checkpoint itself.
        for name, value in state["reference"].items():
            parameter = self.scope[name]
            self.reference[name] = placed_like(value.to(device=parameter.device, dtype=parameter.dtype), parameter)
        self.step = state["step"]
        self._saved = {
            callback: state["callbacks"][name] for name, callback in named.items() if name in state["callbacks"]
        }

    def _follow_dtype(self) -> None:
        """A strategy may have converted the model (Lightning's bf16-true) since the scope was set."""
        converted = {
            n: p.dtype for n, p in self.scope.items() if n in self.reference and p.dtype != self.reference[n].dtype
        }
        if not converted:
            return
        if self.full_precision and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise EditError(
                "the scope would be trained in fp32, but the model was converted to half precision after several "
                "processes had been wired up; load the model in half precision and leave the trainer's precision at "
                "32-true, or give ParameterScope full_precision=False"
            )
        self.reference |= {name: self.reference[name].to(dtype) for name, dtype in converted.items()}
        if self.full_precision:
            if self._masters is not None:
                # The strategy has undone what it did; its casts must not be stacked under new ones.
                self._masters.remove()
            self._masters = FullPrecision(self.root, self.scope)
            self.reference = {name: value.to(self.scope[name].dtype) for name, value in self.reference.items()}

    @torch.no_grad()
    def _settle(self) -> None:
        """Give a scope that was trained in fp32 its own dtype back, with every constraint holding in that dtype."""
        masters, self._masters = self._masters, None
        if masters is None:
            return
        masters.remove()
        # Exact: these values were widened from that dtype.
        self.reference |= {name: self.reference[name].to(dtype) for name, dtype in masters.dtypes.items()}
        if self.step:
            # Nothing has been stepped: what is done once a step (an anchor's pull) has been done.
            self.learning_rates = {}
            self._constrain()

    # -- what callbacks use

    def head(self, needed_by: str) -> OutputHead:
        """The model's output head, verified once."""
        if self._head is None:
            if self.language_model is None:
                raise EditError(
                    f"{needed_by} needs a causal language model, and {type(self.root).__name__} has no language-model "
                    "head; load it with AutoModelForCausalLM, or leave this callback out"
                )
            head = OutputHead(self.language_model)
            try:
                head.verify(self.host.forward_context())
            except BaseException:
                head.remove()
                raise
            self._head = head
        return self._head

    def tokenizer(self, needed_by: str, given: Any | None = None) -> Any:
        """The tokenizer: the one given (an object, a name or a path), the host's, or the one saved with the model."""
        found = given if given is not None else self.host.tokenizer()
        if found is not None and not isinstance(found, str):
            return found
        from transformers import AutoTokenizer

        name = found or getattr(getattr(self.model, "config", None), "_name_or_path", "")
        if not name:
            raise EditError(f"{needed_by}: no tokenizer found; pass tokenizer= (an object, a name or a path)")
        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise EditError(f"{needed_by}: no tokenizer at {name!r} ({reason}); pass tokenizer=") from error

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Within, the model is the one before the edit."""
        if self.reference:
            reshard(self.root)
            with holding(self.scope, self.reference):
                yield
                reshard(self.root)
        elif self.step or self.host.resumed:
            raise EditError(
                "the model before the edit is needed and its weights are no longer there (training has begun, or was "
                "resumed from a checkpoint); add ParameterScope, which keeps them"
            )
        else:
            yield

    def reference_head(self) -> Any | None:
        """A callable that projects through the head as it was before the edit; None where the head does not change."""
        head = self.head("the reference")
        own = {id(p): name for name, p in head.module.named_parameters()}
        changing = {name: p for name, p in self.scope.items() if id(p) in own}
        if not changing:
            return None
        if isinstance(head.module, FSDPModule):
            raise EditError(
                "the output head is in scope and sharded by itself, so its weights before the edit cannot be put in "
                "its place; leave it out of the scope, or apply fully_shard to the whole model only"
            )
        if not self.reference:
            with self.unedited():
                kept = snapshot(changing)
        else:
            kept = self.reference
        values = {own[id(p)]: whole(kept[name]) for name, p in changing.items()}
        return lambda hidden: torch.func.functional_call(head.module, values, (hidden,))

    def describe_scope(self) -> dict[str, Any]:
        """Say what may change, for reports."""
        trained, total = self.scope.values(), self.model.parameters()
        return {
            "tensors": list(self.scope),
            "parameters": sum(p.numel() for p in trained),
            "of": sum(p.numel() for p in total),
        }

    def publish(self, metrics: Mapping[str, float]) -> None:
        """Make metrics known to the other callbacks."""
        self.scores.update(metrics)

    def collect(self) -> dict[str, float]:
        """Gather every callback's metrics since the last log event."""
        gathered: dict[str, float] = {}
        for callback in self.callbacks:
            gathered.update(callback.metrics(self))
        self.publish(gathered)
        return gathered

    def stop(self) -> None:
        """End training after this step."""
        self.stopped = True
        self.host.stop()

    # -- one optimizer step

    def penalty(self) -> Tensor | None:
        """The sum of the callbacks' penalties, on the first call for an optimizer step; None afterwards."""
        if self._penalised is not None:
            return None
        self._steppers.clear()
        terms = [term for callback in self.callbacks if (term := callback.penalty(self)) is not None]
        self._penalised = bool(terms)
        return torch.stack(terms).sum() if terms else None

    def before_optimizer(self, optimizer: Any) -> None:
        """Gradients are complete: where a callback wants no step and no penalty pulls, take them away.

        A parameter without gradient is passed over by every optimizer, its state included; one with a zero gradient is
        not: momentum and weight decay move it.
        """
        self._check_announced(optimizer)
        check_gradients(self.scope.values())
        skip = [callback.skip_step(self) for callback in self.callbacks]
        if any(skip) and not self._penalised:
            for parameter in self._trainable:
                parameter.grad = None

    def begin_step(self) -> None:
        """A new optimizer step begins, whatever became of the last one (a gradient scaler may have left it out)."""
        self._penalised = None

    def _check_announced(self, optimizer: Any) -> None:
        penalises = any(callback.penalises for callback in self.callbacks)
        if self._attached and (self._penalised is not None or not (self.host.announces_steps or penalises)):
            return
        if self._steppers and id(optimizer) not in self._steppers:
            # Another optimizer's part of the step that was announced.
            return
        if self.host.releases:
            self.close()
        raise EditError(self.host.unannounced())

    def after_step(self) -> None:
        """Let the callbacks look at the model after an optimizer step, outside of the gradient."""
        for callback in list(self.callbacks):
            callback.after_step(self)

    def _before_optimizer(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # With a closure the gradients are those of the step before (Lightning's automatic optimization); there the
        # host's own event after the backward pass calls before_optimizer.
        # torch hands the optimizer itself over as the first argument.
        closure = next((a for a in args if a is not optimizer), kwargs.get("closure"))
        if closure is None and self._ours(optimizer):
            self.before_optimizer(optimizer)

    @torch.no_grad()
    def _after_optimizer(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._ours(optimizer):
            return
        self.step += 1
        self._penalised = None
        self._steppers.add(id(optimizer))
        self.learning_rates = self._rates(optimizer)
        self._constrain()
        self.host.stepped(self)

    def _constrain(self) -> None:
        """Write back what the callbacks make of the weights, in their order; what did not change is not written."""
        constraining = [c for c in self.callbacks if c.constrains]
        if not constraining:
            return
        stepped: dict[str, Tensor] = {name: p.detach() for name, p in self.scope.items()}
        weights = dict(stepped)
        for callback in constraining:
            weights = callback.constrain(weights, self.reference)
        for name, parameter in self.scope.items():
            # Not by address, which is 0 for every sharded tensor (FSDP2).
            if weights[name] is not stepped[name]:
                parameter.copy_(weights[name])

    def _rates(self, optimizer: Optimizer) -> dict[str, float | None]:
        names = {id(p): name for name, p in self.scope.items()}
        return {
            names[id(p)]: None if (rate := group.get("lr")) is None else float(rate)
            for group in optimizer.param_groups
            for p in group["params"]
            if id(p) in names and p.grad is not None
        }

    def _ours(self, optimizer: Optimizer) -> bool:
        ours = {id(p) for p in self.scope.values()}
        return any(id(p) in ours for group in optimizer.param_groups for p in group["params"])


def _weakly(method: Any) -> Any:
    held = weakref.WeakMethod(method)

    def hook(*args: Any) -> None:
        alive = held()
        if alive is not None:
            alive(*args)

    return hook
