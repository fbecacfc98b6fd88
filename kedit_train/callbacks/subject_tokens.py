"""SubjectTokens: compute the gradients of the weights only from the tokens of the subject."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.callbacks.base import EditCallback
from kedit_train.core.cache.layer_stack import block_input, call_arguments
from kedit_train.core.cache.sequence_keys import real_tokens
from kedit_train.core.drift.linear_layers import LinearLayer, find_linear_layers
from kedit_train.core.locality.consecutive_runs import given_edits, readable_again
from kedit_train.core.run import EditRun
from kedit_train.core.scope.blocks import place_in_blocks
from kedit_train.core.scope.subject_positions import SubjectPositions
from kedit_train.core.weak_hook import weak_hook
from kedit_train.data import EditDataset
from kedit_train.data.neighbor_prompts import has_subject
from kedit_train.errors import EditError, reported_by, warn
from kedit_train.functional.gradient_positions import gradient_positions

# An attribute of a tensor of hidden states: the chosen positions of the forward pass that computed the tensor.
_CHOSEN = "_kedit_subject_positions"
# A warning is issued if none of the first training examples contains the prompt of an edit.
_EXAMPLES = 32


class SubjectTokens(EditCallback):
    """Compute the gradients of the weights in scope only from the tokens of the subject.

    In the prompt "The mother tongue of Danielle Darrieux is", the subject is "Danielle Darrieux". Plain fine-tuning
    mostly changes what the model computes at the last token of the prompt. This change depends on the wording of the
    prompt, so the model does not give the new answer to rephrased prompts. With this callback, the gradients of the
    weights in scope come only from the tokens of the subject. These tokens are also in rephrased prompts, but not in
    prompts about other subjects. ROME edits a model at the last token of the subject for the same reason.

    Only the gradients are restricted. The changed weights act at all tokens, so answers to other prompts can change,
    too. Add :class:`NullSpace` to keep more of these answers. The callback does not change the forward pass, so outputs
    and losses are computed as usual. The gradients of hidden states still flow through all tokens.

    Use this callback only with a pretrained language model. Such a model retrieves facts about a subject at the tokens
    of the subject. On the small bundled model, many edits with this callback fail. The example below only shows the
    calls.

    A training example belongs to an edit if its text contains the prompt of the edit. If the example belongs to no
    edit, or if the edit has no subject, the gradients come from all tokens. Most models store nothing about a subject
    at the first position (an attention sink). If the subject is a single token at the start of the text, the gradients
    therefore come from all tokens of the prompt.

    The callback restricts the gradients of all losses on the training examples, such as ``TokenLoss`` and
    ``BatchAnchor``. It does not restrict the gradients of penalties on other texts, such as ``KLLocality``.

    Args:
        edits: the edits that are trained (a path, a list of ``Edit`` or an ``EditDataset``). None uses the edits of
            ``EditMetrics``, ``EditDataModule``, ``EditSFTTrainer`` or ``editing(edits=)``.

    Two metrics are logged:

    - ``edit/scope/subject_examples``: the fraction of training examples in which a subject was found.
    - ``edit/scope/subject_share``: the fraction of the tokens, without padding, that contribute to the gradients of the
      weights. In an example without a subject, all tokens contribute.

    Raises:
        EditError: the edits of the run are unknown; the scope contains parameters other than weights of ``nn.Linear``,
            ``Conv1D`` or LoRA factors in the decoder blocks; or the model receives embeddings instead of token ids.

    References:
        "Locating and Editing Factual Associations in GPT", arXiv 2202.05262.

    Example:
        >>> import torch
        >>> from kedit_train import EditDataset, editing, world
        >>> from kedit_train.callbacks import ParameterScope, SubjectTokens
        >>> model, tokenizer = world.load()
        >>> edits = EditDataset.load("world", limit=1)
        >>> batch = tokenizer(f"{edits[0].prompt} {edits[0].target}", return_tensors="pt")
        >>> callbacks = [ParameterScope(0.7, modules="mlp.down_proj.weight"), SubjectTokens(edits=edits)]
        >>> with editing(model, callbacks, tokenizer=tokenizer, log_every_n_steps=1) as run:
        ...     optimizer = torch.optim.Adam(run.parameters(), lr=1e-3)
        ...     run.before_step()
        ...     model(**batch, labels=batch["input_ids"]).loss.backward()
        ...     optimizer.step()
        >>> run.history[-1]["edit/scope/subject_examples"]
        1.0
    """

    # This callback comes last, so that the statistics of other callbacks are computed without its hooks.
    order = 90
    duplicate_hint = "keep one SubjectTokens"

    def __init__(self, *, edits: Any = None) -> None:
        self.edits: Any = readable_again(edits)
        self._handles: list[Any] = []
        self._positions: SubjectPositions | None = None
        self._run: EditRun | None = None
        # The chosen positions of the current forward pass [rows, length], whether the pass is inside the backbone, and
        # whether checkpointing recomputes a block whose positions are known.
        self._chosen: Tensor | None = None
        self._inside = self._recalled = self._warned = self._warned_of_first = False
        # The token ids and the attention mask of the current call of a module around the backbone.
        self._received: tuple[Tensor, Any] | None = None

    def prepare(self, run: EditRun) -> None:
        run.causal_model()
        if self.edits is not None:
            run.edits = run.edits or EditDataset.of(self.edits)

    def attach(self, run: EditRun) -> None:
        edits = given_edits(run, self.edits)
        layers = find_linear_layers(run.model, run.scope)
        places = {name: place_in_blocks(run.model, name) for name in layers}
        paths = {path for path, index in places.values() if index >= 0}
        outside = next((name for name, (_, index) in places.items() if index < 0), None)
        if len(paths) != 1 or outside is not None:
            raise EditError(
                "every weight in scope must be inside the decoder blocks of the model, got "
                f"{outside or 'weights in several stacks of blocks'}; choose weights such as "
                "ParameterScope(modules='mlp.down_proj.weight')."
            )
        without = sum(not has_subject(edit) for edit in edits)
        if without:
            warn(
                f"{without} of {len(edits)} edits have no subject in their prompt, so they are trained at all "
                "tokens; give Edit(subject=) the name of the thing that the edit is about."
            )
        (path,) = paths
        self._run, self._positions = run, SubjectPositions(run.tokenizer(), edits)
        self._chosen, self._warned, self._warned_of_first = None, False, False
        self._inside = self._recalled = False
        names = path.split(".")[:-1]
        backbone = run.model.get_submodule(".".join(names))
        blocks = run.model.get_submodule(path)
        add = self._handles.append
        for depth in range(len(names)):
            around = run.model.get_submodule(".".join(names[:depth]))
            add(around.register_forward_pre_hook(weak_hook(self._receive), with_kwargs=True))
            add(around.register_forward_hook(weak_hook(self._forget), always_call=True))
        add(backbone.register_forward_pre_hook(weak_hook(self._enter), with_kwargs=True))
        add(backbone.register_forward_hook(weak_hook(self._leave), always_call=True))
        for index in sorted({index for _, index in places.values()}):
            block: nn.Module = blocks[index]  # type: ignore[index]
            add(block.register_forward_pre_hook(weak_hook(self._mark), with_kwargs=True))
            for child in block.children():
                add(child.register_forward_pre_hook(weak_hook(self._recall), with_kwargs=True))
        for layer in layers.values():
            for module in layer.modules:
                # FSDP2 may have a hook on this module that frees the gathered weight, so this hook must run first.
                add(module.register_forward_hook(self._limit(layer), prepend=True))

    def metrics(self, run: EditRun) -> dict[str, float]:
        positions = self._positions
        if positions is None or not positions.rows:
            return {}
        return {
            "edit/scope/subject_examples": positions.found / positions.rows,
            "edit/scope/subject_share": positions.chosen / positions.tokens,
        }

    def after_step(self, run: EditRun) -> None:
        positions = self._positions
        if positions and positions.whole_prompts and not self._warned_of_first:
            self._warned_of_first = True
            warn(
                "a training example begins with a subject of only one token. Most models store nothing about a subject "
                "at the first position, so this example is trained at all tokens of its prompt instead of at the "
                "subject. More of the other answers may change; reword the prompt so that its subject comes later."
            )
        if positions and not self._warned and positions.rows >= _EXAMPLES and not positions.found:
            self._warned = True
            warn(
                f"none of the first {positions.rows} training examples contains the prompt and the subject of an edit, "
                "so they are trained at all tokens; set edits= to the edits in the training data."
            )

    def detach(self, run: EditRun) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._positions, self._run, self._chosen, self._received = [], None, None, None, None

    # -- one forward pass, in the order of the calls

    def _receive(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Store the token ids that the whole model receives, because its backbone may receive only embeddings."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor):
            self._received = ids, kwargs.get("attention_mask")

    def _forget(self, module: nn.Module, args: Any, output: Any) -> None:
        self._received = None

    def _enter(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._chosen, self._inside, self._recalled = None, True, False
        run, positions = self._run, self._positions
        if run is None or positions is None or run.steps.adding_penalties or not torch.is_grad_enabled():
            return
        inputs = call_arguments(backbone, args, kwargs)
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is None and self._received is not None:
            ids, mask = self._received
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            with reported_by("SubjectTokens"):
                raise EditError(
                    "the model must receive input_ids [rows, length], because the subjects are found in the token ids, "
                    "got other inputs (for example inputs_embeds); pass input_ids, or remove SubjectTokens."
                )
        self._chosen = positions.find(ids, real_tokens(mask, ids))

    def _leave(self, backbone: nn.Module, args: Any, output: Any) -> None:
        self._inside = False

    def _mark(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Attach the chosen positions to the input of a block.

        When gradient checkpointing recomputes the block, the positions are read from this input.
        """
        hidden = block_input(args, kwargs)
        if self._inside and hidden is not None:
            setattr(hidden, _CHOSEN, self._chosen)

    def _recall(self, child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = block_input(args, kwargs)
        if not self._inside and hasattr(hidden, _CHOSEN):
            self._chosen, self._recalled = getattr(hidden, _CHOSEN), True

    def _limit(self, layer: LinearLayer) -> Any:
        """Return a forward hook that computes the weight gradient of a layer only from the chosen positions."""
        reference = weakref.ref(self)

        def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            callback = reference()
            if callback is None or not output.requires_grad or all(module is not own for own in layer.modules):
                return None
            if not (callback._inside or callback._recalled):
                with reported_by("SubjectTokens"):
                    raise EditError(
                        f"{layer.name} was used outside of a forward pass of the model; call the whole model, and if "
                        'it uses gradient checkpointing, set gradient_checkpointing_kwargs={"use_reentrant": False}.'
                    )
            if (chosen := callback._chosen) is None:
                return None
            if output.shape[:-1] != chosen.shape:
                with reported_by("SubjectTokens"):
                    raise EditError(
                        f"{layer.name} must have outputs [rows, length, features], got {list(output.shape)} for token "
                        f"ids {list(chosen.shape)}; choose other weights for the scope."
                    )
            return gradient_positions(output, args[0], layer.as_matrix(module.weight), chosen)

        return hook
