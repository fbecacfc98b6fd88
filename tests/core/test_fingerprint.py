"""A fingerprint changes with everything that a model computes, and with nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kedit_train.core.fingerprint import fingerprint


def test_a_copy_has_the_same_fingerprint(tiny):
    model = tiny("llama")
    assert fingerprint(model) == fingerprint(copy.deepcopy(model))


@pytest.mark.parametrize("what", ["weight", "buffer", "config", "class"])
def test_a_change_of_the_forward_pass_changes_it(tiny, what):
    model = tiny("llama")
    before = fingerprint(model)
    if what == "weight":
        with torch.no_grad():
            model.model.norm.weight[3] += 1e-6
    elif what == "buffer":
        model.model.rotary_emb.inv_freq[1] *= 2
    elif what == "config":
        model.config.rms_norm_eps *= 2
    else:
        model.__class__ = type("Other", (type(model),), {})
    assert fingerprint(model) != before


def test_names_and_token_ids_do_not_change_it(tiny):
    model = tiny("llama")
    before = fingerprint(model)
    model.config._name_or_path, model.config.pad_token_id, model.config.use_cache = "elsewhere", 7, False
    assert fingerprint(model) == before


def test_a_widened_parameter_has_the_fingerprint_of_the_original():
    model = nn.Linear(3, 2).to(torch.bfloat16)
    before = fingerprint(model)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert fingerprint(model.float()) != before
    assert fingerprint(model, dtypes) == before


def test_modules_without_a_configuration_are_hashed():
    torch.manual_seed(0)
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    assert fingerprint(first) != fingerprint(second)
