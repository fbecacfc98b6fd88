"""ContextTeacher finds the edits in the batches of every host, with packing and in chats."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from conformance.hosts import ARGUMENTS, HOSTS

from kedit_train import world
from kedit_train.callbacks import ContextTeacher, ParameterScope, PrefixCache
from kedit_train.core.run import EditRun
from kedit_train.data import EditDataset
from kedit_train.data.tokenization import collate, pad_token_id

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}\n{{ m.content }}{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


class Recorder(ContextTeacher):
    """Keeps which tokens of each micro-batch have the teacher as their target."""

    def attach(self, run: EditRun) -> None:
        super().attach(run)
        self.taught: list[torch.Tensor] = []
        self.find = run.loss_head().soft_targets

    def score(self, logits: torch.Tensor, labels: torch.Tensor, *soft_targets: torch.Tensor) -> tuple[Any, ...]:
        self.taught.append(soft_targets[2])
        return super().score(logits, labels, *soft_targets)

    def count(self) -> int:
        return int(torch.cat(self.taught).sum())


@pytest.fixture
def edits() -> EditDataset:
    return EditDataset(world.edits(n=8))


def expected(recorder: Recorder, edits: EditDataset, **options: Any) -> int:
    """Return the number of taught tokens in one batch of all edits."""
    tokenizer = world.load()[1]
    if "prompt_format" in options:
        tokenizer.chat_template = TEMPLATE
    batch = collate(edits.encode(tokenizer, **options), pad_id=pad_token_id(tokenizer))
    assert recorder.find is not None
    return int(recorder.find(batch)[2].sum())


@pytest.mark.parametrize("host", HOSTS)
def test_every_host_gives_the_targets_of_one_batch(host: str, edits: EditDataset) -> None:
    model, tokenizer = world.load()
    recorder = Recorder(edits, min_followed=0.0)
    HOSTS[host](model, tokenizer, edits, [recorder], 2)
    # Two steps of four edits each are one epoch, shuffled in the trainers.
    assert recorder.count() == expected(recorder, edits) > 0


def test_the_prefix_cache_changes_neither_targets_nor_losses(edits: EditDataset) -> None:
    weights = []
    for more in ([], [PrefixCache()]):
        model, tokenizer = world.load()
        recorder = Recorder(edits, min_followed=0.0)
        scope = ParameterScope(layers=0.5, modules="mlp.down_proj")
        HOSTS["loop"](model, tokenizer, edits, [recorder, scope, *more], 4)
        assert recorder.count() == 2 * expected(recorder, edits) > 0
        weights.append(dict(model.named_parameters()))
    for name, without in weights[0].items():
        torch.testing.assert_close(weights[1][name], without)


def sft(recorder: Recorder, tokenizer: Any, rows: Any, **options: Any) -> None:
    from trl import SFTConfig, SFTTrainer

    arguments = {**ARGUMENTS, "output_dir": tempfile.mkdtemp(), "num_train_epochs": 1, **options}
    SFTTrainer(
        world.load()[0],
        args=SFTConfig(**arguments),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[recorder],
    ).train()


@pytest.mark.filterwarnings("ignore")
def test_sequences_of_a_packed_row_are_found(edits: EditDataset) -> None:
    tokenizer, recorder = world.load()[1], Recorder(edits, min_followed=0.0)
    sft(recorder, tokenizer, edits.to_prompt_completion(), packing=True, max_length=128)
    assert recorder.count() == expected(recorder, edits) > 0


def test_chats_are_found_in_the_format_of_the_dataset(edits: EditDataset) -> None:
    tokenizer, recorder = world.load()[1], Recorder(edits, min_followed=0.0)
    tokenizer.chat_template = TEMPLATE
    sft(recorder, tokenizer, edits.to_prompt_completion(prompt_format="chat"))
    assert recorder.count() == expected(recorder, edits, prompt_format="chat") > 0
