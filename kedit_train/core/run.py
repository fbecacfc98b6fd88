"""One edit of one model: what all its callbacks share, and the order in which things happen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from kedit_train.core.fsdp import reshard, whole
from kedit_train.core.full_precision import FullPrecision
from kedit_train.core.host import Host
from kedit_train.core.output_head import OutputHead, find_language_model
from kedit_train.core.reference_weights import holding, snapshot
from kedit_train.core.requirements import check_requirements
from kedit_train.core.resume import restore, state_of
from kedit_train.core.steps import OptimizerSteps
from kedit_train.core.strategy import follow_dtype, follow_strategy
from kedit_train.core.tokens.loss_head import LossHead
from kedit_train.edit import Edit
from kedit_train.errors import EditError, reported_by

_ATTRIBUTE = "_kedit_run"


class EditRun:
    """The state of one edit. The hosts know *when*; this knows *what*, once for all callbacks on the model.

    Its callbacks are :class:`kedit_train.callbacks.base.EditCallback`, which describes their lifecycle.

    Attributes:
        root: the module that the loop trains (a LightningModule, say); model: the language model in it, or ``root``.
        scope: name -> parameter that may change; names are those of ``model``.
        reference: name -> its value before the edit, for the scope.
        steps: what happens around each optimizer step.
        trainable: parameter -> whether it was trainable before the edit.
        shapes: name -> shape of every parameter when the run was opened, for FSDP1 slices the very objects.
        masters: what keeps a half-precision scope in fp32, where anything does.
        scores: the latest value of every metric that a callback published, for other callbacks to read.
        published_at: metric key -> the optimizer step at which it was last published.
    """

    def __init__(self, root: nn.Module, host: Host) -> None:
        self.root = root
        reshard(root)
        self.host: Any = host
        self.language_model = find_language_model(root)
        self.model = self.language_model or root
        self.callbacks: list[Any] = []
        self.reference: dict[str, Tensor] = {}
        self.scores: dict[str, float] = {}
        self.published_at: dict[str, int] = {}
        self._edits: Sequence[Edit] = ()
        self.closed = self.stopped = False
        self.trainable = {p: p.requires_grad for p in root.parameters()}
        self.scope: dict[str, nn.Parameter] = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.full_precision = False
        self.masters: FullPrecision | None = None
        self.shapes = {name: p.shape for name, p in self.model.named_parameters()}
        self._head: OutputHead | None = None
        self._loss_head: LossHead | None = None
        self._attached: set[int] = set()
        self._finished: set[int] = set()
        self.steps = OptimizerSteps(self)
        self._saved: dict[Any, dict[str, Any]] = {}
        root.__dict__[_ATTRIBUTE] = self

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or pickled model is an ordinary model: the edit under way belongs to the original.
        return type(None), ()

    @property
    def edits(self) -> Sequence[Edit]:
        """What is being edited: what a callback was told, else what the host holds; empty where nobody knows."""
        held = () if self._edits else self.host.edits()
        # Other people's data modules may call something else so.
        ours = isinstance(held, Sequence) and len(held) > 0 and isinstance(held[0], Edit)
        return cast(Sequence[Edit], held) if ours else self._edits

    @edits.setter
    def edits(self, edits: Sequence[Edit]) -> None:
        self._edits = edits

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.steps.count

    @property
    def attached(self) -> bool:
        """Training has started."""
        return bool(self._attached)

    @property
    def needs_reference(self) -> bool:
        """Whether a callback reads what the scope was before the edit as long as training lasts."""
        return any(callback.constrains or callback.anchors for callback in self.callbacks)

    def has_attached(self, callback: Any) -> bool:
        """Whether this callback's work has started."""
        return id(callback) in self._attached

    # -- joining and leaving

    @classmethod
    def join(cls, root: nn.Module, callback: Any, host: Host) -> EditRun:
        """Let ``callback`` take part in the edit of ``root`` by this host; the first to come opens it.

        An edit of the same model that another loop left unfinished is closed first: its hooks go, what it froze is
        given back.
        """
        if isinstance(callback, type):
            raise EditError(f"{callback.__name__} is a class; give an instance, {callback.__name__}(...)")
        run: EditRun | None = root.__dict__.get(_ATTRIBUTE)
        if run is not None and run.host.owner is not host.owner:
            run.close()
            run = None
        run = run or cls(root, host)
        former = getattr(callback, "run", None)
        if former is not None and former is not run and not former.closed:
            # One instance serves one model at a time; a loop that still held the former one is told at its next step.
            former.close()
        if callback not in run.callbacks:
            if callback.single and any(type(other) is type(callback) for other in run.callbacks):
                run.close()
                raise EditError(f"two {type(callback).__name__} callbacks on one model; {callback.single}")
            # By name where the order leaves it open, so that it does not depend on the list.
            run.callbacks = sorted([*run.callbacks, callback], key=lambda c: (c.order, type(c).__name__, repr(c)))
            try:
                with reported_by(type(callback).__name__):
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
        for parameter in self.trainable:
            parameter.requires_grad_(id(parameter) in chosen)
        if self.full_precision:
            self.masters = FullPrecision(self.root, self.scope)
        self.reference = snapshot(self.scope)

    def attach(self, callback: Any) -> None:
        """Start one callback's work; every callback has been prepared."""
        if not self._attached:
            check_requirements(self.callbacks)
            follow_strategy(self)
            follow_dtype(self)
            if self.host.resumed:
                self._saved = restore(self, self.host.saved_state())
            if not self.reference and self.needs_reference:
                with self.unedited():
                    self.reference = snapshot(self.scope)
        if id(callback) not in self._attached:
            self._attached.add(id(callback))
            with reported_by(type(callback).__name__):
                callback.attach(self)
                if callback in self._saved:
                    callback.load_state(self._saved.pop(callback))

    def finish(self, callback: Any) -> None:
        """Training is over for one callback; when it is for all, each ends its work in the order of ``order``."""
        if self.closed or id(callback) not in self._attached:
            return
        self._finished.add(id(callback))
        if self._finished < self._attached:
            return
        if self.steps.count:
            self.steps.check_untouched()
        self._settle()
        for one in filter(self.has_attached, list(self.callbacks)):
            with reported_by(type(one).__name__):
                one.finish(self)
        self.close()

    def close(self) -> None:
        """Leave an ordinary model: no hooks, ``requires_grad`` as it was found."""
        if self.closed:
            return
        self._settle()
        for callback in self.callbacks:
            callback.detach(self)
        self.steps.remove()
        if self._loss_head is not None:
            self._loss_head.remove()
        if self._head is not None:
            self._head.remove()
        for parameter, trainable in self.trainable.items():
            parameter.requires_grad_(trainable)
        self.closed = True
        self.root.__dict__.pop(_ATTRIBUTE, None)

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold; see :func:`kedit_train.core.resume.state_of`."""
        return state_of(self)

    @torch.no_grad()
    def _settle(self) -> None:
        """Give a scope that was trained in fp32 its own dtype back, with every constraint holding in that dtype."""
        masters, self.masters = self.masters, None
        if masters is None:
            return
        masters.remove()
        # Exact: these values were widened from that dtype.
        self.reference |= {name: self.reference[name].to(dtype) for name, dtype in masters.dtypes.items()}
        if self.step:
            # Nothing has been stepped: what is done once a step (an anchor's pull) has been done.
            self.steps.learning_rates = {}
            self.steps.constrain()

    # -- what callbacks use

    def causal(self) -> nn.Module:
        """The causal language model in ``root``."""
        found = self.language_model
        encoder_decoder = getattr(getattr(found, "config", None), "is_encoder_decoder", False)
        if found is None or encoder_decoder:
            reason = "is an encoder-decoder" if encoder_decoder else "has no language-model head"
            raise EditError(
                f"a causal language model is needed, and {type(found or self.root).__name__} {reason}; load it "
                "with AutoModelForCausalLM, or leave this callback out"
            )
        return found

    def head(self) -> OutputHead:
        """The model's output head, verified once."""
        if self._head is None:
            head = OutputHead(self.causal())
            try:
                head.verify(self.host.forward_context())
            except BaseException:
                head.remove()
                raise
            self._head = head
        return self._head

    def loss_head(self) -> LossHead:
        """Return the loss head of the model, which is created on the first call and removed with the run."""
        if self._loss_head is None:
            self._loss_head = LossHead(self.head(), shares=self.host.loss_shares)
        return self._loss_head

    @property
    def reads_hidden_states(self) -> bool:
        """Whether the forward pass under way is one of which a callback keeps only the hidden states."""
        return self._head is not None and self._head.is_capturing

    def tokenizer(self, given: Any | None = None) -> Any:
        """The tokenizer: the one given (an object, a name or a path), the host's, or the one saved with the model."""
        found = given if given is not None else self.host.tokenizer()
        if found is not None and not isinstance(found, str):
            return found
        from transformers import AutoTokenizer

        name = found or getattr(getattr(self.model, "config", None), "_name_or_path", "")
        if not name:
            raise EditError("no tokenizer found; pass tokenizer= (an object, a name or a path)")
        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise EditError(f"no tokenizer at {name!r} ({reason}); pass tokenizer=") from error

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
        # What FSDP2 holds gathered are other tensors than those in scope.
        reshard(self.root)
        head = self.head()
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
        self.published_at.update(dict.fromkeys(metrics, self.step))

    def is_required(self, name: str) -> bool:
        """Return whether a callback of this run requires ``name``, a metric key or a capability."""
        return any(name in needed.any_of for callback in self.callbacks for needed in callback.requires())

    def collect(self) -> dict[str, float]:
        """Gather every callback's metrics since the last log event."""
        gathered: dict[str, float] = {}
        for callback in self.callbacks:
            for key, value in callback.metrics(self).items():
                # A second callback of the same kind (another ball, other texts) has rows of its own.
                while key in gathered:
                    stem, _, number = key.partition("#")
                    key = f"{stem}#{int(number or 1) + 1}"
                gathered[key] = value
        self.publish(gathered)
        return gathered

    def stop(self) -> None:
        """End training after this step."""
        self.stopped = True
        self.host.stop()

    def after_step(self) -> None:
        """Let the callbacks look at the model after an optimizer step, outside of the gradient."""
        for callback in list(self.callbacks):
            with reported_by(type(callback).__name__):
                callback.after_step(self)
