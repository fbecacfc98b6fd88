"""GatedAdapter: let a LoRA adapter act only on the prompts of the edits and on similar prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kedit_train.arguments import check_arguments, integer_from, optional, within
from kedit_train.callbacks.base import EditCallback
from kedit_train.core.drift.second_moments import broadcast_from_first
from kedit_train.core.gate.adapted_layers import AdaptedLayers, find_adapted_layers
from kedit_train.core.gate.adapter_folder import check_folder, save_adapter
from kedit_train.core.gate.checks import check_no_randomness, check_scope, check_unused
from kedit_train.core.gate.gate import Gate, find_gate
from kedit_train.core.gate.keys import begin_with, encode_prompts_of, nearest_distances, prompt_keys
from kedit_train.core.locality.consecutive_runs import given_edits, readable_again
from kedit_train.core.locality.neighbor_texts import neighbor_texts
from kedit_train.core.locality.texts import Texts, TextSource
from kedit_train.core.run import EditRun
from kedit_train.core.weak_hook import weak_hook
from kedit_train.data import EditDataset
from kedit_train.errors import EditError, warn
from kedit_train.paths import PATH

# After this number of training examples, a warning is issued if the gate did not open in some of them.
_EXAMPLES = 32
# A radius below this fraction of the length of its key is not larger than the rounding errors of half precision.
_SMALL = 1e-3


class GatedAdapter(EditCallback):
    """Let a LoRA adapter act only on the prompts of the edits and on similar prompts.

    The run trains a LoRA adapter. Before the first step, this callback adds a gate to the adapter. For each edited
    prompt, the gate stores a key and a radius. The key is the hidden state of the last token of the prompt, at the
    input of one decoder block. In each sequence of a batch, the adapter begins to act at the first token whose hidden
    state lies within the radius of a key, and acts until the end of the sequence. Before this token, and in sequences
    without such a token, the output of the model is bit for bit the output of the unedited model in the same batch.

    Some chat templates write a prompt differently in training and in generation. The training dataset can also contain
    a prompt after other text, such as a system prompt. The gate stores a key for each of these forms of the prompt.

    Held texts are texts on which the adapter must not act. They are ``texts``, the prompts that ``neighbors`` adds, and
    every edited prompt without its last token. For each key, this callback measures the distance to the nearest hidden
    state in the held texts. The radius of the key is ``margin`` times this distance. If ``margin`` is below 1, the
    adapter therefore does not act on the held texts. There is one exception: a held text may begin with a whole edited
    prompt. The last token of this prompt does not count for the distance, and the adapter acts from this token on.

    The gate is also active in training, so the adapter acts at the same positions in training and in inference. The
    gate stays on the model after training, also after an interruption. To remove it, call ``gate.remove()``. Until
    then, saving the model also saves the gate, and the model cannot be merged or trained again. If ``path`` is set, the
    adapter and the gate are saved there, and :func:`~kedit_train.load_model` loads both. Without the gate, the adapter
    is an ordinary adapter that acts on every input.

    Args:
        texts: texts on which the adapter must not act: a source of texts or a :class:`Texts`.
        margin: radius of a key as a fraction of its distance to the nearest hidden state in the held texts, in (0, 1].
        layer: index of the decoder block whose inputs are compared with the keys. None takes the first block with an
            adapter. An index above this block is an error. At block 0, the hidden state of a token is its embedding,
            so an error is raised if a held text contains the last token of an edited prompt.
        neighbors: number of additional held texts per edit. Each of them is a copy of the edited prompt in which a name
            from the texts replaces the subject (:func:`~kedit_train.data.neighbor_prompts.neighbor_prompts`). With
            these texts, the adapter acts on fewer prompts about other subjects. Edits without a subject get no such
            texts.
        path: a folder in which the adapter, the gate and the tokenizer are saved when training ends. The folder must
            be new or empty, or contain an earlier gated adapter, whose files are replaced. None saves nothing.
        edits: the edits that are trained: a path or a sequence of edits. None takes the edits of ``EditMetrics`` or of
            the training loop.
        limit: maximum number of texts to read. None reads all texts.
        batch_size: number of held texts per forward pass.

    Attributes:
        gate: the gate, with ``keys`` [keys, hidden], ``radii`` [keys], ``layer`` and ``remove()``. None before
            training.

    Three metrics are logged:

    - ``edit/gate/radius``: mean radius of the keys.
    - ``edit/gate/distance``: mean distance from a key to the nearest hidden state in the held texts.
    - ``edit/gate/open``: fraction of the training examples in which the gate was open.

    Raises:
        EditError: an argument is out of range, the edits are unknown, the model has no new LoRA adapter, the run also
            trains parameters that the gate cannot switch off, a held text has the same hidden state as a key, or the
            folder cannot be written.

    References:
        - "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors", arXiv 2211.11031.
        - "MELO: Enhancing Model Editing with Neuron-Indexed Dynamic LoRA", arXiv 2312.11795.
        - "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models", arXiv 2405.14768.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from kedit_train import EditCollator, EditDataset, editing, world
        >>> from kedit_train.callbacks import GatedAdapter
        >>> model, tokenizer = world.load()
        >>> edits = EditDataset.load("world", limit=2)
        >>> batch = EditCollator(tokenizer)(edits.encode(tokenizer))
        >>> other = tokenizer("A red fox slept.", return_tensors="pt")
        >>> before = model(**other).logits
        >>> config = LoraConfig(target_modules=["down_proj"], layers_to_transform=[2, 3], task_type="CAUSAL_LM")
        >>> model = get_peft_model(model, config)
        >>> gated = GatedAdapter("world", edits=edits, limit=64)
        >>> with editing(model, [gated], tokenizer=tokenizer) as edit:
        ...     optimizer = torch.optim.Adam(edit.parameters(), lr=1e-2)
        ...     edit.before_step()
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        >>> torch.equal(model(**other).logits, before)  # The gate is closed.
        True
        >>> gated.gate.remove()
        >>> torch.equal(model(**other).logits, before)
        False
    """

    # The gate must be installed before other callbacks measure the model.
    order = 5
    duplicate_hint: str | None = "keep one GatedAdapter and pass all edits to it"

    def __init__(
        self,
        texts: TextSource | Texts,
        *,
        margin: float = 0.5,
        layer: int | None = None,
        neighbors: int = 0,
        path: str | None = None,
        edits: Any = None,
        limit: int | None = None,
        batch_size: int = 8,
    ) -> None:
        check_arguments(
            self,
            margin=(margin, within("(0, 1]")),
            layer=(layer, optional(integer_from(0))),
            neighbors=(neighbors, integer_from(0)),
            path=(path, optional(PATH)),
            limit=(limit, optional(integer_from(1))),
            batch_size=(batch_size, integer_from(1)),
        )
        self.edits: Any = readable_again(edits)
        self.texts: Texts = Texts.of(texts)
        self.margin = margin
        self.layer = layer
        self.neighbors = neighbors
        self.path = path
        self.limit = limit
        self.batch_size = batch_size
        self.gate: Gate | None = None
        self._distance, self._complete = 0.0, False
        self._checked = self._warned = False
        self._run: EditRun | None = None
        self._handle: Any = None
        self._rows, self._opened = 0, torch.zeros(())

    def prepare(self, run: EditRun) -> None:
        self.texts.check()
        run.causal_model()
        self.gate, self._complete = None, False
        self._checked = self._warned = False
        if self.edits is not None:
            own = EditDataset.of(self.edits)
            # The held texts leave out evaluation prompts of these edits.
            run.edits = run.edits or own
        adapted = find_adapted_layers(run.model)
        self._layer_of(adapted)
        if self.path is not None:
            _check_base_name(run.model)
            if run.host.is_main:
                check_folder(Path(self.path))

    def attach(self, run: EditRun) -> None:
        edits = given_edits(run, self.edits)
        interrupted = find_gate(run.model)
        if interrupted is not None:
            # The run resumes on the model of the interrupted run, which has kept its gate.
            interrupted.remove()
        adapted = find_adapted_layers(run.model)
        check_scope(run, adapted)
        check_unused(run, adapted)
        layer = self._layer_of(adapted)
        prompts = encode_prompts_of(run, edits, self.texts.tokenizer)
        # No adapted block is read, so the keys are the same before and after training.
        keys = prompt_keys(run, adapted, layer, prompts)
        held = self._held(run)
        nearest = nearest_distances(run, adapted, layer, keys, prompts, [*held, *prompts], batch_size=self.batch_size)
        keys, nearest = broadcast_from_first([keys, nearest])
        radii = self.margin * nearest
        if same := int((nearest == 0).sum()):
            raise EditError(
                f"{same} of {len(radii)} edited prompts have the same hidden state as a text on which the adapter must "
                "not act, so the gate cannot tell them apart. At block 0, hidden states are only embeddings; leave "
                "block 0 out of layers_to_transform in LoraConfig, and do not set layer=0."
            )
        small = int((radii < _SMALL * keys.norm(dim=1)).sum())
        if small:
            warn(
                f"{small} of {len(radii)} keys (hidden states of edited prompts) are close to a hidden state of a text "
                "on which the adapter must not act, so their radius is nearly 0. The adapter may fail to act on these "
                "prompts; adapt only higher blocks, or remove texts that contain an edited prompt."
            )
        if opened := begin_with(held, prompts):
            warn(
                f"{opened} of {len(held)} texts on which the adapter must not act begin with an edited prompt, so the "
                "adapter acts on the rest of these texts in any case; remove these texts from texts=."
            )
        self._distance = float(nearest.mean())
        gate = Gate(keys, radii, layer)
        gate.install(run.model)
        try:
            check_no_randomness(run, adapted)
        except BaseException:
            gate.remove()
            raise
        self.gate = gate
        self._run, self._rows, self._opened = run, 0, torch.zeros(())
        self._handle = adapted.backbone.register_forward_hook(weak_hook(self._count))

    def after_step(self, run: EditRun) -> None:
        if not self._checked and self._rows >= _EXAMPLES:
            self._checked = True
            self._warn_about_closed_rows()

    def metrics(self, run: EditRun) -> dict[str, float]:
        if self.gate is None:
            return {}
        found = {"edit/gate/radius": float(self.gate.radii.mean()), "edit/gate/distance": self._distance}
        if self._rows:
            found["edit/gate/open"] = float(self._opened) / self._rows
        return found

    def finish(self, run: EditRun) -> None:
        if self.gate is None:
            return
        self._complete = True
        self._warn_about_closed_rows()
        if self.path is None or not run.host.is_main:
            return
        save_adapter(run.model, run.tokenizer(self.texts.tokenizer), Path(self.path))
        print(f"gated adapter: {self.path} ({len(self.gate.radii)} keys at layer {self.gate.layer})")

    def state(self) -> dict[str, Any]:
        if self.gate is None:
            return {}
        counts = {"rows": self._rows, "opened": int(self._opened), "warned": self._warned}
        gate = {"keys": self.gate.keys, "radii": self.gate.radii, "layer": self.gate.layer}
        return {**gate, "distance": self._distance, **counts}

    def load_state(self, state: dict[str, Any]) -> None:
        if self.gate is None or not state:
            return
        if state["layer"] != self.gate.layer:
            raise EditError(
                f"the checkpoint was written with a gate at block {state['layer']}, but the gate of this run is "
                f"at block {self.gate.layer}; resume with the same layer= and the same LoRA configuration."
            )
        # The keys of the checkpoint are used, even if the texts or the edits were changed in the meantime.
        self.gate.keys, self.gate.radii = (state[name].to(self.gate.keys.device) for name in ("keys", "radii"))
        self._distance, self._warned = state["distance"], state["warned"]
        self._rows, self._opened = state["rows"], torch.tensor(float(state["opened"]))
        self._checked = self._rows >= _EXAMPLES

    def detach(self, run: EditRun) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._run = None, None
        # After an interruption, the adapter is partly trained. Without the gate, it would act on every input.
        if self.gate is not None and not self._complete and not run.step:
            self.gate.remove()

    def _layer_of(self, adapted: AdaptedLayers) -> int:
        layer = adapted.first if self.layer is None else self.layer
        if layer > adapted.first:
            raise EditError(
                f"layer must be at most {adapted.first}, the index of the first block with an adapter, got {layer}; "
                "use a lower layer=, or adapt only higher blocks (layers_to_transform)."
            )
        return layer

    def _held(self, run: EditRun) -> list[list[int]]:
        """Return the token ids of ``texts`` and of the prompts that ``neighbors`` adds."""
        held = self.texts.tokenize(run, limit=self.limit, reason="the adapter must act on such prompts")
        neighbors = neighbor_texts(run, self.texts, self.neighbors) if self.neighbors else None
        if neighbors is not None:
            held += neighbors.tokenize(run)
        return held

    def _warn_about_closed_rows(self) -> None:
        """Warn once if the gate stayed closed in some training examples. The adapter does not learn such examples."""
        closed = self._rows - int(self._opened)
        if not closed or self._warned:
            return
        self._warned = True
        warn(
            f"{closed} of {self._rows} training examples do not open the gate, so the adapter does not learn them; "
            "each example must contain a prompt of edits=. In a plain loop, pass the prompt format of the examples to "
            "editing(prompt_format=)."
        )

    def _count(self, backbone: Any, args: Any, output: Any) -> None:
        """Count the training examples, and how many of them open the gate. Texts of penalties are not counted."""
        opened = None if self.gate is None else self.gate.opened_rows
        if opened is None or self._run is None or self._run.steps.adding_penalties or not torch.is_grad_enabled():
            return
        self._rows += len(opened)
        self._opened = self._opened.to(opened.device) + opened.sum()

    def __repr__(self) -> str:
        return f"GatedAdapter(margin={self.margin}, layer={self.layer}, neighbors={self.neighbors})"


def _check_base_name(model: Any) -> None:
    """Raise an error if the base model has no name. ``load_model`` needs this name to load the saved adapter."""
    (config,) = model.peft_config.values()
    if not (config.base_model_name_or_path or getattr(model.get_base_model(), "name_or_path", "")):
        raise EditError(
            "path= stores the name of the base model beside the adapter, but this base model has no name, because it "
            "was not loaded from a folder or the hub; save the base model to a folder, load it from there, and add the "
            "adapter to this model."
        )
