"""Nothing outside of the mask moves by one bit, whatever steps the weights; and the mask is what it says it is."""

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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kedit_train import world
from kedit_train.callbacks import EditMetrics, GradientMask, ParameterScope, TokenSmoothing, editing
from kedit_train.core.mask_file import save_masks
from kedit_train.data import Edit, EditDataset
from kedit_train.errors import EditError

EDITS = [
    Edit("w1 w2 w3", "w4", rephrases=("w20 w21",)),
    Edit("w5 w6", "w7 w8"),
    Edit("w9 w10 w11 w12", "w13"),
]
TEXTS = ["w30 w31 w32 w33", "w40 w41 w42 w43 w44", "w50 w51", "w20 w21 w22"]
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


def masks(model: Any, words: Any, *callbacks: Any, **given: Any) -> dict[str, Tensor]:
    """What may change, by name."""
    with editing(model, [mask := GradientMask(**given), *callbacks], tokenizer=words) as edit:
        edit.before_step()
        kept, total = (sum(int(f(~held)) for held in mask._held.values()) for f in (torch.sum, torch.numel))
        assert mask.metrics(edit.run)["edit/scope/mask_density"] == pytest.approx(kept / total, rel=1e-12)
        return {name: ~held for name, held in mask._held.items()}


@pytest.mark.parametrize("score", ["fisher", "fisher_ratio", "gradient", "magnitude", "random"])
@pytest.mark.parametrize("density", [0.013, 0.05, 0.5, 1.0])
def test_the_density_of_every_tensor_is_exact(make, words, score, density):
    texts = TEXTS[:3] if score == "fisher_ratio" else None
    found = masks(make(), words, ParameterScope(None, "mlp"), score=score, density=density, edits=EDITS, texts=texts)
    assert len(found) == 6
    for name, mask in found.items():
        assert int(mask.sum()) == round(density * mask.numel()), name


@pytest.mark.parametrize("score", ["fisher", "fisher_ratio", "gradient", "random"])
def test_masks_are_seeded_and_leave_the_random_state_alone(make, words, score):
    model, state = make(), torch.get_rng_state()
    given = {"score": score, "edits": EDITS, "texts": TEXTS[:3] if score == "fisher_ratio" else None, "samples": 2}
    first, again, other = (masks(model, words, ParameterScope(1, "mlp"), seed=s, **given) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_gradient_score_is_the_size_of_the_edits_own_gradient(make, words):
    model = make()
    found = masks(model, words, ParameterScope(1, "down_proj"), score="gradient", density=0.1, edits=EDITS)[DOWN]
    total = torch.zeros_like(model.get_parameter(DOWN))
    for edit in EDITS:
        prompt, ids = (words(t)["input_ids"] for t in (edit.prompt, f"{edit.prompt} {edit.target} </s>"))
        labels = torch.tensor([-100] * len(prompt) + ids[len(prompt) :])[None]
        loss = model(input_ids=torch.tensor([ids]), labels=labels).loss * (len(ids) - len(prompt))
        total += torch.autograd.grad(loss, model.get_parameter(DOWN))[0]
    best = total.abs().flatten().topk(51).indices
    assert set(best.tolist()) == set(found.flatten().nonzero().squeeze(-1).tolist())


def test_the_ratio_turns_away_from_what_general_texts_need(make, words):
    model, scope = make(), ParameterScope(None, "embed_tokens")
    given = {"edits": EDITS, "density": 5 / 61, "granularity": "row"}
    # Every token of the first two edits, and none of the third's, so that the rows of those five stand out.
    texts = ["w8 w7 w6 w5 w4 w3 w2 w1 w8 w7 w6 w5 w4 w3 w2 w1"] * 3
    third = torch.tensor([words.convert_tokens_to_ids(f"w{i}") for i in (9, 10, 11, 12, 13)])
    alone = masks(model, words, scope, score="fisher", **given)["model.embed_tokens.weight"][:, 0]
    ratio = masks(model, words, scope, score="fisher_ratio", texts=texts, **given)["model.embed_tokens.weight"][:, 0]
    assert alone.sum() == ratio.sum() == 5
    assert ratio[third].sum() > alone[third].sum()


@pytest.mark.parametrize("granularity", ["row", "column"])
def test_neurons_of_linear_layers_and_of_gpt2s_transposed_ones(make, words, granularity):
    llama = masks(make(), words, ParameterScope(1, "down_proj"), score="fisher", granularity=granularity, density=0.25,
                  edits=EDITS)[DOWN]  # fmt: skip
    rows = llama if granularity == "row" else llama.T
    assert llama.shape == (16, 32)
    assert rows.all(1).sum() == rows.any(1).sum() == len(rows) // 4
    gpt2 = masks(make("gpt2"), words, ParameterScope(1, "mlp.c_fc"), score="random", granularity=granularity,
                 density=0.25)  # fmt: skip
    weight, bias = gpt2["transformer.h.1.mlp.c_fc.weight"], gpt2["transformer.h.1.mlp.c_fc.bias"]
    assert weight.shape == (16, 64)
    rows = weight.T if granularity == "row" else weight
    assert rows.all(1).sum() == rows.any(1).sum() == len(rows) // 4
    assert torch.equal(bias, rows.all(1) if granularity == "row" else torch.zeros(64, dtype=torch.bool))


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


@pytest.mark.parametrize("score", ["fisher", "gradient", "fisher_ratio"])
def test_other_models_have_no_answers_to_score(score):
    texts = TEXTS if score == "fisher_ratio" else None
    with pytest.raises(EditError) as error:
        editing(Forecaster(), [GradientMask(score, texts=texts)]).__enter__()
    assert str(error.value) == (
        f"GradientMask: score='{score}' asks a causal language model for answers, and Forecaster has no "
        "language-model head; use score='magnitude', 'random' or mask="
    )


def test_a_mask_survives_its_file(make, words, tmp_path):
    model, path, scope = make(), tmp_path / "mask.safetensors", ParameterScope(1, "mlp")
    written = masks(model, words, scope, edits=EDITS, save_to=path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mask.safetensors"]
    read = masks(make(), words, scope, mask=path)
    assert written.keys() == read.keys() == load_file(path).keys()
    assert all(torch.equal(written[name], read[name]) for name in written)
    save_file(read, path)
    assert all(torch.equal(read[n], m) for n, m in masks(make(), words, scope, mask=str(path)).items())


def whole(model: Any) -> dict[str, Tensor]:
    return {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if "layers.1.mlp" in n}


SPOILED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "shape": (lambda m: m | {DOWN: m[DOWN].T.contiguous()}, "{path}: " + DOWN + " is [32, 16] there and [16, 32] in"),
    "missing": (lambda m: {n: v for n, v in m.items() if n != DOWN}, "{path}: " + DOWN + " has no mask in it"),
    "unknown": (lambda m: m | {"lm_head.weight": m[DOWN].clone()}, "{path}: lm_head.weight is not in the scope"),
    "numbers": (lambda m: m | {DOWN: m[DOWN].float()}, "{path}: " + DOWN + " holds torch.float32; a mask holds bools"),
    "nothing": (lambda m: {n: ~v for n, v in m.items()}, "the mask holds all 1536 entries of the scope"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_mask_of_something_else_is_refused(make, words, tmp_path, kind):
    spoil, message = SPOILED[kind]
    model, path = make(), tmp_path / "mask.safetensors"
    save_file(spoil(whole(model)), path)
    with pytest.raises(EditError) as error:
        masks(model, words, ParameterScope(1, "mlp"), mask=path)
    assert str(error.value).startswith("GradientMask: " + message.format(path=path))
    assert "\n" not in str(error.value)


def test_a_damaged_file_is_refused_before_training(make, tmp_path):
    model, path = make(), tmp_path / "mask.safetensors"
    save_masks(path, whole(model))
    content = path.read_bytes()
    spoiled = [
        ("is not as it was written", content[:-1] + bytes([1 - content[-1]])),
        ("holds bytes that are neither 0 nor 1", content[:-1] + b"\x07"),
        *(("is no safetensors file, or a damaged one", content[:end]) for end in (0, 7, 90, -5)),
    ]
    for message, data in spoiled:
        path.write_bytes(data)
        with pytest.raises(EditError, match=message) as error:
            editing(model, [GradientMask(mask=path)]).__enter__()
        assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(EditError, match=r"^GradientMask: no mask file '.*'; give the path that save_to= wrote$"):
        editing(model, [GradientMask(mask=path)]).__enter__()


def test_a_file_that_could_not_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = save_masks(tmp_path / "mask.safetensors", {"a": torch.tensor([True, False])})
    content = path.read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        save_masks(path, {"a": torch.tensor([True, True])})
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_only_prompts_and_targets_of_edits_are_read(make, words):
    model, scope = make(), ParameterScope(1, "mlp")
    rich = [Edit("w1 w2 w3", "w4", subject="w40", old_target="w41", aliases=("w42",), rephrases=("w43 w44",))]
    plain = [Edit("w1 w2 w3", "w4")]
    found = [masks(model, words, scope, edits=edits) for edits in (rich, plain)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    with pytest.warns(UserWarning, match="GradientMask: 1 of 4 texts hold a prompt that the edits are scored on"):
        probes_out = masks(model, words, scope, score="fisher_ratio", edits=EDITS, texts=TEXTS)
    clean = masks(model, words, scope, score="fisher_ratio", edits=EDITS, texts=TEXTS[:3])
    assert all(torch.equal(probes_out[name], clean[name]) for name in clean)


def test_the_edits_may_be_those_of_another_callback_in_any_order(make, words):
    model, scope = make(), ParameterScope(1, "mlp")
    metrics = EditMetrics(EDITS, show=False, max_new_tokens=2)
    want = masks(model, words, scope, edits=EDITS)
    for direction in (1, -1):
        found = masks(model, words, *[metrics, scope][::direction])
        assert all(torch.equal(found[name], want[name]) for name in want)
    with (
        editing(model, [GradientMask()], tokenizer=words) as edit,
        pytest.raises(
            EditError, match=r"^GradientMask: score='gradient' needs the edits, and this a plain loop run holds"
        ),
    ):
        edit.before_step()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_adapters_and_scores_that_are_all_zero(make, words, ids):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["down_proj"])
    model = peft.get_peft_model(make(), config)
    # B starts at zero, so nothing reaches A, and no score tells its entries apart.
    with pytest.raises(EditError, match=r"^GradientMask: .*lora_A.*, score='gradient': all scores are 0, which tells"):
        masks(model, words, edits=EDITS)
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


def test_rows_of_stacked_experts_are_refused(words):
    model = nn.Module()
    model.experts = nn.Parameter(torch.randn(2, 3, 4))
    with pytest.raises(EditError, match=r"^experts has shape \[2, 3, 4\], of which no dimension is known to be a row"):
        masks(model, words, score="random", granularity="row")
    assert masks(model, words, score="random", density=0.5)["experts"].sum() == 12


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"score": "size"}, "score='size' is out of bounds"),
        ({"density": 0.0}, "density=0.0 is out of bounds"),
        ({"density": float("nan")}, "density=nan is out of bounds"),
        ({"granularity": "layer"}, "granularity='layer' is out of bounds"),
        ({"samples": 0}, "samples=0 is out of bounds"),
        ({"max_length": 1}, "max_length=1 is out of bounds"),
        ({"score": "fisher_ratio"}, "score='fisher_ratio' needs texts="),
        ({"texts": ["a"]}, "score='gradient' does not read texts="),
        ({"mask": "m.safetensors", "density": 0.1}, "mask= is the mask; leave out"),
        ({"mask": "m.safetensors", "save_to": "x"}, "mask= is the mask; leave out"),
    ],
)
def test_arguments_that_make_no_sense(given, message):
    with pytest.raises(EditError) as error:
        GradientMask(**given)
    assert str(error.value).startswith(f"GradientMask: {message}")


def test_the_same_instance_masks_a_second_model(make, words, ids):
    mask = GradientMask(edits=iter(EDITS))
    for family in ("llama", "gpt2"):
        model = make(family)
        with editing(model, [mask], tokenizer=words) as edit:
            train(model, edit, torch.optim.SGD(edit.parameters(), lr=0.1), ids, lambda: None, steps=1)
            assert mask._held.keys() == edit.run.scope.keys()
