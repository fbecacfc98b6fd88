"""Nothing outside of the mask moves by one bit, whatever steps the weights, in every loop, on several processes."""

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
from conformance.hosts import HOSTS
from safetensors.torch import load_file
from torch import Tensor, nn

from kedit_train import world
from kedit_train.callbacks import GradientMask, ParameterScope, TokenSmoothing, editing
from kedit_train.data import Edit, EditDataset
from kedit_train.errors import EditError

EDITS = [
    Edit("w1 w2 w3", "w4", rephrases=("w20 w21",)),
    Edit("w5 w6", "w7 w8"),
    Edit("w9 w10 w11 w12", "w13"),
]

DOWN = "model.layers.1.mlp.down_proj.weight"

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The numbers' own bits: 0.0 and -0.0 differ, NaN equals itself."""
    return tensor.detach().view(INTEGERS[tensor.element_size()])


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


def train(model: Any, edit: Any, optimizer: Any, ids: Tensor, check: Callable[[], None], steps: int = 4) -> None:
    for _ in range(steps):
        edit.before_step()
        for row in ids:
            (model(input_ids=row[None], labels=row[None]).loss / len(ids)).backward()
        optimizer.step()
        check()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["element", "row", "column"])
def test_nothing_outside_of_the_mask_moves(make, words, ids, name, dtype, granularity):
    model = make(dtype=dtype)
    mask = GradientMask("fisher", 0.2, granularity, edits=EDITS)
    with editing(model, [ParameterScope(1, "mlp.*_proj"), mask], tokenizer=words) as edit:
        with torch.no_grad():
            # Zeros of both signs are among what must not change.
            edit.parameters()[0].view(-1)[:40] *= -0.0
        edit.run.set_scope(edit.run.scope)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        moved = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in before.items()}

        def check() -> None:
            for n, p in model.named_parameters():
                differs = bits(p) != bits(before[n])
                assert not bool((differs & mask._held[n]).any() if n in mask._held else differs.any()), n
                moved[n] |= differs

        train(model, edit, OPTIMIZERS[name](edit.parameters()), ids, check)
        assert sum(int(m.sum()) for m in moved.values()) > 50


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_warm_optimizer_moves_nothing_outside_of_the_mask(make, words, ids, name):
    model = make()
    model.requires_grad_(False)
    model.get_parameter(DOWN).requires_grad_(True)
    optimizer = OPTIMIZERS[name]([model.get_parameter(DOWN)])
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before = model.get_parameter(DOWN).detach().clone()
    free = before.clone()
    with editing(model, [mask := GradientMask("random", 0.1)], tokenizer=words) as edit:

        def check() -> None:
            differs = bits(model.get_parameter(DOWN)) != bits(before)
            assert not bool((differs & mask._held[DOWN]).any())
            free.copy_(differs)

        train(model, edit, optimizer, ids, check)
    assert free.any()


def test_without_writing_back_a_warm_optimizer_would_move_them(make, words, ids):
    """What the test above would see if masking gradients were enough."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    before = model.get_parameter(DOWN).detach().clone()
    with editing(model, [mask := GradientMask("random", 0.1)], tokenizer=words) as edit:
        mask.constrain = lambda weights, reference: weights
        train(model, edit, optimizer, ids, lambda: None, steps=1)
        assert bool(((model.get_parameter(DOWN) != before) & mask._held[DOWN]).any())


def test_gradients_outside_of_the_mask_are_zero_when_clipping_sees_them_and_the_hooks_go(make, words, ids):
    model = make()
    own = copy.deepcopy(model)
    with editing(model, [mask := GradientMask("random", 0.1), ParameterScope(1)], tokenizer=words) as edit:
        edit.before_step()
        model(input_ids=ids, labels=ids).loss.backward()
        own(input_ids=ids, labels=ids).loss.backward()
        for name, parameter in edit.run.scope.items():
            assert torch.equal(parameter.grad, own.get_parameter(name).grad.masked_fill(mask._held[name], 0.0))
            assert parameter.grad.any() or mask._held[name].all()
        handles = [p._post_accumulate_grad_hooks for p in edit.parameters()]
        assert all(handles)
    assert not any(handles)
    model.zero_grad()
    own.zero_grad()
    for one in (model, own):
        one(input_ids=ids, labels=ids).loss.backward()
    assert torch.equal(model.get_parameter(DOWN).grad, own.get_parameter(DOWN).grad)


HARD = {
    "Trainer": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "weight_decay": 0.1, "bf16": True},
    "SFTTrainer": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "weight_decay": 0.1, "optim": "adafactor"},
    "Lightning": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "precision": "bf16-true"},
    "loop": {},
    "Fabric": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("host", HOSTS)
def test_nothing_outside_of_the_mask_moves_in_any_host(host):
    model, tokenizer = world.load()
    edits = EditDataset(world.edits(n=8))
    if host == "Lightning":
        model = model.bfloat16()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mask = Kept(density=0.1, edits=edits, samples=2)
    HOSTS[host](model, tokenizer, edits, [mask, ParameterScope(0.5, "mlp")], 2, **HARD[host])
    for name, parameter in model.named_parameters():
        differs = bits(parameter) != bits(before[name])
        assert not bool((differs & mask.kept[name]).any() if name in mask.kept else differs.any()), name
        assert bool(differs.any()) == (name in mask.kept), name


class Kept(GradientMask):
    """Remembers its mask when the run is over."""

    def finish(self, run: Any) -> None:
        super().finish(run)
        self.kept = dict(self._held)


def test_a_resumed_run_goes_on_with_the_mask_that_it_began_with(make, words, ids, tmp_path):
    model, path = make(), tmp_path / "mask.safetensors"
    scope = ParameterScope(1, "mlp")
    with editing(model, [first := GradientMask("random", 0.1, seed=1), scope]) as edit:
        edit.before_step()
        state = first.state()
    assert not first.state()["held"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with editing(model, [second := GradientMask("random", 0.1, seed=2, save_to=path), scope]) as edit:
        edit.before_step()
        assert not torch.equal(second._held[DOWN], state["held"][DOWN])
        second.load_state(state)
        train(model, edit, torch.optim.AdamW(edit.parameters(), lr=0.1), ids, lambda: None)
    for name, held in state["held"].items():
        assert torch.equal(bits(model.get_parameter(name)) != bits(before[name]), ~held)
        assert torch.equal(load_file(path)[name], ~held)
    with editing(model, [second, ParameterScope(0, "mlp")]) as edit:
        edit.before_step()
        with pytest.raises(EditError, match=r"^GradientMask: the checkpoint's mask is of another scope; resume"):
            second.load_state(state)


RANKS = """
import os, sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from kedit_train.callbacks import GradientMask, WeightAnchor, editing
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
model = nn.Linear(16, 8)
with editing(model, [mask := GradientMask("random", 0.3, seed=dist.get_rank())]) as edit:
    edit.before_step()
    first = dict(mask._held)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 9), nn.Tanh(), nn.Linear(9, 3))
before = {name: p.detach().clone() for name, p in model.named_parameters()}
with editing(model, [mask := GradientMask("magnitude", 0.3), WeightAnchor(strength=0.5)]) as edit:
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.3)
    for _ in range(3):
        edit.before_step()
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    held = {name: mask.full_tensor() for name, mask in mask._held.items()}
after = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
torch.save({"first": first, "held": held, "before": before, "after": after}, sys.argv[3])
dist.barrier()
os._exit(0)
"""


def test_all_processes_use_the_first_ones_mask_and_shards_hold_still(tmp_path):
    files = [tmp_path / f"{rank}.pt" for rank in range(2)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", RANKS, str(tmp_path / "meet")]
    ranks = [subprocess.Popen([*command, str(rank), str(file)], env=environment) for rank, file in enumerate(files)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    found = [torch.load(file) for file in files]
    with editing(nn.Linear(16, 8), [mask := GradientMask("random", 0.3, seed=0)]) as edit:
        edit.before_step()
        assert all(torch.equal(one["first"][name], held) for one in found for name, held in mask._held.items())
    for one in found:
        for name, held in one["held"].items():
            differs = bits(one["after"][name]) != bits(one["before"][name])
            assert torch.equal(differs, ~held), name


class Forecaster(nn.Module):
    """No language model: a recurrent net, a convolution, a norm and a linear layer over a series."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.conv = nn.GRU(2, 4, batch_first=True), nn.Conv1d(4, 6, 3)
        self.up, self.norm, self.out = nn.ConvTranspose1d(6, 5, 2), nn.LayerNorm(4), nn.Linear(5, 1)

    def forward(self, series: Tensor) -> Tensor:
        return self.out(self.up(self.conv(self.norm(self.rnn(series)[0]).mT)).mT)


@pytest.mark.parametrize("score", ["magnitude", "random"])
@pytest.mark.parametrize("granularity", ["element", "row", "column"])
def test_other_models_can_be_masked_by_size_at_random_or_by_a_file(tmp_path, score, granularity):
    model, series = Forecaster(), torch.randn(3, 10, 2)
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    before = copy.deepcopy(model)
    path = tmp_path / "masks" / "mask.safetensors"
    for mask in (GradientMask(score, 0.5, granularity, save_to=path), GradientMask(mask=path)):
        with editing(model, [mask]) as edit:
            optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-2, weight_decay=0.1)
            for _ in range(2):
                edit.before_step()
                model(series).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        chosen = load_file(path)
        for name, parameter in model.named_parameters():
            assert not bool(((bits(parameter) != bits(before.get_parameter(name))) & ~chosen[name]).any())
    assert not torch.equal(model.rnn.weight_ih_l0, before.rnn.weight_ih_l0)
    if granularity == "row":
        assert torch.equal(chosen["rnn.bias_hh_l0"], chosen["rnn.weight_hh_l0"][:, 0])
        assert torch.equal(chosen["up.bias"], chosen["up.weight"][0, :, 0])
        assert torch.equal(chosen["conv.bias"], chosen["conv.weight"][:, 0, 0])
    if granularity == "column":
        assert not chosen["conv.bias"].any()
        assert chosen["up.weight"].flatten(1).all(1).sum() == 3


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_adapters_and_scores_that_are_all_zero(make, words, ids):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["down_proj"])
    model = peft.get_peft_model(make(), config)
    # B starts at zero, so nothing reaches A, and no score tells its entries apart.
    with (
        pytest.raises(EditError, match=r"^GradientMask: .*lora_A.*, score='gradient': all scores are 0, which tells"),
        editing(model, [GradientMask(edits=EDITS)], tokenizer=words) as edit,
    ):
        edit.before_step()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with editing(model, [mask := GradientMask("random", 0.3), TokenSmoothing()], tokenizer=words) as edit:
        train(model, edit, torch.optim.AdamW(edit.parameters(), lr=0.1, weight_decay=0.1), ids, lambda: None)
        for name, parameter in model.named_parameters():
            differs = bits(parameter) != bits(before[name])
            assert not bool((differs & mask._held[name]).any() if name in mask._held else differs.any())
            assert ("lora_" in name) == bool(differs.any())


def test_tied_embeddings_are_masked_once(make, words, ids):
    model = make(tie_word_embeddings=True)
    before = copy.deepcopy(model)
    with editing(model, [mask := GradientMask("fisher", 0.1, "row", edits=EDITS)], tokenizer=words) as edit:
        assert "lm_head.weight" not in edit.run.scope
        train(model, edit, torch.optim.AdamW(edit.parameters(), lr=0.1), ids, lambda: None)
        differs = bits(model.lm_head.weight) != bits(before.lm_head.weight)
        assert not bool((differs & mask._held["model.embed_tokens.weight"]).any())
        assert differs.any()


def test_the_same_instance_masks_a_second_model(make, words, ids):
    mask = GradientMask(edits=iter(EDITS))
    for family in ("llama", "gpt2"):
        model = make(family)
        with editing(model, [mask], tokenizer=words) as edit:
            train(model, edit, torch.optim.SGD(edit.parameters(), lr=0.1), ids, lambda: None, steps=1)
            assert mask._held.keys() == edit.run.scope.keys()
