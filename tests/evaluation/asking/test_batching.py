"""Helpers of every forward pass of an evaluation."""

from __future__ import annotations

import pytest
import torch

from kedit_train.errors import EditError
from kedit_train.evaluation.asking.batching import (
    DivergedError,
    inference_context,
    split_into_batches,
    unwrap_model,
)
from kedit_train.evaluation.asking.distributed import split_across_processes


def test_items_are_split_into_consecutive_batches():
    assert split_into_batches(range(5), 2) == [range(2), range(2, 4), range(4, 5)]
    assert split_into_batches([], 2) == []
    with pytest.raises(EditError, match="batch_size must be >= 1, got 0"):
        split_into_batches([1], 0)


def test_the_language_model_is_found_inside_a_wrapper(scripted_model):
    model, _ = scripted_model({})
    wrapper = torch.nn.Module()
    wrapper.module = model
    assert unwrap_model(wrapper) is unwrap_model(model) is model
    with pytest.raises(EditError, match="model must be a causal language model, got Linear"):
        unwrap_model(torch.nn.Linear(1, 1))


def test_training_flags_are_restored(scripted_model):
    model, _ = scripted_model({})
    model.train()
    with inference_context(model):
        assert not model.training
        assert not torch.is_grad_enabled()
    assert model.training
    assert torch.is_grad_enabled()


def test_the_error_about_nan_names_the_edit():
    assert str(DivergedError("Q:", "ann")).startswith("edit 'ann': the model gives NaN logits after 'Q:'")


def test_without_a_process_group_all_items_are_processed_here():
    assert split_across_processes(lambda items: [i * 2 for i in items], [1, 2, 3], False) == [2, 4, 6]
    with pytest.raises(EditError, match="distributed=True needs a process group"):
        split_across_processes(list, [1], True)
