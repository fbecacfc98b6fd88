"""SaveDelta: save the weights that the run changed as one file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kedit_train.arguments import check_arguments, one_of
from kedit_train.atomic_write import check_writable
from kedit_train.callbacks.base import EditCallback
from kedit_train.core.checksums import checksums
from kedit_train.core.fsdp import full_tensor, reshard, shard_like
from kedit_train.core.output_head import evaluation_mode
from kedit_train.core.reference_weights import check_stored, snapshot, temporary_values
from kedit_train.core.requirements import Requirement
from kedit_train.core.run import EditRun
from kedit_train.data import EditDataset
from kedit_train.delta import EditDelta
from kedit_train.delta.bitwise import same_bits
from kedit_train.delta.quantized import check_not_quantized
from kedit_train.delta.weight_source import Weights, named_tensors, persistent_buffers, weights_of
from kedit_train.errors import EditError, warn
from kedit_train.paths import SAFETENSORS_PATH
from kedit_train.plural import plural

# Maximum number of prompts for which logits are compared.
_PROMPTS = 8


class SaveDelta(EditCallback):
    """Save the weight changes of the run as an :class:`~kedit_train.delta.EditDelta` file, and verify the file.

    To verify the file, ``SaveDelta`` reads the file, applies the changes to the original weights, and compares the
    result with the trained weights bit for bit. If the edits are known, the logits for up to 8 of the edit prompts
    are compared as well. If no weight has changed, a warning is issued and no file is written. With ``at="best"``, only
    the file contains the best weights; the model itself keeps the weights of the last step.

    If the run trains adapters (PEFT), the file contains the merged weights of the base model, as ``merge_and_unload()``
    computes them. In this case, only weights are compared, not logits. To save the adapter itself, use PEFT. With
    several processes, one process writes the file. If FSDP2 shards the model, each process gathers one tensor at a
    time, and keeps only the tensors that have changed. Without ``ParameterScope``, ``SaveDelta`` also keeps a copy of
    the original value of every trainable parameter in memory.

    If the run trains a quantized weight (8 bit or less), an error is raised before training, because the file could not
    be applied to the checkpoint of the base model. If a persistent buffer, such as the running mean of ``BatchNorm``,
    changes during the run, a warning is issued. The file does not contain the buffer. If the file is applied to the
    base model, the result therefore differs from the trained model.

    The file also contains the scores that ``EditMetrics`` measured on the saved weights. With ``at="end"``, these are
    the scores after training. With ``at="best"``, these are the scores of the best step, measured on the sample of
    edits that ``EditMetrics(limit=...)`` evaluates during training.

    Args:
        path: path of the file, which must end in ``.safetensors``. Missing folders are created. An existing file is
            replaced.
        at: "end" saves the weights of the last step. "best" saves the weights of the step with the highest
            ``edit/reliability`` that ``EditMetrics(every_n_steps=...)`` measured during training. If several steps have
            this reliability, the step with the highest ``edit/locality`` is saved. If the locality is equal as well,
            the earliest step is saved.
        edits: an ``EditDataset`` or a path. The file contains the hash and the number of these edits. None takes the
            edits of ``EditMetrics`` or of the training loop, if any.
        license: license of the base model, to write into the file. None takes the license from the model card in the
            folder of the model.
        upload: whether to upload the file as an artifact of the W&B run, if the training loop logs to one.

    Attributes:
        delta: the saved :class:`~kedit_train.delta.EditDelta`. None before the end of training.

    Raises:
        EditError: an argument is invalid, ``path`` cannot be written, a weight is quantized, or the file does not
            reproduce the trained weights.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from kedit_train import EditDelta, editing, world
        >>> from kedit_train.callbacks import ParameterScope, SaveDelta
        >>> model, tokenizer = world.load()
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = f"{folder.name}/edit.safetensors"
        >>> ids = torch.tensor([tokenizer("A red fox slept.")["input_ids"]])
        >>> callbacks = [ParameterScope(layers=2, modules="mlp.down_proj"), SaveDelta(path)]
        >>> with editing(model, callbacks, tokenizer=tokenizer) as edit:
        ...     optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-3)
        ...     edit.before_step()
        ...     model(input_ids=ids, labels=ids).loss.backward()
        ...     optimizer.step()
        delta: ... (1 tensor, ... MB, step 1; its weights equal the trained ones bit for bit)
        >>> list(EditDelta.load(path).changes)
        ['model.layers.2.mlp.down_proj.weight']
        >>> folder.cleanup()
    """

    # SaveDelta comes after EditMetrics, whose scores it reads, and after every constraint.
    order = 95
    follows_steps = True

    def __init__(
        self,
        path: str,
        *,
        at: Literal["end", "best"] = "end",
        edits: Any = None,
        license: str | None = None,
        upload: bool = True,
    ) -> None:
        check_arguments(self, path=(path, SAFETENSORS_PATH), at=(at, one_of(("end", "best"))))
        self.path = path
        self.at = at
        self.edits = edits
        self.license = license
        self.upload = upload
        self.delta: EditDelta | None = None
        self._best: tuple[float, float] | None = None
        self._values: dict[str, Tensor] = {}
        self._scores: dict[str, float] = {}
        self._step = 0
        # The checksums of the persistent buffers before the first step of the edit.
        self._buffers: dict[str, int] = {}

    def provides(self) -> set[str]:
        return {f"file {os.path.realpath(self.path)}"}

    def conflicts(self) -> Sequence[Requirement]:
        message = (
            f"another callback also writes {self.path}, so one of the two files would be lost; give each callback its "
            "own path."
        )
        return [Requirement(tuple(self.provides()), message)]

    def requires(self) -> Sequence[Requirement]:
        if self.at == "end":
            return ()
        message = 'at="best" needs the reliability that EditMetrics measures; add EditMetrics(every_n_steps=20).'
        return (Requirement(("edit/reliability",), message),)

    def prepare(self, run: EditRun) -> None:
        if run.host.is_main:
            check_writable(self.path)
        self._best, self._values, self._scores, self.delta = None, {}, {}, None
        self._buffers = {}
        self._edits = EditDataset.load(self.edits) if isinstance(self.edits, str | Path) else self.edits
        if not run.edits and self._edits is not None:
            run.edits = self._edits

    def attach(self, run: EditRun) -> None:
        # If a weight is offloaded or quantized, or if adapters cannot be merged, these calls raise an error now and not
        # after training.
        check_stored(named_tensors(run.model))
        check_not_quantized(run.model, weights_of(run.model), run.scope)
        self._buffers = _buffer_checksums(run)
        self._reference: dict[str, Tensor] = {}
        if not run.reference:
            with run.reference_model():
                self._reference = snapshot(run.scope)

    def state(self) -> dict[str, Any]:
        buffers = {"buffers": dict(self._buffers)} if self._buffers else {}
        if self._best is None:
            return buffers
        values = {name: full_tensor(value) for name, value in self._values.items()}
        best = {"best": list(self._best), "step": self._step, "values": values, "scores": self._scores}
        return best | buffers

    def load_state(self, state: dict[str, Any]) -> None:
        # Earlier versions did not save the checksums.
        self._buffers = state.get("buffers", self._buffers)
        if "best" in state:
            reliability, locality = state["best"]
            self._best, self._step, self._values = (reliability, locality), state["step"], state["values"]
            self._scores = state.get("scores", {})

    def after_step(self, run: EditRun) -> None:
        if self.at == "end" or run.published_at.get("edit/reliability") != run.step:
            return
        scores = (run.scores["edit/reliability"], run.scores.get("edit/locality", 0.0))
        if self._best is None or scores > self._best:
            self._best, self._step = scores, run.step
            self._scores = {name: run.scores[name] for name, step in run.published_at.items() if step == run.step}
            reshard(run.root)
            # Copies of sharded weights stay sharded.
            current = {name: p.detach() for name, p in run.scope.items()}
            self._values = {n: (p if isinstance(p, DTensor) else p.cpu()).clone() for n, p in current.items()}

    @torch.no_grad()
    def finish(self, run: EditRun) -> None:
        sharded = any(isinstance(parameter, DTensor) for parameter in run.scope.values())
        if not run.host.is_main and not sharded:
            return
        reshard(run.root)
        if not self._values:
            self._save(run, run.step)
            return
        in_full_precision = any(value.dtype != run.scope[name].dtype for name, value in self._values.items())
        with temporary_values(run.scope, _on_scope(self._values, run.scope)):
            if in_full_precision:
                # The values were kept in fp32 and have just been rounded; the constraints must hold after rounding too.
                run.steps.apply_constraints()
            self._save(run, self._step)
            reshard(run.root)
        self._values = {}

    def _save(self, run: EditRun, step: int) -> None:
        """Save the current weights of the scope, and record in the file that they are the weights of ``step``."""
        weights, before = weights_of(run.model), run.reference or self._reference
        scoped = {id(parameter) for parameter in run.scope.values()}
        # Every process gathers the weights in the same order, which is the order of the model.
        touched = [name for name in weights if weights.made_of[name] & scoped]
        after = _trained(run, weights, touched)
        edits = self._edits or run.edits or None
        scores = self._scores if self._values else run.scores
        with temporary_values(run.scope, before):
            delta = EditDelta.between(
                weights,
                after,
                edits=edits,
                configuration={"callbacks": [repr(c) for c in run.callbacks], "step": step, "steps": run.step},
                # Metrics of the cache do not describe the weights, and the measured times differ between equal runs.
                scores={n: v for n, v in scores.items() if math.isfinite(v) and not n.startswith("edit/cache/")},
                license=self.license,
                touched=touched,
            )
        if not len(delta):
            if run.host.is_main:
                kept = f" and the earlier file at {self.path} is kept" if Path(self.path).exists() else ""
                warn(
                    f"no weight has changed in {run.step} steps, so no delta is saved{kept}; check the learning rate "
                    "and the scope, and check whether the model already gave the new answers before training."
                )
            return
        if run.host.is_main:
            delta.save(self.path)
            delta = EditDelta.load(self.path)
        changed = self._changed_buffers(run)
        # If buffers have changed, logits are not compared, because the buffers before the edit are not stored.
        checked = self._check(run, delta, weights, before, after, None if changed else edits)
        self.delta = delta
        if changed and run.host.is_main:
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            warn(
                f"the run has changed the buffer {changed[0]}{more}, which the delta does not "
                "contain, so the base model with the delta differs from the trained model; keep modules that update "
                "their buffers (such as BatchNorm) in evaluation mode, or save the whole model."
            )
            checked += f"; {len(changed)} changed buffers are not in the file"
        if run.host.is_main:
            evaluated = self._values or self.at == "end"
            moment = f"step {step}" if evaluated else f"step {step}, the last step, because no step was evaluated"
            if self.upload:
                run.host.log_file(self.path, "delta")
            size = f"{plural(len(delta), 'tensor')}, {delta.nbytes / 1e6:.2f} MB"
            print(f"delta: {self.path} ({size}, {moment}; {checked})")

    def _check(
        self,
        run: EditRun,
        delta: EditDelta,
        weights: Weights,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        edits: Sequence[Any] | None,
    ) -> str:
        """Check that the file and the base model together give the weights and logits of the trained model.

        Returns:
            A text that says what was compared.
        """
        differing = []
        with temporary_values(run.scope, before):
            # The tensors are compared one at a time, so that no process needs memory for the whole model.
            for name in after:
                tensor = {name: weights[name].clone()}
                if name in delta.changes:
                    EditDelta({name: delta.changes[name]}, meta=delta.meta).apply(tensor)
                if not same_bits(tensor[name], after[name]):
                    differing.append(name)
        if differing:
            raise EditError(
                f"the base model with {self.path} does not reproduce the trained weight {differing[0]}; do not use "
                "the file, and save the whole trained model instead."
            )
        prompts = [] if hasattr(run.model, "peft_config") else self._prompts(run, edits)
        if not prompts:
            return "its weights equal the trained ones bit for bit"
        trained = _logits(run, prompts)
        reshard(run.root)
        with temporary_values(run.scope, before):
            delta.apply(run.model)
            reproduced = _logits(run, prompts)
            reshard(run.root)
        if not all(same_bits(a, b) for a, b in zip(trained, reproduced, strict=True)):
            raise EditError(
                f"the base model with {self.path} does not reproduce the logits of the trained model; do not use the "
                "file, and save the whole trained model instead."
            )
        return f"its weights, and the logits for {len(prompts)} of the edits, equal the trained ones bit for bit"

    def _changed_buffers(self, run: EditRun) -> list[str]:
        """Return the names of the persistent buffers that were changed, added or removed since the edit began."""
        now = _buffer_checksums(run)
        return [name for name in {**self._buffers, **now} if self._buffers.get(name) != now.get(name)]

    def _prompts(self, run: EditRun, edits: Sequence[Any] | None) -> list[Tensor]:
        """Return the token ids [1, tokens] of some prompts, or [] if the edits or the tokenizer are unknown."""
        if run.language_model is None or not edits:
            return []
        try:
            tokenizer = run.tokenizer()
        except EditError:
            # A hand-written loop may tokenize elsewhere. The weights have already been compared.
            return []
        device = next(run.model.parameters()).device
        texts = [edits[i].prompt for i in range(min(_PROMPTS, len(edits)))]
        return [torch.tensor([tokenizer(text)["input_ids"]], device=device) for text in texts]

    def __repr__(self) -> str:
        return f"SaveDelta(at={self.at!r})"


def _trained(run: EditRun, weights: Weights, names: Sequence[str]) -> Mapping[str, Tensor]:
    """Return copies of the trained tensors. If tensors are sharded, each copy is gathered only when it is read."""
    if not any(isinstance(parameter, DTensor) for parameter in run.scope.values()):
        return {name: weights[name].clone() for name in names}
    copies = {id(parameter): parameter.detach().clone() for parameter in run.scope.values()}
    keys = {name: next(iter(weights.made_of[name] & copies.keys())) for name in names}
    return Weights({name: lambda copy=copies[key]: copy for name, key in keys.items()})


def _buffer_checksums(run: EditRun) -> dict[str, int]:
    buffers = {n: b for n, b in persistent_buffers(run.model).items() if b.layout == torch.strided}
    return dict(zip(buffers, checksums(buffers.values()), strict=True))


def _on_scope(values: Mapping[str, Tensor], scope: Mapping[str, Any]) -> dict[str, Tensor]:
    return {n: shard_like(value.to(scope[n].device, scope[n].dtype), scope[n]) for n, value in values.items()}


def _logits(run: EditRun, prompts: Sequence[Tensor]) -> list[Tensor]:
    with evaluation_mode(run.model), run.host.forward_context():
        return [run.model(input_ids=ids, use_cache=False).logits.clone() for ids in prompts]
