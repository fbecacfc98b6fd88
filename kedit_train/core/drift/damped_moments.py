"""Compute the second moments of layer inputs on texts, and factorize them, for one run or for consecutive runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from kedit_train.core.drift.factors_of_texts import factors_of_texts
from kedit_train.core.drift.linear_layers import LinearLayer
from kedit_train.core.drift.previous_inputs import Moments
from kedit_train.core.drift.remaining_moments import remaining_moments
from kedit_train.core.locality.texts import Texts
from kedit_train.core.run import EditRun
from kedit_train.errors import EditError
from kedit_train.functional.dual_keys import DampedMoment


class DampedMoments:
    """The second moments of the inputs of layers on texts, and their damped factorizations.

    Args:
        texts: the texts.
        damping: strength of the damping, above 0 (see :class:`~kedit_train.functional.dual_keys.DampedMoment`).
        path: a ``.safetensors`` file of the moments. It is read if it exists, and written otherwise. None uses no file.
        limit: maximum number of texts. None reads all texts.
        batch_size: number of sequences per forward pass.

    Attributes:
        chosen: the texts on which the moments were computed.
    """

    def __init__(
        self, texts: Texts, *, damping: float, path: str | Path | None, limit: int | None, batch_size: int
    ) -> None:
        self._texts, self._damping, self._path, self._limit = texts, damping, path, limit
        self._batch_size = batch_size
        self._moments: Moments = {}
        self._damped: dict[str, DampedMoment] = {}
        self.chosen: Sequence[str] = ()

    def read(self, run: EditRun, layers: Mapping[str, LinearLayer]) -> None:
        """Compute the moments in the first run, or read them from the file."""
        tokenizer = run.tokenizer(self._texts.tokenizer)
        self.chosen = self._texts.load(run.edits, limit=self._limit, tokenizer=tokenizer)
        source = replace(self._texts, source=self.chosen, nearest=None)
        self._moments, self._damped = self._measure(run, layers, source, self._path), {}

    def continue_with(self, run: EditRun, layers: Mapping[str, LinearLayer]) -> None:
        """Start a later run: remove the texts that contain prompts of this run's edits from the moments.

        Raises:
            EditError: the layers are not those of the first run.
        """
        if self._moments.keys() != layers.keys():
            raise EditError("sequential=True needs the same scope in every run; create a new callback for each scope.")
        before = self._moments
        self._moments, self.chosen = remaining_moments(
            before, self.chosen, self._texts, run, lambda texts: self._measure(run, layers, texts)
        )
        if self._moments is not before:
            self._damped = {}

    def mean(self, name: str) -> Tensor:
        """Return the second moment of the inputs of a layer, averaged over the tokens of the texts, [d_in, d_in]."""
        return self._moments[name].mean

    def damped(self, run: EditRun, name: str) -> DampedMoment:
        """Return the damped and factorized second moment of a layer. The factorization is computed once and kept."""
        if name not in self._damped:
            moment = self.mean(name).to(run.scope[name].device)
            with naming_weight(name):
                self._damped[name] = DampedMoment(moment, self._damping)
        return self._damped[name]

    def free_factors(self) -> None:
        """Free the memory of the factorizations. They are computed again when they are needed."""
        self._damped = {}

    def _measure(
        self, run: EditRun, layers: Mapping[str, LinearLayer], texts: Texts, path: str | Path | None = None
    ) -> Moments:
        sequences, size = texts.tokenize(run, edits=()), self._batch_size
        return factors_of_texts(
            run, layers, sequences, seed=texts.seed, batch_size=size, path=path, inputs_only=True
        ).inputs


@contextmanager
def naming_weight(name: str) -> Iterator[None]:
    """Turn a ValueError of DampedMoment or dual_keys into an EditError that names the weight."""
    try:
        yield
    except ValueError as error:
        raise EditError(
            f"the inputs of {name} on the texts or at the subjects are zero or not finite, or the damping is too small "
            f"({error}); remove this weight from the scope, or set a larger damping=."
        ) from error
