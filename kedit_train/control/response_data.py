"""``ResponseDataModule``: batches of hidden states of rewarded responses, for :class:`ValueModule`."""

from __future__ import annotations

import random
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from kedit_train.arguments import Rule, check_arguments, cut, from_mapping, integer_from, optional, within
from kedit_train.control.responses import SamplingOptions, encode_responses, sample_responses
from kedit_train.control.rewards import Reward, compute_rewards
from kedit_train.control.state_shards import StateShards, write_shards
from kedit_train.core.fingerprint import fingerprint
from kedit_train.data.chat_format import PROMPT_FORMAT, PromptFormat, check_format, read_format
from kedit_train.data.readers.files import read_file, read_text
from kedit_train.data.tokenization import pad_token_id
from kedit_train.errors import EditError, reported_by
from kedit_train.paths import PATH

_SAMPLING = SamplingOptions()
_CHUNK = 128  # Responses per file.


class ResponseDataModule(LightningDataModule):
    """Hidden states of responses, with the reward of each response.

    The responses are either given, or sampled from the language model of the trained :class:`ValueModule` before
    training. Their hidden states are written to files, so that they need not fit into memory.

    Args:
        prompts: a list, or a file (``.txt`` with one prompt per line, ``.jsonl``, ``.json`` or ``.csv``). An entry is a
            prompt, or a record with the key ``prompt`` and, for a given response, the key ``response``. Either all
            records have a response, or none has.
        reward: a function ``reward(prompts, completions)`` that returns one number per response. In a recipe: the
            ``class_path`` of a :class:`Reward`.
        sampling: options of the sampling. They are not used for given responses, except ``batch_size`` and ``seed``.
        prompt_format: "plain", "chat" (the tokenizer's chat template), "question" or a ``ChatFormat``.
        cache_dir: a folder for the hidden states. A later run with the same model, prompts and options reads them from
            there, also with another reward. None: a temporary folder.
        batch_size: number of responses per training step.
        validation: fraction of the prompts whose responses are not trained on, in [0, 1). All responses to a prompt are
            in the same part.

    Raises:
        EditError: the file cannot be read, a record has no prompt, or only some of the records have a response.

    Example:
        >>> from kedit_train.control import ResponseDataModule, ShortAnswer
        >>> data = ResponseDataModule(["The sky is", "Grass is"], reward=ShortAnswer(8))
        >>> len(data.records)
        2
    """

    def __init__(
        self,
        prompts: str | Path | Sequence[Any],
        *,
        reward: Reward | Callable[..., Any],
        sampling: SamplingOptions = _SAMPLING,
        prompt_format: PromptFormat = "plain",
        cache_dir: str | None = None,
        batch_size: int = 32,
        validation: float = 0.1,
    ) -> None:
        super().__init__()
        prompt_format = read_format(prompt_format)
        check_arguments(
            self,
            reward=(reward, Rule("a function reward(prompts, completions)", callable)),
            prompt_format=(prompt_format, PROMPT_FORMAT),
            cache_dir=(cache_dir, optional(PATH)),
            batch_size=(batch_size, integer_from(1)),
            validation=(validation, within("[0, 1)")),
        )
        self.reward, self.cache_dir = reward, cache_dir
        self.prompt_format: PromptFormat = prompt_format
        self.batch_size, self.validation = batch_size, validation
        self.sampling = from_mapping(SamplingOptions, sampling) if isinstance(sampling, Mapping) else sampling
        with reported_by("ResponseDataModule"):
            self.records = read_records(prompts)
        self.shards: StateShards | None = None
        self._remove_temporary: Any = None

    def setup(self, stage: str) -> None:
        """Sample the responses if none are given, write the hidden states, and compute the rewards."""
        if stage != "fit" or self.shards is not None:
            return
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        if not (hasattr(module, "language_model") and hasattr(module, "value")):
            raise EditError(
                f"the trained module must be a ValueModule, got {type(module).__name__}.", "ResponseDataModule"
            )
        if self.trainer is not None and self.trainer.world_size > 1:
            raise EditError(
                f"the number of processes must be 1, got {self.trainer.world_size}; set devices to 1.",
                "ResponseDataModule",
            )
        with reported_by("ResponseDataModule"):
            check_format(self.prompt_format, module.tokenizer)
            if self.trainer is not None:
                module.language_model.to(self.trainer.strategy.root_device)
            self.shards = self._collect(module)
            self.rewards = compute_rewards(self.reward, self.shards.prompts, self.shards.texts)
        self.train_indices, self.validation_indices = self._split(self.shards.prompts)
        module.value.standardize(self.shards[i] for i in self.train_indices)

    def _collect(self, module: Any) -> StateShards:
        """Write the hidden states of all responses."""
        model, tokenizer, options = module.language_model, module.tokenizer, self.sampling
        given = "response" in self.records[0]
        repeats = 1 if given else options.samples
        rows = [record for record in self.records for _ in range(repeats)]
        settings = {"seed": options.seed, "temperature": options.temperature, "length": options.max_new_tokens}
        common = [fingerprint(model), repr(self.prompt_format), None if given else settings]

        def make(start: int, part: list[dict[str, str]]) -> Any:
            if given:
                return lambda: encode_responses(model, tokenizer, part, self.prompt_format)
            prompts = [record["prompt"] for record in part]
            return lambda: sample_responses(model, tokenizer, prompts, options, self.prompt_format, first=start)

        chunks = [(start, rows[start : start + _CHUNK]) for start in range(0, len(rows), _CHUNK)]
        folder = Path(self.cache_dir or tempfile.mkdtemp(prefix="kedit-value-"))
        if self.cache_dir is None:
            # Also after an error, when teardown is not called.
            self._remove_temporary = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return write_shards(
            model,
            module.value.layers,
            folder,
            [([*common, start, part], make(start, part)) for start, part in chunks],
            batch_size=options.batch_size,
            pad_id=pad_token_id(tokenizer),
        )

    def _split(self, prompts: Sequence[str]) -> tuple[list[int], list[int]]:
        """Split the responses by their prompts into training and validation."""
        distinct = list(dict.fromkeys(prompts))
        random.Random(self.sampling.seed).shuffle(distinct)
        count = round(self.validation * len(distinct))
        held_out = set(distinct[: min(count, len(distinct) - 1)])
        train = [i for i, prompt in enumerate(prompts) if prompt not in held_out]
        return train, [i for i, prompt in enumerate(prompts) if prompt in held_out]

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training batches, in a new order in every epoch."""
        return self._loader(self.train_indices, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the batches of the held-out prompts, or an empty list if ``validation`` leaves none."""
        return self._loader(self.validation_indices, shuffle=False) if self.validation_indices else []

    def _loader(self, indices: list[int], shuffle: bool) -> DataLoader[Any]:
        def collate(batch: list[int]) -> dict[str, Any]:
            assert self.shards is not None
            return pad_states([self.shards[i] for i in batch], self.rewards[batch])

        # The entries are numbers: the hidden states are read from the files when a batch is made.
        entries: Any = indices
        return DataLoader(entries, batch_size=self.batch_size, shuffle=shuffle, collate_fn=collate)

    def teardown(self, stage: str) -> None:
        """Remove the temporary folder, if there is one."""
        if self._remove_temporary is not None:
            self.shards = None
            self._remove_temporary()
            self._remove_temporary = None


def read_records(prompts: Any) -> list[dict[str, str]]:
    """Return records with ``prompt`` and, if responses are given, ``response``."""
    where = "prompts"
    if isinstance(prompts, str | Path):
        where, path = str(prompts), Path(prompts)
        is_text = path.suffix.lower() == ".txt"
        prompts = [line for line in read_text(path).splitlines() if line.strip()] if is_text else read_file(path)
    if not isinstance(prompts, Sequence) or not prompts:
        raise EditError(f"prompts must be a file or a non-empty list, got {cut(repr(prompts), 100)}.")
    records: list[dict[str, str]] = []
    for number, entry in enumerate(prompts, 1):
        record = {"prompt": entry} if isinstance(entry, str) else entry
        keys = [key for key in ("prompt", "response") if isinstance(record, Mapping) and key in record]
        if "prompt" not in keys or not all(isinstance(record[key], str) and record[key].strip() for key in keys):
            raise EditError(
                f"{where}, record {number}: expected a prompt, or a record with texts for prompt and response, got "
                f"{cut(repr(entry), 80)}; correct this record."
            )
        records.append({key: record[key] for key in keys})
        if len(records[0]) != len(keys):
            raise EditError(
                f"{where}, record {number}: either all records or none must have a response, but this record differs "
                "from the first one; add the missing responses, or use two files."
            )
    return records


def pad_states(states: Sequence[Mapping[str, Tensor]], rewards: Tensor) -> dict[str, Any]:
    """Return a batch: ``states`` (layer -> [batch, length, hidden]), ``mask`` [batch, length], ``rewards`` [batch]."""
    lengths = torch.tensor([len(next(iter(one.values()))) for one in states])
    padded = {
        name: torch.nn.utils.rnn.pad_sequence([one[name] for one in states], batch_first=True) for name in states[0]
    }
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    return {"states": padded, "mask": mask, "rewards": rewards}
