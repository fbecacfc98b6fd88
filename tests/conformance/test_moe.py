"""Callbacks on tiny mixture-of-experts models: constraints hold exactly, deltas reproduce the weights, runs resume."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conformance.hosts import HOSTS
from conformance.settings import TEXTS, token_inputs
from installed import needs
from moe_models import build

from kedit_train import EditDelta, EditError, world
from kedit_train.callbacks import (
    ActiveSet,
    BatchAnchor,
    GradientMask,
    KLLocality,
    LowCurvature,
    MaskScore,
    NormBall,
    NullSpace,
    OutputAnchor,
    ParameterScope,
    PolyakStep,
    PrefixCache,
    SaveDelta,
    SecondOrderLocality,
    TokenLoss,
    TokenSmoothing,
    WeightAnchor,
    editing,
)
from kedit_train.callbacks.hosts.stacked_experts import check_best_model
from kedit_train.core.scope.scope import resolve_scope
from kedit_train.data import EditDataset

# transformers 4 has other names for experts, and each expert is a module of its own.
pytestmark = needs("transformers", "5.0")
FAMILIES = ["qwen3_moe", pytest.param("mixtral", marks=pytest.mark.slow)]
BOTH = ["qwen3_moe", "mixtral"]
STACKS = [f"model.layers.{i}.mlp.experts.down_proj" for i in (1, 2)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return world.load()[1]


@pytest.fixture
def edits() -> EditDataset:
    return EditDataset(world.edits(n=8))


def scope() -> ParameterScope:
    return ParameterScope("1-2", modules="mlp.down_proj")


def train(family: str, tokenizer: Any, edits: Any, callbacks: list[Any], steps: int = 3, **extra: Any) -> Any:
    """Train a new model in a plain loop, and check that exactly the experts in scope have moved."""
    model = build(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = HOSTS["loop"](model, tokenizer, edits, [scope(), *callbacks], steps, **extra)
    assert [name for name, p in model.named_parameters() if not torch.equal(p, before[name])] == STACKS
    return model, before, run


SETTINGS: dict[str, Any] = {
    "TokenLoss": lambda edits: [TokenLoss("dft", epsilon=0.05)],
    "PolyakStep": lambda edits: [PolyakStep(), TokenSmoothing()],
    "ActiveSet": lambda edits: [ActiveSet(recheck=1), TokenSmoothing()],
    "KLLocality": lambda edits: [KLLocality(texts=TEXTS, batch_size=2)],
    "BatchAnchor": lambda edits: [BatchAnchor(weight=10.0)],
    "OutputAnchor": lambda edits: [OutputAnchor(token_inputs(), distance="kl", output="logits")],
    "WeightAnchor": lambda edits: [WeightAnchor("ewc", strength=100.0, texts=TEXTS)],
    "GradientMask": lambda edits: [GradientMask(MaskScore("gradient", limit=4), density=0.2, edits=edits)],
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_experts_in_scope_move(family, name, tokenizer, edits):
    train(family, tokenizer, edits, SETTINGS[name](edits))


@pytest.mark.parametrize("family", BOTH)
def test_mask_and_balls_hold_exactly(family, tokenizer, edits):
    mask = GradientMask(MaskScore("random"), density=0.3)
    model, before, _ = train(family, tokenizer, edits, [NormBall(1e-3), mask])
    for name in STACKS:
        change = model.get_parameter(name).detach().double() - before[name].double()
        assert 0 < float(change.abs().max()) <= 1e-3
        assert 0 < int((change != 0).sum()) <= 0.3 * change.numel() + 1
    model, before, _ = train(family, tokenizer, edits, [NormBall(1e-2, norm="l2")])
    for name in STACKS:
        # One ball for all experts of a layer.
        assert 0.009 < float((model.get_parameter(name).detach().double() - before[name].double()).norm()) <= 1e-2


def test_rows_of_experts_are_an_error(tokenizer, edits):
    with pytest.raises(EditError, match="must be a matrix or a convolution"):
        train("mixtral", tokenizer, edits, [GradientMask(MaskScore("random"), density=0.3, granularity="row")])


@pytest.mark.parametrize("callback", [NullSpace, LowCurvature, SecondOrderLocality])
def test_callbacks_that_need_layer_inputs_are_an_error(callback, tokenizer, edits):
    with pytest.raises(EditError) as error:
        train("qwen3_moe", tokenizer, edits, [callback(texts=TEXTS), TokenSmoothing()])
    assert str(error.value) == (
        f"{callback.__name__}: the scope must not contain stacked experts, got {STACKS[0]} [4, 16, 16]. Layer "
        "inputs are not measured per expert; use KLLocality instead of this callback, or select other weights, for "
        "example ParameterScope(modules='self_attn.o_proj.weight')."
    )


@pytest.mark.parametrize("family", BOTH)
def test_a_delta_applies_and_reverts_bit_for_bit(family, tokenizer, edits, tmp_path: Path):
    base, path = build(family), tmp_path / "edit.safetensors"
    base.save_pretrained(tmp_path / "base")
    mask = GradientMask(MaskScore("random"), density=0.1)
    edited, before, _ = train(family, tokenizer, edits, [SaveDelta(str(path), edits=edits), mask])
    delta = EditDelta.load(path)
    assert all(torch.equal(p, edited.get_parameter(n)) for n, p in delta.apply(base).named_parameters())
    # The edited model also keeps its bits in the layout of checkpoints, which differs from that of the model.
    base.save_pretrained(tmp_path / "edited")
    again = type(base).from_pretrained(tmp_path / "edited")
    assert all(torch.equal(p, edited.get_parameter(n)) for n, p in again.named_parameters())
    assert all(torch.equal(p, before[n]) for n, p in delta.revert(base).named_parameters())
    with pytest.raises(EditError, match=r"stores .* as one tensor per expert, but the delta has one tensor for all"):
        delta.apply_to_checkpoint(tmp_path / "base", tmp_path / "out")


@pytest.mark.parametrize("family", BOTH)
def test_steps_from_the_cache_equal_steps_without_it(family, tokenizer, edits):
    """Padding goes to experts, too. A batch that fills the cache must equal the same batch from the cache."""
    model = build(family).train()
    rows = edits.encode(tokenizer)
    width = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([row.input_ids + [0] * (width - len(row.input_ids)) for row in rows])
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    assert not mask.all()
    gradients = []
    with editing(model, [scope(), PrefixCache()], tokenizer=tokenizer) as edit:
        edit.before_step()
        for _ in range(3):
            model.zero_grad()
            model(**batch).loss.backward()
            gradients.append([model.get_parameter(name).grad.clone() for name in STACKS])
        assert edit.run.collect()["edit/cache/hit_rate"] == pytest.approx(2 / 3)
    assert all(torch.equal(a, b) for later in gradients[1:] for a, b in zip(gradients[0], later, strict=True))


def test_a_cache_for_a_model_that_returns_router_logits_is_an_error(tokenizer, edits):
    model = build("mixtral")
    model.config.output_router_logits = True
    with pytest.raises(EditError) as error:
        HOSTS["loop"](model, tokenizer, edits, [scope(), PrefixCache()], 1)
    assert str(error.value) == (
        "PrefixCache: no batch can be cached, because the model was called with output_router_logits, which needs "
        "every layer or may change the hidden states; set router_aux_loss_coef=0.0 in SFTConfig, or "
        "model.config.output_router_logits=False, or remove PrefixCache."
    )


def resumable(family: str, tokenizer: Any, edits: Any, folder: Path, host: str, *, resume: bool, **extra: Any) -> Any:
    model = build(family)
    mask = GradientMask(MaskScore("magnitude"), density=0.3)
    callbacks = [scope(), TokenSmoothing(), KLLocality(texts=TEXTS, batch_size=2), NormBall(1e-2), mask]
    callbacks += [WeightAnchor(strength=0.1)]
    if host == "Lightning":
        from lightning.pytorch.callbacks import ModelCheckpoint

        # An epoch has two batches, and Lightning resumes at its end.
        saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
        extra |= {"enable_checkpointing": True} | ({"ckpt_path": str(folder / "step=2.ckpt")} if resume else {})
        callbacks.append(saver)
    else:
        extra |= {"output_dir": str(folder), "save_strategy": "steps", "save_steps": 2}
        extra |= {"resume": str(folder / "checkpoint-2")} if resume else {}
    torch.manual_seed(0)
    HOSTS[host](model, tokenizer, edits, callbacks, 4, **extra)
    return model


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("host", ["Trainer", "Lightning", pytest.param("SFTTrainer", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(family, host, tokenizer, edits, tmp_path: Path):
    """The trainer of transformers loads no stacked experts from its own checkpoints."""
    whole = resumable(family, tokenizer, edits, tmp_path, host, resume=False)
    resumed = resumable(family, tokenizer, edits, tmp_path, host, resume=True)
    assert [n for n, p in whole.named_parameters() if not torch.equal(p, resumed.get_parameter(n))] == []
    assert not torch.equal(whole.get_parameter(STACKS[0]), build(family).get_parameter(STACKS[0]))


def test_the_best_checkpoint_of_the_trainer_is_an_error():
    run = SimpleNamespace(scope=resolve_scope(build("mixtral"), 1, "mlp.down_proj"))
    run.host = SimpleNamespace(args=SimpleNamespace(load_best_model_at_end=True))
    with pytest.raises(EditError, match=r"^ParameterScope: load_best_model_at_end must be False .*SaveDelta\(at="):
        check_best_model(run)
    run.scope = {"w.weight": run.scope[STACKS[0]]}
    check_best_model(run)
