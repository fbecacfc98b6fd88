"""Compute the K-FAC factors of a model on texts, or read the factors from a file. Several callbacks use this module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from kedit_train.core.drift.kfac import KFACFactors, kfac_factors
from kedit_train.core.drift.kfac_file import WITHOUT_FIRST, load_factors, save_factors
from kedit_train.core.drift.linear_layers import LinearLayer
from kedit_train.core.drift.model_batches import find_text_model, process_batches
from kedit_train.core.drift.second_moments import input_moments
from kedit_train.core.fingerprint import fingerprint
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError


def check_no_adapters(layers: Iterable[str]) -> None:
    """Raise an error if one of the names belongs to a LoRA factor."""
    if adapters := [name for name in layers if ".lora_A." in name or ".lora_B." in name]:
        raise EditError(
            f"the scope must not contain LoRA factors, got {adapters[0]}. The B factor of a new adapter is zero, so "
            "the curvature of its A factor is zero too; train the weight of the base layer instead of the adapter, or "
            "use NullSpace instead of this callback."
        )


def factors_of_texts(
    run: EditRun,
    layers: Mapping[str, LinearLayer],
    sequences: list[list[int]],
    *,
    seed: int,
    batch_size: int,
    path: str | Path | None,
    inputs_only: bool = False,
    skip_first: bool = False,
) -> KFACFactors:
    """Compute the K-FAC factors of the unedited model on texts, or read the factors from a file.

    Args:
        run: the current run.
        layers: name -> linear layer.
        sequences: the token ids of the texts on which the predictions should stay the same (``Texts.tokenize``).
        seed: seed of the sampled labels.
        batch_size: sequences per forward and backward pass.
        path: a ``.safetensors`` file. It is read if it exists, and written otherwise. None uses no file.
        inputs_only: whether to compute only the factors of the layer inputs. The factors of the gradients need a
            backward pass and a causal language model; the factors of the inputs need neither.
        skip_first: whether to leave out the first token of every sequence.

    Raises:
        EditError: the file cannot be used, or a layer is not supported.
    """
    model = ""
    if path is not None:
        with run.reference_model():
            model = fingerprint(run.model, run.masters.dtypes if run.masters is not None else None)
        model += WITHOUT_FIRST if skip_first else ""
        weights = {name: run.scope[name] for name in layers}
        stored = load_factors(path, weights, model, sequences, seed, inputs_only=inputs_only)
        if stored is not None:
            return stored
    run.host.show_progress(f"computing statistics of {len(sequences)} texts for {len(layers)} weights")
    if inputs_only:
        device = next(run.model.parameters()).device
        batches = process_batches(sequences, batch_size, device)
        inputs = (batch.without_first() if skip_first else batch for batch in batches)
        factors = KFACFactors(input_moments(run, layers, find_text_model(run), inputs), {})
    else:
        factors = kfac_factors(run, layers, sequences, batch_size=batch_size, seed=seed, skip_first=skip_first)
    if path is not None and run.host.is_main:
        save_factors(path, factors, model, sequences, seed)
    return factors
