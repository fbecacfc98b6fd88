"""No bit outside the mask changes, with any optimizer, in every trainer and on several processes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.masked_runs import EDITS, bits, train
from conformance.hosts import HOSTS
from installed import older
from safetensors.torch import load_file
from torch import nn

from kedit_train import world
from kedit_train.callbacks import GradientMask, MaskScore, ParameterScope, editing
from kedit_train.data import EditDataset
from kedit_train.errors import EditError

DOWN = "model.layers.1.mlp.down_proj.weight"


def transformers_adafactor(parameters: Any) -> Any:
    from transformers import Adafactor

    return Adafactor(parameters, lr=1e-2, relative_step=False, weight_decay=0.1)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "AdamW decay": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3, foreach=True),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.3, amsgrad=True),
    "SGD momentum decay": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True, weight_decay=0.3),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.3),
    "transformers Adafactor": transformers_adafactor,
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, weight_decay=0.3),
    "Muon": lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0.3),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
}
if older("torch", "2.9"):
    # Muon is new in torch 2.9.
    del OPTIMIZERS["Muon"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["element", "row", "column"])
def test_nothing_outside_the_mask_changes(make, words, ids, name, dtype, granularity):
    model = make(dtype=dtype)
    mask = GradientMask("fisher", density=0.2, granularity=granularity, edits=EDITS)
    with editing(model, [ParameterScope(1, modules="mlp.*_proj"), mask], tokenizer=words) as edit:
        with torch.no_grad():
            # Zeros of both signs must not change either.
            edit.parameters()[0].view(-1)[:40] *= -0.0
        edit.run.set_scope(edit.run.scope)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        moved = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in before.items()}

        def check() -> None:
            for n, p in model.named_parameters():
                differs = bits(p) != bits(before[n])
                assert not bool((differs & mask._frozen[n]).any() if n in mask._frozen else differs.any()), n
                moved[n] |= differs

        train(model, edit, OPTIMIZERS[name](edit.parameters()), ids, check)
        assert sum(int(m.sum()) for m in moved.values()) > 50


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_warm_optimizer_changes_nothing_outside_the_mask(make, words, ids, name):
    model = make()
    model.requires_grad_(False)
    model.get_parameter(DOWN).requires_grad_(True)
    optimizer = OPTIMIZERS[name]([model.get_parameter(DOWN)])
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before = model.get_parameter(DOWN).detach().clone()
    changed = before.clone()
    with editing(model, [mask := GradientMask("random", density=0.1)], tokenizer=words) as edit:

        def check() -> None:
            differs = bits(model.get_parameter(DOWN)) != bits(before)
            assert not bool((differs & mask._frozen[DOWN]).any())
            changed.copy_(differs)

        train(model, edit, optimizer, ids, check)
    assert changed.any()


def test_without_restoring_values_a_warm_optimizer_changes_frozen_entries(make, words, ids):
    """Masked gradients alone would not pass the test above."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    before = model.get_parameter(DOWN).detach().clone()
    with editing(model, [mask := GradientMask("random", density=0.1)], tokenizer=words) as edit:
        mask.constrain = lambda weights, reference: weights
        train(model, edit, optimizer, ids, lambda: None, steps=1)
        assert bool(((model.get_parameter(DOWN) != before) & mask._frozen[DOWN]).any())


def test_gradients_outside_the_mask_are_zero_until_the_run_ends(make, words, ids):
    model = make()
    own = copy.deepcopy(model)
    with editing(model, [mask := GradientMask("random", density=0.1), ParameterScope(1)], tokenizer=words) as edit:
        edit.before_step()
        model(input_ids=ids, labels=ids).loss.backward()
        own(input_ids=ids, labels=ids).loss.backward()
        for name, parameter in edit.run.scope.items():
            assert torch.equal(parameter.grad, own.get_parameter(name).grad.masked_fill(mask._frozen[name], 0.0))
            assert parameter.grad.any() or mask._frozen[name].all()
        handles = [p._post_accumulate_grad_hooks for p in edit.parameters()]
        assert all(handles)
    assert not any(handles)
    model.zero_grad()
    own.zero_grad()
    for network in (model, own):
        network(input_ids=ids, labels=ids).loss.backward()
    assert torch.equal(model.get_parameter(DOWN).grad, own.get_parameter(DOWN).grad)


OPTIONS = {
    "Trainer": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "weight_decay": 0.1, "bf16": True},
    "SFTTrainer": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "weight_decay": 0.1, "optim": "adafactor"},
    "Lightning": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "precision": "bf16-true"},
    "loop": {},
    "Fabric": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("host", HOSTS)
def test_nothing_outside_the_mask_changes_in_any_trainer(host):
    model, tokenizer = world.load()
    edits = EditDataset(world.edits(n=8))
    if host == "Lightning":
        model = model.bfloat16()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mask = RememberingMask(MaskScore("gradient", limit=2), density=0.1, edits=edits)
    HOSTS[host](model, tokenizer, edits, [mask, ParameterScope(0.5, modules="mlp")], 2, **OPTIONS[host])
    for name, parameter in model.named_parameters():
        differs = bits(parameter) != bits(before[name])
        assert not bool((differs & mask.remembered[name]).any() if name in mask.remembered else differs.any()), name
        assert bool(differs.any()) == (name in mask.remembered), name


class RememberingMask(GradientMask):
    """A mask that can be read after the run."""

    def finish(self, run: Any) -> None:
        super().finish(run)
        self.remembered = dict(self._frozen)


def test_a_resumed_run_uses_the_mask_of_the_checkpoint(make, words, ids, tmp_path):
    model, path = make(), tmp_path / "mask.safetensors"
    scope = ParameterScope(1, modules="mlp")
    with editing(model, [first := GradientMask(MaskScore("random", seed=1), density=0.1), scope]) as edit:
        edit.before_step()
        state = first.state()
    assert not first.state()["frozen"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with editing(
        model, [second := GradientMask(MaskScore("random", seed=2), density=0.1, save_path=path), scope]
    ) as edit:
        edit.before_step()
        assert not torch.equal(second._frozen[DOWN], state["frozen"][DOWN])
        second.load_state(state)
        train(model, edit, torch.optim.AdamW(edit.parameters(), lr=0.1), ids, lambda: None)
    for name, frozen in state["frozen"].items():
        assert torch.equal(bits(model.get_parameter(name)) != bits(before[name]), ~frozen)
        assert torch.equal(load_file(path)[name], ~frozen)
    with editing(model, [second, ParameterScope(0, modules="mlp")]) as edit:
        edit.before_step()
        with pytest.raises(EditError, match=r"^GradientMask: the mask in the checkpoint belongs to another scope"):
            second.load_state(state)


RANKS = """
import os, sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from kedit_train.callbacks import GradientMask, MaskScore, WeightAnchor, editing
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
torch.manual_seed(0)
model = nn.Linear(16, 8)
with editing(model, [mask := GradientMask(MaskScore("random", seed=dist.get_rank()))]) as edit:
    edit.before_step()
    first = dict(mask._frozen)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 9), nn.Tanh(), nn.Linear(9, 3))
before = {name: p.detach().clone() for name, p in model.named_parameters()}
with editing(model, [mask := GradientMask("magnitude", density=0.3), WeightAnchor(strength=0.5)]) as edit:
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.3)
    for _ in range(3):
        edit.before_step()
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    frozen = {name: mask.full_tensor() for name, mask in mask._frozen.items()}
after = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
torch.save({"first": first, "frozen": frozen, "before": before, "after": after}, sys.argv[3])
dist.barrier()
os._exit(0)
"""


@pytest.mark.slow
def test_all_processes_use_the_mask_of_the_first_and_shards_keep_their_values(tmp_path):
    files = [tmp_path / f"{rank}.pt" for rank in range(2)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", RANKS, str(tmp_path / "meet")]
    ranks = [subprocess.Popen([*command, str(rank), str(file)], env=environment) for rank, file in enumerate(files)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    results = [torch.load(file) for file in files]
    with editing(nn.Linear(16, 8), [mask := GradientMask("random")]) as edit:
        edit.before_step()
        assert all(torch.equal(result["first"][name], f) for result in results for name, f in mask._frozen.items())
    for result in results:
        for name, frozen in result["frozen"].items():
            differs = bits(result["after"][name]) != bits(result["before"][name])
            assert torch.equal(differs, ~frozen), name
