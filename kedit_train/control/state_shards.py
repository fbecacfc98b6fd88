"""Hidden states of responses on disk: one safetensors file per chunk of responses, written atomically."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kedit_train.control.responses import Response
from kedit_train.control.sites import HEAD, Site, causal_model, find_sites
from kedit_train.data.tokenization import Encoded, collate, position_ids
from kedit_train.errors import EditError
from kedit_train.evaluation.asking.batching import inference_context, model_device
from kedit_train.evaluation.asking.decoding import can_pad
from kedit_train.evaluation.asking.logits import accepts_argument
from kedit_train.safetensors_file import load_tensors, save_tensors

KIND = "kedit_train.value_states"


class StateShards:
    """Responses and their hidden states. The hidden states are memory-mapped and are read when they are used.

    Args:
        keys: dict from the path of each file to its key, the hash that :func:`write_shards` stored in the file.

    Attributes:
        prompts: the prompt of each response.
        texts: the text of each response.

    Raises:
        EditError: a file is damaged, or its key differs from the key in ``keys``.
    """

    def __init__(self, keys: Mapping[Path, str]) -> None:
        self.prompts: list[str] = []
        self.texts: list[str] = []
        self._spans: list[tuple[dict[str, Tensor], slice]] = []
        for path, key in keys.items():
            tensors, metadata = load_tensors(path, kind=KIND)
            if metadata["key"] != key:
                raise EditError(f"{path} was replaced by another run; give each run its own cache_dir.")
            self.prompts += metadata["prompts"]
            self.texts += metadata["texts"]
            end = 0
            for length in tensors.pop("lengths").tolist():
                self._spans.append((tensors, slice(end, end + length)))
                end += length

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a dict from layer to the hidden states of a response, [tokens, hidden]."""
        tensors, span = self._spans[index]
        return {name: tensor[span] for name, tensor in tensors.items()}


def write_shards(
    model: nn.Module,
    layers: Sequence[int | str],
    folder: Path,
    chunks: Sequence[tuple[Any, Callable[[], list[Response]]]],
    *,
    batch_size: int,
    pad_id: int,
) -> StateShards:
    """Write the hidden states of responses to ``folder``: one file for each chunk of responses.

    Only one chunk at a time is in memory. If the folder already contains the complete file of a chunk, the chunk is not
    computed again. For example, a new run uses the files of an interrupted run.

    Args:
        model: the language model.
        layers: the layers, as for :func:`~kedit_train.control.sites.find_sites`.
        folder: a folder, which is created if necessary.
        chunks: one pair (description, function) per chunk. The function returns the responses of the chunk. It is
            called only if the folder does not contain the file of the chunk. The description is a JSON value. It must
            contain everything that the responses and hidden states depend on, except the layers.
        batch_size: number of responses per forward pass.
        pad_id: id of the padding token.

    Raises:
        EditError: a file cannot be written, or a hidden state is not finite.
    """
    sites, keys = find_sites(model, layers), {}
    for number, (description, make) in enumerate(chunks):
        text = json.dumps([description, [site.name for site in sites]], sort_keys=True)
        key = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
        # The name contains the key, so runs with other settings use other files.
        path = folder / f"states-{key[:16]}-{number:05d}.safetensors"
        if not _is_complete(path, key):
            responses = make()
            states = [
                part for batch in _batches(responses, batch_size) for part in read_states(model, sites, batch, pad_id)
            ]
            tensors = {site.name: torch.cat([part[site.name] for part in states]) for site in sites}
            for name, hidden in tensors.items():
                if not bool(hidden.isfinite().all()):
                    raise EditError(
                        f"the hidden states of the model (layer {name}) must be finite, but some are NaN or infinite; "
                        "check the model, or use dtype float32."
                    )
            tensors["lengths"] = torch.tensor([len(response.ids) for response in responses])
            texts = {"prompts": [r.prompt for r in responses], "texts": [r.text for r in responses]}
            save_tensors(path, tensors, {"key": key, **texts}, kind=KIND)
        keys[path] = key
    return StateShards(keys)


def _batches(responses: Sequence[Response], size: int) -> Iterator[Sequence[Response]]:
    for start in range(0, len(responses), size):
        yield responses[start : start + size]


def _is_complete(path: Path, key: str) -> bool:
    try:
        return path.is_file() and load_tensors(path, kind=KIND).metadata["key"] == key
    except (EditError, KeyError, TypeError):
        return False


def read_states(
    model: nn.Module, sites: Sequence[Site], responses: Sequence[Response], pad_id: int
) -> list[dict[str, Tensor]]:
    """Return the hidden states from which the tokens of each response were generated.

    The model predicts token i of the response from state i. So the first state belongs to the last token of the prompt,
    and the last state belongs to the second-to-last token of the response. The context manager ``controlled`` can
    change the hidden states at exactly these positions.

    Returns:
        For each response, a dict from layer to hidden states, [tokens of the response, hidden], on the CPU.
    """
    inner = causal_model(model)
    groups = [responses] if can_pad(inner) else [[response] for response in responses]
    return [states for group in groups for states in _read_padded(inner, sites, group, pad_id)]


def _read_padded(
    inner: Any, sites: Sequence[Site], responses: Sequence[Response], pad_id: int
) -> list[dict[str, Tensor]]:
    # The last token is left out, because no token is generated from it.
    sequences = [Encoded([*r.prompt_ids, *r.ids[:-1]], 0) for r in responses]
    batch = {k: v.to(model_device(inner)) for k, v in collate(sequences, pad_id=pad_id).items() if k != "labels"}
    if accepts_argument(inner, "position_ids"):
        batch["position_ids"] = position_ids(batch["attention_mask"])
    seen: dict[str, Tensor] = {}

    def keep(name: str, hidden: Tensor) -> None:
        seen[name] = hidden.detach()

    # The output head receives only one position. This saves time, because the logits are not needed.
    head = Site(HEAD, inner.get_output_embeddings())
    handles = [site.register(lambda hidden, name=site.name: keep(name, hidden)) for site in sites]
    handles.append(head.register(lambda hidden: hidden[:1, -1:]))
    try:
        with inference_context(inner):
            inner(**batch, **({"use_cache": False} if accepts_argument(inner, "use_cache") else {}))
    finally:
        for handle in handles:
            handle.remove()
    states = []
    for row, response in enumerate(responses):
        span = slice(len(response.prompt_ids) - 1, len(response.prompt_ids) + len(response.ids) - 1)
        states.append({name: hidden[row, span].cpu().clone() for name, hidden in seen.items()})
    return states
