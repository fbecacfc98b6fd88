"""The hash of model inputs, by which a resumed run recognizes that its inputs are the same."""

from __future__ import annotations

import numpy as np
import torch

from kedit_train.core.locality.model_inputs import hash_model_inputs


def test_one_changed_number_changes_the_hash_of_a_tensor_and_of_an_array():
    for make in (torch.tensor, np.array):
        numbers = [0.0] * 5000
        before = hash_model_inputs([{"windows": make(numbers)}])
        assert before == hash_model_inputs([{"windows": make(numbers)}])
        numbers[2500] = 1.0
        assert before != hash_model_inputs([{"windows": make(numbers)}])


def test_names_order_and_plain_values_count():
    window = torch.ones(3)
    hashes = [
        hash_model_inputs(items)
        for items in ([window], [{"a": window}], [{"b": window}], [(window, True)], [(window, False)], [window, window])
    ]
    assert len(set(hashes)) == len(hashes)
