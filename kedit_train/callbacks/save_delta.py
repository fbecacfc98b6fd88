"""Where is my edited model? What the run changed, as one file that applies to the base and comes off again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kedit_train.callbacks.base import EditCallback
from kedit_train.core.fsdp import full_tensor, reshard, shard_like
from kedit_train.core.output_head import evaluation_mode
from kedit_train.core.reference_weights import snapshot, temporary_values
from kedit_train.core.requirements import Requirement
from kedit_train.core.run import EditRun
from kedit_train.data import EditDataset
from kedit_train.delta import EditDelta
from kedit_train.delta.bitwise import same_bits
from kedit_train.delta.weight_source import Weights, weights_of
from kedit_train.errors import EditError

_PROMPTS = 8


class SaveDelta(EditCallback):
    """Save what the run changed as an :class:`~kedit_train.delta.EditDelta`, and check the file before saying so.

    The file is read back, applied to the weights before the edit and compared with the trained ones, bit for bit; where
    the edits are known, so are the logits for some of their prompts. A run that moved no weight is an error. The model
    is left as it is: with ``at="best"`` it goes on from the last step, and the file holds the best one.

    Of a run on adapters (PEFT) the file holds the merged weights of the base model, as ``merge_and_unload()`` makes
    them, and the weights alone are compared; the adapter itself is what PEFT saves. Where processes share the work one
    of them writes. Without ``ParameterScope`` a copy of everything trainable is kept for the comparison.

    Args:
        path: the file, ``.safetensors``; folders are made, an earlier file is replaced.
        at: ``"end"``, or ``"best"``: the highest ``edit/reliability`` (then ``edit/locality``, then the earlier step)
            of the looks that ``EditMetrics(every_n_steps=...)`` takes.
        edits: what was edited, an ``EditDataset`` or a path; None takes those of ``EditMetrics`` or of Lightning's data
            module, where there are any. Their hash and number go into the file.
        license: of the base, for the file; None takes what the model card in its folder states.

    The scores in the file are those that ``EditMetrics`` has published by then, at the end the final ones.

    Example:
        >>> callbacks = [ParameterScope(layers=0.7), EditMetrics(edits), SaveDelta("runs/mine/edit.safetensors")]
    """

    # After EditMetrics, whose scores it reads, and after every constraint.
    order = 95

    def __init__(
        self, path: str, at: Literal["end", "best"] = "end", edits: Any = None, license: str | None = None
    ) -> None:
        if at not in ("end", "best"):
            raise EditError(f"SaveDelta: at={at!r} is no moment to save; give 'end' or 'best'")
        if Path(path).suffix != ".safetensors":
            raise EditError(f"SaveDelta: path={str(path)!r}: a delta is a safetensors file; end it in .safetensors")
        self.path, self.at, self.edits, self.license = path, at, edits, license
        self.delta: EditDelta | None = None
        self._best: tuple[float, float] | None = None
        self._values: dict[str, Tensor] = {}
        self._step = 0

    def requires(self) -> Sequence[Requirement]:
        if self.at == "end":
            return ()
        message = 'at="best" reads the reliability that EditMetrics measures; add EditMetrics(every_n_steps=20)'
        return (Requirement(("edit/reliability",), message),)

    def prepare(self, run: EditRun) -> None:
        self._best, self._values, self.delta = None, {}, None
        self._edits = EditDataset.load(self.edits) if isinstance(self.edits, str | Path) else self.edits
        if not run.edits and self._edits is not None:
            run.edits = self._edits

    def attach(self, run: EditRun) -> None:
        # Adapters that no delta can hold are refused now, not after the training.
        weights_of(run.model)
        self._reference: dict[str, Tensor] = {}
        if not run.reference:
            with run.reference_model():
                self._reference = snapshot(run.scope)

    def state(self) -> dict[str, Any]:
        return {} if self._best is None else {"best": list(self._best), "step": self._step, "values": self._values}

    def load_state(self, state: dict[str, Any]) -> None:
        if state:
            reliability, locality = state["best"]
            self._best, self._step, self._values = (reliability, locality), state["step"], state["values"]

    def after_step(self, run: EditRun) -> None:
        if self.at == "end" or run.published_at.get("edit/reliability") != run.step:
            return
        found = (run.scores["edit/reliability"], run.scores.get("edit/locality", 0.0))
        if self._best is None or found > self._best:
            self._best, self._step = found, run.step
            reshard(run.root)
            self._values = {name: full_tensor(p.detach()).cpu().clone() for name, p in run.scope.items()}

    @torch.no_grad()
    def finish(self, run: EditRun) -> None:
        sharded = any(isinstance(parameter, DTensor) for parameter in run.scope.values())
        if not run.host.is_main and not sharded:
            return
        reshard(run.root)
        if not self._values:
            self._save(run, run.step)
            return
        wider = any(value.dtype != run.scope[name].dtype for name, value in self._values.items())
        with temporary_values(run.scope, _placed(self._values, run.scope)):
            if wider:
                # Kept in fp32, rounded only now: the constraints have to hold in the model's own dtype as well.
                run.steps.apply_constraints()
            self._save(run, self._step)
            reshard(run.root)
        self._values = {}

    def _save(self, run: EditRun, step: int) -> None:
        weights, before = weights_of(run.model), run.reference or self._reference
        scoped = {id(parameter) for parameter in run.scope.values()}
        # In the model's order on every process: gathering takes them all.
        touched = [name for name in weights if weights.made_of[name] & scoped]
        after = {name: weights[name].clone() for name in touched}
        edits = self._edits or run.edits or None
        with temporary_values(run.scope, before):
            delta = EditDelta.between(
                weights,
                after,
                edits=edits,
                configuration={"callbacks": [repr(c) for c in run.callbacks], "step": step, "steps": run.step},
                scores={name: value for name, value in run.scores.items() if math.isfinite(value)},
                license=self.license,
                touched=touched,
            )
        if not len(delta):
            raise EditError(
                f"SaveDelta: no weight has moved in {run.step} steps, so there is no edit to save; look at the "
                "learning rate, the scope, and whether the model knew the edits already"
            )
        if run.host.is_main:
            delta.save(self.path)
            delta = EditDelta.load(self.path)
        checked = self._check(run, delta, weights, before, after, edits)
        self.delta = delta
        if run.host.is_main:
            moment = (
                f"step {step}" if self._values or self.at == "end" else f"step {step}, the last: none was looked at"
            )
            run.host.log_file(self.path, "delta")
            print(f"delta: {self.path} ({len(delta)} tensors, {delta.nbytes / 1e6:.2f} MB, {moment}; {checked})")

    def _check(
        self,
        run: EditRun,
        delta: EditDelta,
        weights: Weights,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        edits: Sequence[Any] | None,
    ) -> str:
        with temporary_values(run.scope, before):
            applied = {name: weights[name].clone() for name in after}
        delta.apply(applied)
        wrong = [name for name, value in after.items() if not same_bits(applied[name], value)]
        if wrong:
            raise EditError(f"SaveDelta: {self.path} does not give the trained {wrong[0]}; do not use it")
        rows = [] if hasattr(run.model, "peft_config") else self._rows(run, edits)
        if not rows:
            return "its weights equal the trained ones bit for bit"
        live = _logits(run, rows)
        reshard(run.root)
        with temporary_values(run.scope, before):
            delta.apply(run.model)
            reproduced = _logits(run, rows)
            reshard(run.root)
        if not all(same_bits(one, other) for one, other in zip(live, reproduced, strict=True)):
            raise EditError(f"SaveDelta: {self.path} does not give the trained model's logits; do not use it")
        return f"its weights, and the logits for {len(rows)} of the edits, equal the trained ones bit for bit"

    def _rows(self, run: EditRun, edits: Sequence[Any] | None) -> list[Tensor]:
        if run.language_model is None or not edits:
            return []
        try:
            tokenizer = run.tokenizer()
        except EditError:
            # A loop that tokenised elsewhere: the weights have been compared.
            return []
        device = next(run.model.parameters()).device
        texts = [edits[i].prompt for i in range(min(_PROMPTS, len(edits)))]
        return [torch.tensor([tokenizer(text)["input_ids"]], device=device) for text in texts]

    def __repr__(self) -> str:
        return f"SaveDelta(at={self.at!r})"


def _placed(values: Mapping[str, Tensor], scope: Mapping[str, Any]) -> dict[str, Tensor]:
    return {n: shard_like(value.to(scope[n].device, scope[n].dtype), scope[n]) for n, value in values.items()}


def _logits(run: EditRun, rows: Sequence[Tensor]) -> list[Tensor]:
    with evaluation_mode(run.model), run.host.forward_context():
        return [run.model(input_ids=row, use_cache=False).logits.clone() for row in rows]
