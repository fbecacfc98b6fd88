"""``ResponseDataModule``: the hidden states and the rewards of responses, to train a :class:`ValueModule`."""

from __future__ import annotations

import random
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from kedit_train.arguments import Rule, check_arguments, from_mapping, integer_from, optional, within
from kedit_train.atomic_write import check_writable
from kedit_train.control.control_metrics import ControlMetrics
from kedit_train.control.records import read_records
from kedit_train.control.responses import Response, SamplingOptions, encode_responses, sample_responses
from kedit_train.control.rewards import Reward, check_reward, compute_rewards
from kedit_train.control.state_shards import StateShards, write_shards
from kedit_train.control.value import describe_model
from kedit_train.core.fingerprint import fingerprint
from kedit_train.data.chat_format import PROMPT_FORMAT, PromptFormat, check_format, read_format
from kedit_train.data.prompts import encode_prompts
from kedit_train.data.tokenization import context_length, pad_token_id
from kedit_train.errors import EditError, reported_by, warn
from kedit_train.evaluation.asking.batching import unwrap_model
from kedit_train.evaluation.asking.generate import AnswerEnd
from kedit_train.owners import claim, release, remove, remove_abandoned
from kedit_train.paths import PATH

_SAMPLING = SamplingOptions()
_CHUNK = 128  # number of responses whose hidden states are stored in one file
# In bf16-true or 16-true, the trainer would convert the value function to half precision.
_PRECISIONS = ("32-true", "64-true", "16-mixed", "bf16-mixed")
_OPTIONS = Rule("SamplingOptions or a mapping", lambda given: isinstance(given, SamplingOptions | Mapping))


class ResponseDataModule(LightningDataModule):
    """Hidden states of responses, with the reward of each response.

    The responses are either given, or sampled from the language model of the :class:`ValueModule` before the training
    of the value function. The hidden states are written to files, so that they need not fit into memory.

    Args:
        prompts: a list, or a file (``.txt`` with one prompt per line, ``.jsonl``, ``.json`` or ``.csv``). An entry is a
            prompt, or a record with the key ``prompt`` and, for a given response, the key ``response``. Either all
            records have a response, or none has.
        reward: a function ``reward(prompts, completions)`` that returns one number per response. In a recipe: the
            ``class_path`` of a :class:`Reward`.
        sampling: how responses are sampled. If the responses are given, only two of these options are used:
            ``batch_size``, and ``seed`` for the random choice of the held-out prompts.
        prompt_format: "plain", "chat" (the tokenizer's chat template), "question" or a ``ChatFormat``.
        cache_dir: a folder for the hidden states. A later run with the same model, tokenizer, prompts and options reads
            them from this folder, even if the run has another reward. Files of other runs are kept. None: a temporary
            folder.
        batch_size: number of responses per training step.
        validation: fraction of the prompts that are held out with all their responses, in [0, 1). If it is not 0 and
            there are two different prompts or more, at least one prompt is held out. With one prompt, none is held out,
            and a warning is issued.

    Raises:
        EditError: the file cannot be read, a record has no prompt, or only some of the records have a response. The
            method ``setup`` also raises this error if a callback monitors ``value/validation_error`` but no prompt is
            held out.

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
            sampling=(sampling, _OPTIONS),
            reward=(reward, Rule("a function reward(prompts, completions)", callable)),
            prompt_format=(prompt_format, PROMPT_FORMAT),
            cache_dir=(cache_dir, optional(PATH)),
            batch_size=(batch_size, integer_from(1)),
            validation=(validation, within("[0, 1)")),
        )
        self.reward = reward
        self.cache_dir = cache_dir
        self.prompt_format: PromptFormat = prompt_format
        self.batch_size = batch_size
        self.validation = validation
        self.sampling: SamplingOptions = (
            from_mapping(SamplingOptions, sampling) if isinstance(sampling, Mapping) else sampling
        )
        with reported_by("ResponseDataModule"):
            self.records: list[dict[str, str]] = read_records(prompts)
        self.shards: StateShards | None = None
        self._remove_temporary: Any = None

    def setup(self, stage: str) -> None:
        """Sample the responses if none are given, write the hidden states, and compute the rewards.

        If ``cache_dir`` contains files for the same model, prompts and options, the responses and hidden states are
        read from these files. Otherwise, every call computes the responses and hidden states again, because the model
        may have changed since the last call.
        """
        if stage not in ("fit", "validate"):
            return
        module = self._find_module()
        with reported_by("ResponseDataModule"):
            check_format(self.prompt_format, module.tokenizer)
            prompts = [record["prompt"] for record in self.records]
            check_reward(self.reward, prompts, [record.get("response", "") for record in self.records])
        callbacks: list[Any] = self.trainer.callbacks if self.trainer is not None else []  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, ControlMetrics):
                callback.check_prompts(self, module)
        self._check_held_out(callbacks)
        with reported_by("ResponseDataModule"):
            if self.trainer is not None:
                module.language_model.to(self.trainer.strategy.root_device)
            self.shards = self._collect(module)
            self.rewards: Tensor = compute_rewards(self.reward, self.shards.prompts, self.shards.texts)
        self.train_indices: list[int]
        self.validation_indices: list[int]
        self.train_indices, self.validation_indices = self._split(self.shards.prompts)
        if stage == "fit":
            module.value.standardize(self.shards[i] for i in self.train_indices)
            described = describe_model(module.language_model)
            module.value.trained_on = {**described, "prompt_format": repr(self.prompt_format)}

    def _find_module(self) -> Any:
        """Check the trained module and the settings of the trainer, and return the module."""
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        if not (hasattr(module, "language_model") and hasattr(module, "value")):
            raise EditError(
                f"the trained module must be a ValueModule, got {type(module).__name__}; pass a ValueModule to "
                "Trainer.fit.",
                "ResponseDataModule",
            )
        if self.trainer is not None and self.trainer.world_size > 1:
            raise EditError(
                f"the number of processes must be 1, got {self.trainer.world_size}; set devices to 1.",
                "ResponseDataModule",
            )
        if self.trainer is not None and self.trainer.precision not in _PRECISIONS:
            raise EditError(
                f"precision of the trainer must be one of {', '.join(_PRECISIONS)}, got {self.trainer.precision}; "
                "use the argument dtype of ValueModule for a language model in half precision.",
                "ResponseDataModule",
            )
        return module

    def _collect(self, module: Any) -> StateShards:
        """Write the hidden states of all responses."""
        model, tokenizer, options = module.language_model, module.tokenizer, self.sampling
        if self.cache_dir is not None:
            check_writable(Path(self.cache_dir) / "states")
        rows, make = self._given(model, tokenizer) if "response" in self.records[0] else self._sampled(model, tokenizer)
        common = [fingerprint(model), repr(self.prompt_format), len(tokenizer)]
        chunks = [(start, rows[start : start + _CHUNK]) for start in range(0, len(rows), _CHUNK)]
        self._remove()
        folder = Path(self.cache_dir) if self.cache_dir is not None else _temporary_folder()
        if self.cache_dir is None:
            # Lightning does not call teardown after an error. The finalizer removes the folder in this case, too.
            self._remove_temporary = weakref.finalize(self, _remove_folder, folder)
        return write_shards(
            model,
            module.value.layers,
            folder,
            [([*common, start, part], partial(make, start, len(part))) for start, part in chunks],
            batch_size=options.batch_size,
            pad_id=pad_token_id(tokenizer),
        )

    def _given(self, model: Any, tokenizer: Any) -> tuple[list[Any], Callable[[int, int], list[Response]]]:
        """Return the given responses as JSON values, and a function that returns :class:`Response` objects.

        The function has the arguments (start, count). It returns ``count`` responses, beginning with index ``start``.
        """
        responses = encode_responses(model, tokenizer, self.records, self.prompt_format)
        return [asdict(response) for response in responses], lambda start, count: responses[start : start + count]

    def _sampled(self, model: Any, tokenizer: Any) -> tuple[list[Any], Callable[[int, int], list[Response]]]:
        """Return the sampling settings of each response as JSON values, and a function that samples responses.

        The function has the arguments (start, count). It samples ``count`` responses, beginning with index ``start``.
        """
        options, inner = self.sampling, unwrap_model(model)
        prompts = [record["prompt"] for record in self.records]
        # The chat template belongs to the tokenizer, not to the model. So the description also contains the tokens.
        ids = encode_prompts(tokenizer, prompts, context_length(inner.config), self.prompt_format)
        ends = sorted(AnswerEnd(inner, tokenizer, (), self.prompt_format).ids)
        settings = {"seed": options.seed, "temperature": options.temperature, "length": options.max_new_tokens}
        pairs = zip(prompts, ids, strict=True)
        rows = [[prompt, sequence, ends, settings] for prompt, sequence in pairs for _ in range(options.samples)]

        def make(start: int, count: int) -> list[Response]:
            texts = [row[0] for row in rows[start : start + count]]
            return sample_responses(model, tokenizer, texts, options, self.prompt_format, first=start)

        return rows, make

    def _check_held_out(self, callbacks: Sequence[Any]) -> None:
        """Raise an error if a callback monitors ``value/validation_error``, but no prompt is held out.

        If there is no error, but ``validation`` is above 0 and all prompts are the same, issue a warning.
        """
        several = len({record["prompt"] for record in self.records}) > 1
        if self.validation and several:
            return
        for callback in callbacks:
            if getattr(callback, "monitor", None) == "value/validation_error":
                raise EditError(
                    f"{type(callback).__name__} monitors value/validation_error, but no prompt is held out; give at "
                    "least two different prompts, and validation > 0.",
                    "ResponseDataModule",
                )
        if self.validation:
            warn(
                "ResponseDataModule: no prompt is held out, because all prompts are the same; give at least two "
                "different prompts, or set validation=0."
            )

    def _split(self, prompts: Sequence[str]) -> tuple[list[int], list[int]]:
        """Return the indices of the training responses and of the validation responses, split by prompt."""
        distinct = list(dict.fromkeys(prompts))
        random.Random(self.sampling.seed).shuffle(distinct)
        # At least one prompt is held out, so that EarlyStopping has a validation error to monitor.
        count = max(round(self.validation * len(distinct)), 1) if self.validation else 0
        held_out = set(distinct[: min(count, len(distinct) - 1)])
        train = [i for i, prompt in enumerate(prompts) if prompt not in held_out]
        return train, [i for i, prompt in enumerate(prompts) if prompt in held_out]

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training batches, in a new order in every epoch."""
        return self._loader(self.train_indices, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the batches of the held-out prompts, or an empty list if no prompt is held out."""
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
        self._remove()

    def _remove(self) -> None:
        if self._remove_temporary is not None:
            self.shards = None
            self._remove_temporary()
            self._remove_temporary = None


def _temporary_folder() -> Path:
    """Create a temporary folder, and remove the temporary folders that killed processes left behind."""
    parent = Path(tempfile.gettempdir())
    remove_abandoned(parent.glob("kedit-value.*"))
    folder = claim(parent, "kedit-value")
    folder.mkdir(mode=0o700)
    return folder


def _remove_folder(folder: Path) -> None:
    remove(folder)
    release(folder)


def pad_states(states: Sequence[Mapping[str, Tensor]], rewards: Tensor) -> dict[str, Any]:
    """Return a batch: ``states`` (layer -> [batch, length, hidden]), ``mask`` [batch, length], ``rewards`` [batch]."""
    lengths = torch.tensor([len(next(iter(one.values()))) for one in states])
    padded = {
        name: torch.nn.utils.rnn.pad_sequence([one[name] for one in states], batch_first=True) for name in states[0]
    }
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    return {"states": padded, "mask": mask, "rewards": rewards}
