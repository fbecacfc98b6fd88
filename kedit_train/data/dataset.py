"""A list of edits: read from any public format, saved as one's own, turned into what trainers eat."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from kedit_train import world
from kedit_train.atomic_write import writing
from kedit_train.data.prompts import PromptFormat, as_question, check_format, encode_in, turns
from kedit_train.data.readers import own, read_records
from kedit_train.data.readers.fields import describe
from kedit_train.data.readers.files import read_file
from kedit_train.data.tokenization import Encoded, separator
from kedit_train.edit import Edit, Probe
from kedit_train.errors import EditError
from kedit_train.optional import require

if TYPE_CHECKING:
    import datasets

OnError = Literal["raise", "skip"]


class EditDataset(Sequence[Edit]):
    """Edits in order. An index gives an ``Edit``, a slice another ``EditDataset``.

    Args:
        edits: at least one.
        name: what messages and reports call them, e.g. the file's name.
        format: which format they were read from; ``"edits"`` is this package's own.
        skipped: one line for each record that ``on_error="skip"`` left out.

    Raises:
        EditError: there are none, or one has a blank prompt or target or a field of the wrong type.
    """

    def __init__(
        self, edits: Iterable[Edit], name: str = "edits", format: str = "edits", skipped: Iterable[str] = ()
    ) -> None:
        self._edits = tuple(edits)
        self.name = name
        self.format = format
        self.skipped = tuple(skipped)
        if not self._edits:
            raise EditError(f"{name}: there are no edits: give at least one prompt with its target")
        for i, edit in enumerate(self._edits):
            check_edit(edit, f"{name}, edit {i}")

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        format: str | None = None,
        on_error: OnError = "raise",
        limit: int | None = None,
    ) -> EditDataset:
        """Read a ``.json``, ``.jsonl`` or ``.csv`` file; the format is recognised from its records.

        Formats: ``edits`` (our own), ``counterfact``, ``counterfact_nested``, ``zsre``, ``knowedit``,
        ``wikibigedit``, ``qaedit``, ``mquake``; what each field becomes stands in ``kedit_train/data/readers``.

        Args:
            path: the file, or ``"world"`` for edits of the embedded world.
            format: one of the names above, where the fields alone do not tell.
            on_error: ``"raise"`` stops at the first bad record; ``"skip"`` leaves bad records out, warns once with
                their number and the first reason, and keeps every reason in ``.skipped``.
            limit: stop after so many records that could be read. A record of MQuAKE holds up to four edits.

        Raises:
            EditError: one line with the file, the record's number (from 1), the field and what was expected.
        """
        if world.is_world(path):
            if format not in (None, "edits"):
                raise EditError(f"the embedded world is not read from a file of format {format!r}: leave format out")
            return cls(world.edits() if limit is None else world.edits(n=limit), name=world.NAME)
        path = Path(path)
        edits, found, skipped = read_records(
            read_file(path),
            str(path),
            format=format,
            on_error=on_error,
            limit=limit,
            csv=path.suffix.lower() == ".csv",
        )
        return cls(edits, name=path.name, format=found, skipped=skipped)

    @classmethod
    def of(cls, edits: EditDataset | Sequence[Edit] | str | Path) -> EditDataset:
        """Edits as they are, as a list, or in a file that ``load`` reads."""
        if isinstance(edits, str | Path):
            return cls.load(edits)
        return edits if isinstance(edits, EditDataset) else cls(edits)

    @classmethod
    def from_records(
        cls,
        records: Iterable[Mapping[str, Any]] | datasets.Dataset,
        *,
        name: str = "records",
        format: str | None = None,
        on_error: OnError = "raise",
    ) -> EditDataset:
        """The same from a list of dicts or a ``datasets.Dataset``; the arguments are those of ``load``."""
        if isinstance(records, (str, Mapping)):
            raise EditError(f"{name}: from_records wants a list of records, not one {type(records).__name__}: use load")
        edits, found, skipped = read_records(list(records), name, format=format, on_error=on_error)
        return cls(edits, name=name, format=found, skipped=skipped)

    @overload
    def __getitem__(self, index: int) -> Edit: ...
    @overload
    def __getitem__(self, index: slice) -> EditDataset: ...
    def __getitem__(self, index: int | slice) -> Edit | EditDataset:
        return self._with(self._edits[index]) if isinstance(index, slice) else self._edits[index]

    def __len__(self) -> int:
        return len(self._edits)

    def __repr__(self) -> str:
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        first = self._edits[0]
        return (
            f"EditDataset({self.name!r}, {len(self)} edits, format={self.format!r}{skipped}, hash={self.hash[:12]}, "
            f"first: {first.prompt!r} -> {first.target!r})"
        )

    def _with(self, edits: Sequence[Edit]) -> EditDataset:
        return EditDataset(edits, name=self.name, format=self.format, skipped=self.skipped)

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of the edits as canonical JSON: equal for equal edits in equal order, whatever their file."""
        digest = hashlib.sha256()
        for edit in self._edits:
            digest.update(json.dumps(own.write(edit), sort_keys=True, separators=(",", ":")).encode() + b"\n")
        return digest.hexdigest()

    def sample(self, n: int, seed: int = 0) -> EditDataset:
        """``n`` different edits drawn with ``seed``, in the order in which they stand here."""
        if not 1 <= n <= len(self):
            raise EditError(f"{self.name}: cannot draw {n} of {len(self)} edits: use 1 to {len(self)}")
        return self._with([self._edits[i] for i in sorted(random.Random(seed).sample(range(len(self)), n))])

    def save(self, path: str | Path) -> Path:
        """Write this package's own JSONL; ``load`` gives equal edits back. The file is there whole or not at all."""
        path = Path(path)
        if path.suffix.lower() != ".jsonl":
            raise EditError(f"{path}: edits are saved as .jsonl: change the file's ending")
        with writing(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="\n") as file:
            for edit in self._edits:
                file.write(json.dumps(own.write(edit), ensure_ascii=False) + "\n")
        return path

    def to_old_targets(self) -> EditDataset:
        """The same prompts with what was true before as their targets: the run whose change is what is to be forgotten.

        F-Learning ("Forgetting before Learning", arXiv 2311.08011) subtracts that change before it learns the new
        facts (``-EditDelta.load(path)``).

        Raises:
            EditError: an edit has no ``old_target``.
        """
        found = []
        for i, edit in enumerate(self._edits):
            if edit.old_target is None:
                raise EditError(
                    f"{self._named(i)}: it has no old_target, so there is nothing to train it back to; give it "
                    "one, e.g. the unedited model's own answer (kedit_train.evaluation.generate_answers)"
                )
            found.append(replace(edit, target=edit.old_target, old_target=None, aliases=()))
        return self._with(found)

    def to_prompt_completion(self, prompt_format: PromptFormat = "plain") -> datasets.Dataset:
        """The edits in TRL's columns ``prompt`` and ``completion``, for an unmodified ``SFTTrainer``.

        As texts, the completion opens with the space that separates it from the prompt, where one is needed. In a chat
        both are lists of messages, which ``SFTTrainer`` renders with the template of its tokenizer. End-of-text is not
        in them: ``SFTTrainer`` (trl 1.16) appends ``tokenizer.eos_token`` to every text that does not end in it, in a
        chat what the template puts after an answer, and scores completions only. What it does differently from
        ``encode``, seen in its source and tried:

        - sequences beyond ``SFTConfig.max_length`` (1,024 unless set) are cut, and left out where nothing of the
          target remains: run ``encode`` with ``max_length`` first to be told;
        - a prompt whose end merges with the completion's beginning into one token loses that end, with a warning;
          ``encode`` keeps the prompt's own tokens;
        - a tokenizer that appends end-of-text by itself gets it twice;
        - in a chat, everything that the template puts behind the generation prompt is scored: a line break after the
          token that closes the turn, an empty train of thought before the answer. ``encode`` ends with that token, and
          counts what stands before the answer as the prompt's. Where the template closes no turn, nothing is appended.

        Further rows (pseudo-paraphrases, replayed facts) are edits like any other: with ``rows = augmentation(model,
        tokenizer, edits, prefixes=5, replay="prompts.txt")(edits)`` of ``kedit_train.augmentation``, train on
        ``EditDataset([*edits, *rows]).to_prompt_completion()``.

        Args:
            prompt_format: ``"plain"``, as a ``"chat"``, or framed as a ``"question"``.

        Returns:
            ``len(self)`` rows. Nothing but prompt and target goes in: no rephrase, no probe.
        """
        check_format(prompt_format)
        with require("datasets", extra="trl"):
            import datasets

        rows: list[dict[str, Any]] = []
        for edit in self._edits:
            if prompt_format == "chat":
                prompt, completion = turns(edit.prompt), turns(edit.prompt, edit.target)[1:]
            else:
                prompt = as_question(edit.prompt) if prompt_format == "question" else edit.prompt
                completion = separator(prompt, edit.target) + edit.target
            rows.append({"prompt": prompt, "completion": completion})
        return datasets.Dataset.from_list(rows)

    def encode(
        self,
        tokenizer: Any,
        *,
        append_eos: bool = True,
        max_length: int | None = None,
        prompt_format: PromptFormat = "plain",
    ) -> list[Encoded]:
        """Tokens and target mask of every edit, see ``prompts.encode_in``; errors name the edit.

        Args:
            append_eos: end every target, exactly once, with end-of-text; in a chat with the token that closes the
                assistant's turn, where the template has one.
            max_length: the tokenizer's own bound by default, where it has one.
            prompt_format: ``"plain"``, through the tokenizer's template as a ``"chat"``, or framed as a ``"question"``.
        """
        check_format(prompt_format, tokenizer)
        bound = getattr(tokenizer, "model_max_length", None)
        # Tokenizers without a bound carry an astronomical number.
        max_length = bound if max_length is None and isinstance(bound, int) and bound < 10**9 else max_length
        rest: dict[str, Any] = {"append_eos": append_eos, "max_length": max_length}
        return [
            encode_in(tokenizer, edit.prompt, edit.target, prompt_format, where=self._named(i), **rest)
            for i, edit in enumerate(self._edits)
        ]

    def _named(self, i: int) -> str:
        return f"{self.name}, edit {i}" + (f" (id {self._edits[i].id})" if self._edits[i].id else "")


def check_edit(edit: object, where: str) -> None:
    """The one place where an edit's content is validated, whoever made it.

    Raises:
        EditError: not an ``Edit``; prompt, target or a probe's prompt is blank; a field has the wrong type; a text
            is not valid Unicode.
    """

    def text(value: object, field: str) -> None:
        if not isinstance(value, str) or not value.strip():
            raise EditError(f"{where}: {field} is {describe(value)} (expected text): give it a value")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise EditError(f"{where}: {field} has a lone surrogate at {error.start}: mend its encoding") from error

    def texts(values: object, field: str) -> None:
        if not isinstance(values, tuple):
            raise EditError(
                f"{where}: {field} is {describe(values)} (expected a tuple of texts): wrap it in tuple(...)"
            )
        for i, value in enumerate(values):
            text(value, f"{field}[{i}]")

    if not isinstance(edit, Edit):
        raise EditError(f"{where}: it is {describe(edit)} (expected an Edit): use from_records for dicts")
    text(edit.prompt, "prompt")
    text(edit.target, "target")
    for field, value in (("subject", edit.subject), ("old_target", edit.old_target)):
        if value is not None:
            text(value, field)
    if edit.id != "":
        text(edit.id, "id")
    texts(edit.aliases, "aliases")
    texts(edit.rephrases, "rephrases")
    for field, kinds in (("locality", edit.locality), ("portability", edit.portability)):
        if not isinstance(kinds, Mapping):
            raise EditError(f"{where}: {field} is {describe(kinds)} (expected a mapping): use {{kind: (Probe, ...)}}")
        for kind, probes in kinds.items():
            text(kind, f"a kind of {field}")
            if not isinstance(probes, tuple) or not all(isinstance(probe, Probe) for probe in probes):
                raise EditError(f"{where}: {field}[{kind!r}] is no tuple of Probe: use {{kind: (Probe, ...)}}")
            for i, probe in enumerate(probes):
                text(probe.prompt, f"{field}[{kind!r}][{i}].prompt")
                texts(probe.answers, f"{field}[{kind!r}][{i}].answers")
