"""EditCollator: encoded edits become padded batches, in a DataLoader and in a transformers.Trainer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from kedit_train import EditCollator, EditDataset, world
from kedit_train.data.tokenization import Encoded, collate
from kedit_train.errors import EditError

EXAMPLES = [Encoded([5, 6, 7, 8], 2), Encoded([9, 1], 1)]


def tokenizer(pad: int | None, eos: int | None) -> Any:
    return SimpleNamespace(pad_token_id=pad, eos_token_id=eos)


def test_short_examples_are_padded_and_only_targets_are_labelled():
    batch = EditCollator(tokenizer(0, 1))(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8], [-100, 1, -100, -100]]
    assert all(values.dtype == torch.int64 for values in batch.values())


def test_padding_on_the_left_moves_short_examples_to_the_right():
    batch = EditCollator(tokenizer(0, 1), padding_side="left")(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [0, 0, 9, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8], [-100, -100, -100, 1]]


def test_end_of_text_pads_where_the_tokenizer_has_no_padding_token():
    batch = EditCollator(tokenizer(None, 1))(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 1, 1, 1]]
    # The end-of-text token that belongs to the target stays labelled; the padding does not become a label.
    assert batch["labels"].tolist() == [[-100, -100, 7, 8], [-100, 1, -100, -100]]


def test_what_cannot_be_collated_is_refused():
    with pytest.raises(EditError, match="neither a padding nor an end-of-text token"):
        EditCollator(tokenizer(None, None))
    with pytest.raises(EditError, match=r"^EditCollator: padding_side must be .*, got 'top'"):
        EditCollator(tokenizer(0, 1), padding_side="top")  # type: ignore[arg-type]


def test_a_data_loader_uses_it():
    _, words = world.load()
    examples: Any = EditDataset.load("world", limit=3).encode(words)
    (batch,) = DataLoader(examples, batch_size=3, collate_fn=EditCollator(words))
    expected = collate(examples, pad_id=words.pad_token_id)
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_a_transformers_trainer_uses_it(tmp_path):
    model, words = world.load()
    examples: Any = EditDataset.load("world", limit=3).encode(words)
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = Trainer(model, arguments, train_dataset=examples, data_collator=EditCollator(words))
    assert trainer.train().global_step == 1
