"""Curvature factors as a file that belongs to one set of weights and texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kedit_train.atomic_write import writing
from kedit_train.core.drift.second_moments import Moment
from kedit_train.errors import EditError

Factors = tuple[dict[str, Moment], dict[str, Moment]]


def save_factors(
    path: str | Path,
    inputs: Mapping[str, Moment],
    gradients: Mapping[str, Moment],
    model: str,
    rows: Sequence[Sequence[int]],
    seed: int,
) -> None:
    """Write both factors of every weight, with the fingerprints of model and texts; whole or not at all.

    Args:
        model: fingerprint of the model before the edit; rows: the token windows that were read; seed: of the labels.
    """
    path = Path(path)
    tensors = {f"inputs/{name}": moment.sum.cpu().contiguous() for name, moment in inputs.items()}
    tensors |= {f"gradients/{name}": moment.sum.cpu().contiguous() for name, moment in gradients.items()}
    counts = {f"inputs/{n}": m.count for n, m in inputs.items()} | {
        f"gradients/{n}": m.count for n, m in gradients.items()
    }
    metadata = {**_fingerprints(model, rows, seed), "tokens": json.dumps(counts)}
    with writing(path) as unfinished:
        save_file(tensors, unfinished, metadata=metadata)


def load_factors(
    path: str | Path, weights: Mapping[str, Tensor], model: str, rows: Sequence[Sequence[int]], seed: int
) -> Factors | None:
    """Read what :func:`save_factors` wrote, on the devices of the weights; None where there is no such file.

    Args:
        weights: name -> the weight, [out, in] or transposed, whose factors are wanted.

    Raises:
        EditError: the file cannot be read, lacks a weight, or is of another model, texts or labels.
    """
    path = Path(path)
    if not path.exists():
        return None
    moments: dict[str, dict[str, Moment]] = {"inputs": {}, "gradients": {}}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            counts = json.loads(metadata.get("tokens", "{}"))
            for key in file.keys():  # noqa: SIM118 (no mapping)
                kind, _, name = key.partition("/")
                if kind in moments and name in weights and key in counts:
                    moments[kind][name] = Moment(file.get_tensor(key).to(weights[name].device, copy=True), counts[key])
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise EditError(f"LowCurvature: factors={str(path)!r} cannot be read: {str(error).splitlines()[0]}") from error
    for what, wanted in _fingerprints(model, rows, seed).items():
        if metadata.get(what) != wanted:
            raise EditError(
                f"LowCurvature: factors={str(path)!r} was made with other {what} than this run's; give another path, "
                "or delete the file to have it made anew"
            )
    for kind, found in moments.items():
        for name, weight in weights.items():
            square = found[name].sum.ndim == 2 and len(set(found[name].sum.shape)) == 1 if name in found else False
            if not square or len(found[name].sum) not in weight.shape or not bool(found[name].sum.isfinite().all()):
                raise EditError(
                    f"LowCurvature: factors={str(path)!r} has no usable factor {kind}/{name}; delete the file to have "
                    "it made anew"
                )
    return moments["inputs"], moments["gradients"]


def _fingerprints(model: str, rows: Sequence[Sequence[int]], seed: int) -> dict[str, str]:
    of_texts = hashlib.sha256(json.dumps([seed, [list(row) for row in rows]]).encode())
    return {"weights": model, "texts": of_texts.hexdigest()}
