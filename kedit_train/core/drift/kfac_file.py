"""Write K-FAC factors to a file, and read them again.

A file can be used only with the model, the texts and the label seed for which its factors were computed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from kedit_train.core.drift.kfac import KFACFactors
from kedit_train.core.drift.second_moments import SecondMoment
from kedit_train.errors import EditError
from kedit_train.safetensors_file import load_tensors, save_tensors

_KIND = "kedit_train.kfac_factors"
# If the factors leave out the first token of every text, the stored fingerprint of the model ends with this string.
WITHOUT_FIRST = " without first tokens"
_RETRY = "delete the file to compute the factors again"


def save_factors(
    path: str | Path, factors: KFACFactors, model: str, sequences: Sequence[Sequence[int]], seed: int
) -> None:
    """Write the factors of every weight to a file, with fingerprints of the model, the texts and the label seed.

    The file is written completely or not at all.

    Args:
        path: the ``.safetensors`` file; an existing file is replaced.
        factors: the factors to write.
        model: fingerprint of the model before the edit (:func:`kedit_train.core.fingerprint.fingerprint`).
        sequences: token ids of the texts.
        seed: seed of the sampled labels.
    """
    moments = _by_key(factors)
    counts = {key: moment.count for key, moment in moments.items()}
    metadata = {**_fingerprints(model, sequences, seed), "tokens": counts}
    save_tensors(path, {key: moment.sum for key, moment in moments.items()}, metadata, kind=_KIND)


def load_factors(
    path: str | Path,
    weights: Mapping[str, Tensor],
    model: str,
    sequences: Sequence[Sequence[int]],
    seed: int,
    *,
    inputs_only: bool = False,
) -> KFACFactors | None:
    """Read the factors that :func:`save_factors` has written.

    Args:
        path: the ``.safetensors`` file.
        weights: name -> weight, [out, in] or [in, out]. The factors of each weight are read and moved to its device.
        model: as for :func:`save_factors`.
        sequences: as for :func:`save_factors`.
        seed: as for :func:`save_factors`.
        inputs_only: whether to read only the factors of the inputs.

    Returns:
        The factors, or None if the file does not exist.

    Raises:
        EditError: the file cannot be read, was written for another model, other texts or another seed, or does not
            contain finite factors of the right size for every weight.
    """
    path = Path(path)
    if not path.exists():
        return None
    try:
        tensors, metadata = load_tensors(path, kind=_KIND, memory_map=False)
    except EditError as error:
        # The message ends with advice about a downloaded file, but factors can be computed again.
        reason = str(error).rpartition("; ")[0] or str(error).rstrip(".")
        raise EditError(
            f"factors_path={str(path)!r} cannot be used: {reason}; use another path, or {_RETRY}."
        ) from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get("tokens"), dict):
        raise EditError(
            f"factors_path={str(path)!r} cannot be used: the file does not state from how many tokens each factor was "
            f"computed; {_RETRY}."
        )
    for subject, fingerprint in _fingerprints(model, sequences, seed).items():
        found = str(metadata.get(subject))
        if found == fingerprint:
            continue
        if found.removesuffix(WITHOUT_FIRST) == fingerprint.removesuffix(WITHOUT_FIRST):
            how = "by another callback, which handles the first tokens of texts differently"
        elif subject == "texts":
            how = (
                "with other texts, another limit or another seed, or for other edits (texts that contain a prompt of "
                "an edit are left out)"
            )
        else:
            how = f"with other {subject} than those of this run"
        raise EditError(
            f"the file at factors_path={str(path)!r} does not fit this run: its factors were computed {how}; use "
            f"another path, or {_RETRY}."
        )
    factors = KFACFactors({}, {})
    kinds = [("inputs", factors.inputs)] + ([] if inputs_only else [("gradients", factors.gradients)])
    for kind, moments in kinds:
        for name, weight in weights.items():
            key = f"{kind}/{name}"
            matrix, count = tensors.get(key), metadata["tokens"].get(key)
            if matrix is None and any(other.startswith(f"{kind}/") for other in tensors):
                raise EditError(
                    f"the file at factors_path={str(path)!r} has no statistics of the parameter {name!r}, because "
                    "it was written for another scope; use another path."
                )
            if matrix is None and kind == "gradients":
                raise EditError(
                    f"the file at factors_path={str(path)!r} has no statistics of gradients, because it was written by "
                    "NullSpace or with factors='inputs'; use another path."
                )
            if matrix is None or type(count) is not int or not 0 < count < 2**63 or not _is_factor(matrix, weight):
                raise EditError(f"the file at factors_path={str(path)!r} has no valid factor {key!r}; {_RETRY}.")
            moments[name] = SecondMoment(matrix.to(weight.device), count)
    return factors


def _by_key(factors: KFACFactors) -> dict[str, SecondMoment]:
    inputs = {f"inputs/{name}": moment for name, moment in factors.inputs.items()}
    return inputs | {f"gradients/{name}": moment for name, moment in factors.gradients.items()}


def _is_factor(matrix: Tensor, weight: Tensor) -> bool:
    """Return whether the matrix is finite and has shape [n, n], where n is one of the two sizes of the weight."""
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
    return square and len(matrix) in weight.shape and bool(matrix.isfinite().all())


def _fingerprints(model: str, sequences: Sequence[Sequence[int]], seed: int) -> dict[str, str]:
    texts = hashlib.sha256(json.dumps([seed, [list(ids) for ids in sequences]]).encode())
    return {"weights": model, "texts": texts.hexdigest()}
