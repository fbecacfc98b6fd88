"""A list of edits: load it from a file, save it, tokenize it, or convert it to a dataset for TRL."""

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
from kedit_train.arguments import Rule, check_arguments, integer_from, one_of, optional
from kedit_train.atomic_write import writing
from kedit_train.data.answer_end import APPEND_EOS, AppendEos, decide_append_eos
from kedit_train.data.contradictions import check_contradictions, numbered, without_overwritten
from kedit_train.data.host_datasets import TrainerDatasets
from kedit_train.data.prompts import PromptFormat, check_format, encode_in_format
from kedit_train.data.readers import own, read_records
from kedit_train.data.readers.check_edit import check_edit
from kedit_train.data.readers.documents import form_of, read_path
from kedit_train.data.readers.fields import describe
from kedit_train.data.tokenization import Encoded
from kedit_train.edit import Edit
from kedit_train.errors import EditError
from kedit_train.paths import PATH

if TYPE_CHECKING:
    import datasets
    from torch import nn

OnError = Literal["raise", "skip"]
LIMIT = optional(integer_from(1))
_WORLD_FORMAT = Rule('"edits", or None, for the edits of "world"', optional(one_of(("edits",))).holds)


class EditDataset(TrainerDatasets):
    """A sequence of edits. An index returns an :class:`Edit`, a slice returns an ``EditDataset``.

    Args:
        edits: at least one edit.
        name: the name of the dataset in messages and reports, for example the name of the file.
        format: the format that the edits were read from. "edits" is the format of kedit-train.
        skipped: one message for each record that could not be read.

    Raises:
        EditError: there is no edit, a text of an edit has no visible character or is not valid Unicode, or a field has
            a wrong type.

    Example:
        >>> from kedit_train import Edit, EditDataset
        >>> edits = EditDataset([Edit("Ada lives in", "Bern"), Edit("Ben lives in", "Basel")])
        >>> edits[1].target
        'Basel'
        >>> len(EditDataset.load("world", limit=3)[1:])
        2
    """

    def __init__(
        self, edits: Iterable[Edit], *, name: str = "edits", format: str = "edits", skipped: Iterable[str] = ()
    ) -> None:
        if not isinstance(edits, Iterable):
            raise EditError(f"edits must be a list of Edit, a dataset or a path, got {edits!r}; give the edits.")
        self._edits = tuple(edits)
        self.name = name
        self.format = format
        self.skipped: tuple[str, ...] = tuple(skipped)
        if not self._edits:
            raise EditError(
                f"{name}: the dataset must contain at least one edit, got none; give an edit with a prompt and a target"
            )
        for i, edit in enumerate(self._edits):
            check_edit(edit, f"{name}, edit {i + 1}")

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        format: str | None = None,
        on_error: OnError = "raise",
        limit: int | None = None,
    ) -> EditDataset:
        """Read a file of edits or of documents, or a folder of documents. ``docs/data.md`` describes the formats.

        The format of a ``.json``, ``.jsonl`` or ``.csv`` file is recognized from the fields of its records. A ``.txt``
        or ``.md`` file is read as a document. In a folder, all ``.txt``, ``.md``, ``.jsonl`` and ``.csv`` files are
        read as documents (``docs/documents.md``).

        Args:
            path: the path, or "world" for edits of the bundled model (the small model that comes with kedit-train).
            format: the name of a format, such as "edits" or "counterfact". None recognizes the format.
            on_error: "raise" stops at the first bad record. "skip" leaves bad records out, warns once with the number
                of skipped records and the first reason, and keeps every reason in ``skipped``.
            limit: stop after this many readable records. A record of MQuAKE contains up to four edits, and a record of
                any other format contains one. None reads the whole file, or all 24 edits if ``path`` is "world".

        Raises:
            EditError: the file or a record cannot be read. The message names the file, the number of the record
                (from 1), the field, the expected value and the given value.

        Example:
            >>> EditDataset.load("world", limit=2).format
            'edits'
        """
        if world.is_world(path):
            check_arguments("EditDataset", format=(format, _WORLD_FORMAT), limit=(limit, LIMIT))
            edits = world.edits()
            if limit is not None and limit > len(edits):
                raise EditError(
                    f'limit must be an integer from 1 to {len(edits)} for the edits of "world", got {limit}; for more '
                    f"edits, save EditDataset(kedit_train.world.edits({limit})) to a .jsonl file and load the file.",
                    component="EditDataset",
                )
            # The probes of an edit depend on all edits of a list, so the full list is made first and cut afterwards.
            return cls(edits[:limit], name=world.NAME)
        check_arguments("EditDataset", path=(path, PATH))
        path = Path(path)
        csv = path.suffix.lower() == ".csv"
        records, places = read_path(path)
        options: dict[str, Any] = {"places": places, "on_error": on_error, "limit": limit, "csv": csv}
        edits, recognized, skipped = read_records(records, str(path), format=format or form_of(path), **options)
        return cls(edits, name=path.name or str(path), format=recognized, skipped=skipped)

    @classmethod
    def of(cls, edits: EditDataset | Sequence[Edit] | str | Path) -> EditDataset:
        """Convert a dataset, a sequence of edits or the path of a file (see :meth:`load`) to an ``EditDataset``."""
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
        """Read edits from a list of dicts or from a ``datasets.Dataset``.

        ``format`` and ``on_error`` are the same arguments as in :meth:`load`. ``name`` is shown in messages.

        Example:
            >>> EditDataset.from_records([{"prompt": "Ada lives in", "target": "Bern"}])[0].target
            'Bern'
        """
        if isinstance(records, (str, Mapping)) or not isinstance(records, Iterable):
            raise EditError(
                f"records must be a list of dicts or a datasets.Dataset, got {describe(records)}; use EditDataset.load "
                "to read a file",
                component="EditDataset",
            )
        edits, recognized, skipped = read_records(list(records), name, format=format, on_error=on_error)
        return cls(edits, name=name, format=recognized, skipped=skipped)

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

    def _where(self, i: int) -> str:
        return f"{self.name}, edit {numbered(self._edits, i)}"

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the edits as canonical JSON.

        The same edits in the same order have the same hash, regardless of the file that they were read from.
        """
        digest = hashlib.sha256()
        for edit in self._edits:
            digest.update(json.dumps(own.write(edit), sort_keys=True, separators=(",", ":")).encode() + b"\n")
        return digest.hexdigest()

    def sample(self, n: int, *, seed: int = 0) -> EditDataset:
        """Draw ``n`` different edits at random with ``seed``, and return them in the order of this dataset."""
        if not 1 <= n <= len(self):
            raise EditError(f"{self.name}: n must be from 1 to {len(self)} (the number of edits), got {n}.")
        return self._with([self._edits[i] for i in sorted(random.Random(seed).sample(range(len(self)), n))])

    def save(self, path: str | Path) -> Path:
        """Save the edits as JSONL in the format of kedit-train.

        :meth:`load` reads the same edits back. The file is written completely or not at all.
        """
        path = Path(path)
        if path.suffix.lower() != ".jsonl":
            raise EditError(
                f"{path}: the path must end in .jsonl, because edits are saved as JSONL; change the ending of the path"
            )
        with writing(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="\n") as file:
            for edit in self._edits:
                file.write(json.dumps(own.write(edit), ensure_ascii=False) + "\n")
        return path

    def latest(self) -> EditDataset:
        """Return a dataset without the edits that a later edit contradicts.

        ``docs/data.md`` says when two edits contradict each other.

        Example:
            >>> EditDataset([Edit("Ada lives in", "Bern"), Edit("Ada lives in", "Rome")]).latest()[0].target
            'Rome'
        """
        return self._with([self._edits[i] for i in without_overwritten(self._edits)])

    def check_trained_together(self) -> None:
        """Raise an error if two edits contradict each other, because a model cannot learn both targets in one run.

        :meth:`encode` and the methods that make a dataset for a trainer call this method. In the modes "sequential"
        and "streaming" of :func:`~kedit_train.run_edits`, a later edit replaces an earlier edit that it contradicts.

        Raises:
            EditError: two edits contradict each other (see :meth:`latest`).
        """
        check_contradictions(self._edits, self.name)

    def to_old_targets(self) -> EditDataset:
        """Return a dataset with the same prompts, but with the old answers as targets.

        F-Learning (forgetting before learning) first trains on this dataset and saves the weight change as a delta.
        Then it subtracts the delta (``-EditDelta.load(path)``) from the model, and trains on the new facts.

        Raises:
            EditError: an edit has no ``old_target``.

        References:
            "Forgetting before Learning: Utilizing Parametric Arithmetic for Knowledge Updating in Large Language
            Models", arXiv 2311.08011.
        """
        edits = []
        for i, edit in enumerate(self._edits):
            if edit.old_target is None:
                raise EditError(
                    f"{self._where(i)}: old_target must be text, got None; set old_target, for example to the answer "
                    "of the unedited model (kedit_train.evaluation.generate_answers)"
                )
            edits.append(replace(edit, target=edit.old_target, old_target=None, aliases=()))
        return self._with(edits)

    def encode(
        self,
        tokenizer: Any,
        *,
        append_eos: AppendEos = "auto",
        model: nn.Module | None = None,
        max_length: int | None = None,
        prompt_format: PromptFormat = "plain",
    ) -> list[Encoded]:
        """Tokenize every edit with :func:`~kedit_train.data.prompts.encode_in_format`.

        Args:
            tokenizer: a tokenizer of ``transformers``.
            append_eos: whether every target ends with exactly one end token. This is end-of-text or, in a chat, the
                token with which the template closes the turn of the assistant, if the template has such a token. "auto"
                appends the end token in chats and with the format "question". With the format "plain", "auto" appends
                it if ``model`` is None, or if ``model`` ends its completions by itself.
                :func:`~kedit_train.data.answer_end.decide_append_eos` describes all cases.
            model: the unedited model, for ``append_eos="auto"``. It is left unchanged.
            max_length: the maximum number of tokens of an edit. None uses the limit of the tokenizer
                (``model_max_length``), if the tokenizer has a limit.
            prompt_format: "plain" leaves prompts as they are. "chat" and a :class:`~kedit_train.ChatFormat` apply the
                chat template of the tokenizer. "question" frames every prompt as a question.

        Returns:
            One :class:`~kedit_train.data.tokenization.Encoded` per edit, for :class:`~kedit_train.data.EditCollator`.

        Raises:
            EditError: an edit cannot be tokenized or is too long, or two edits contradict each other. The message names
                the edits.
        """
        check_arguments("EditDataset", append_eos=(append_eos, APPEND_EOS))
        check_format(prompt_format, tokenizer)
        self.check_trained_together()
        limit = getattr(tokenizer, "model_max_length", None)
        # A tokenizer without a limit has a very large number here.
        if max_length is None and isinstance(limit, int) and limit < 10**9:
            max_length = limit
        end = decide_append_eos(append_eos, tokenizer, self, model=model, prompt_format=prompt_format)
        options: dict[str, Any] = {"append_eos": end.append, "max_length": max_length}
        return [
            encode_in_format(tokenizer, edit.prompt, edit.target, prompt_format, where=self._where(i), **options)
            for i, edit in enumerate(self._edits)
        ]
