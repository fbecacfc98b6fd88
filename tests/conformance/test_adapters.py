"""PEFT adapters: constraints hold on the LoRA factors, and the base model does not change by a single bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance.hosts import HOSTS
from conformance.settings import TEXTS
from torch import Tensor

from kedit_train import world
from kedit_train.callbacks import (
    EditCallback,
    GradientMask,
    KLLocality,
    LowCurvature,
    NormBall,
    NullSpace,
    ParameterScope,
    TokenSmoothing,
    WeightAnchor,
)
from kedit_train.data import EditDataset
from kedit_train.errors import EditError

# SFTTrainer adds the adapters itself. For all other trainers, the user adds them. The default run takes both ways in
# one test.
SLOW = [pytest.param(host, marks=pytest.mark.slow) for host in ("Trainer", "Lightning")]
TRAINERS = ["SFTTrainer", *SLOW]
STEPS = 3


class Watch(EditCallback):
    """Records the parameters before and after training, and the metrics of every step."""

    order = 90

    def attach(self, run: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        self.trainable: dict[str, bool] = {}
        self.answers = answers(run.model)
        self.rows: list[dict[str, float]] = []

    def after_step(self, run: Any) -> None:
        self.rows.append(run.collect())

    def finish(self, run: Any) -> None:
        self.trainable = {name: p.requires_grad for name, p in run.model.named_parameters()}
        self.reference = dict(run.reference)
        self.after = {name: p.detach().clone() for name, p in run.model.named_parameters()}

    def moved(self) -> dict[str, int]:
        """Return name -> number of entries whose bits changed."""
        pairs = {n: (self.before[n].view(torch.int32), self.after[n].view(torch.int32)) for n in self.before}
        return {name: int((a != b).sum()) for name, (a, b) in pairs.items() if not torch.equal(a, b)}


@torch.no_grad()
def answers(model: Any) -> Tensor:
    training = model.training
    model.eval()
    found = model(input_ids=torch.arange(3, 15).unsqueeze(0)).logits
    model.train(training)
    return found


def configuration(**options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "target_modules": ["down_proj", "q_proj"], "task_type": "CAUSAL_LM"} | options)


def train(host: str, callbacks: list[Any], **options: Any) -> tuple[Any, Watch]:
    from peft import get_peft_model

    torch.manual_seed(0)
    model, tokenizer = world.load()
    edits, watch = EditDataset(world.edits(n=4 * STEPS)), Watch()
    if host == "SFTTrainer":
        # The trainer adds the adapters itself.
        trainer = HOSTS[host](model, tokenizer, edits, [watch, *callbacks], STEPS, peft_config=configuration(**options))
        return trainer.model, watch
    adapted = get_peft_model(model, configuration(**options))
    HOSTS[host](adapted, tokenizer, edits, [watch, *callbacks], STEPS)
    return adapted, watch


def scope(modules: str = "mlp.down_proj") -> ParameterScope:
    return ParameterScope(layers="2-3", modules=modules)


def adapters(watch: Watch, *kinds: str) -> set[str]:
    return {
        name
        for name in watch.before
        if any(f"layers.{i}.mlp.down_proj.{kind}." in name for i in (2, 3) for kind in kinds)
    }


@pytest.mark.parametrize("host", ["SFTTrainer", SLOW[0], "Lightning"])
def test_a_pattern_for_the_base_model_selects_the_lora_factors(host: str) -> None:
    model, watch = train(host, [scope()])
    assert set(watch.moved()) == adapters(watch, "lora_A", "lora_B")
    assert {name for name, trainable in watch.trainable.items() if trainable} == adapters(watch, "lora_A", "lora_B")
    # After the edit, requires_grad is restored: every adapter is trainable again, the base model is not.
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name in watch.before if ".lora_" in name
    }
    base = dict(world.load()[0].named_parameters())
    for name, parameter in model.get_base_model().named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter.view(torch.int32), base[name.replace(".base_layer", "")].view(torch.int32))


@pytest.mark.parametrize("host", TRAINERS)
def test_a_pattern_for_one_factor_selects_only_that_factor(host: str) -> None:
    _, watch = train(host, [scope("down_proj.lora_B")])
    assert set(watch.moved()) == adapters(watch, "lora_B")


@pytest.mark.parametrize(
    ("modules", "why"),
    [
        ("mlp.down_proj.weight", "matches no parameter"),
        ("mlp.down_proj.base_layer", "only frozen parameters; unfreeze them"),
        ("mlp.up_proj", "In a model with PEFT adapters, select modules that have an adapter"),
    ],
)
def test_a_pattern_that_selects_no_factor_is_an_error(modules: str, why: str) -> None:
    with pytest.raises(EditError, match=why):
        train("Trainer", [scope(modules)])


@pytest.mark.parametrize("host", TRAINERS)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_kl_locality_with_fresh_adapters_refers_to_the_base_model(host: str, dora: bool) -> None:
    model, watch = train(
        host, [scope(), TokenSmoothing(), KLLocality(texts=TEXTS, batch_size=2, weight=10.0)], use_dora=dora
    )
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    with model.disable_adapter():
        off = answers(model)
    base = answers(world.load()[0])
    assert torch.equal(off, base)
    # Fresh adapters do not change the output. DoRA divides by a norm and multiplies by it again, which rounds.
    assert (watch.answers - base).abs().max() < (1e-4 if dora else 1e-30)
    divergence = [row["edit/locality/kl"] for row in watch.rows]
    assert abs(divergence[0]) < 1e-6
    assert divergence[-1] > 1e-10
    assert all("edit/tokens/active" in row for row in watch.rows)
    kinds = ("lora_A", "lora_B", "lora_magnitude_vector") if dora else ("lora_A", "lora_B")
    assert set(watch.moved()) == adapters(watch, *kinds)
    assert trainable == {name for name in watch.before if ".lora_" in name}


def test_the_reference_includes_an_adapter_that_was_trained_before() -> None:
    from peft import get_peft_model

    torch.manual_seed(0)
    model, tokenizer = world.load()
    adapted = get_peft_model(model, configuration(init_lora_weights=False))
    expected, watch = answers(adapted), Watch()
    locality = KLLocality(texts=TEXTS, batch_size=2)
    HOSTS["Trainer"](adapted, tokenizer, EditDataset(world.edits(n=4)), [scope(), locality, watch], 1)
    assert torch.equal(watch.answers, expected)
    assert not torch.allclose(expected, answers(world.load()[0]), atol=1e-3)
    # The first divergence is measured before the first step. If it were measured from the base model, it would be
    # large.
    assert abs(watch.rows[0]["edit/locality/kl"]) < 1e-6


CONSTRAINTS: dict[str, Callable[[], list[Any]]] = {
    "ball": lambda: [NormBall(5e-4)],
    "ball, l2": lambda: [NormBall(1e-2, norm="l2", per="scope")],
    "mask": lambda: [GradientMask("random", density=0.25)],
    "ball and mask": lambda: [NormBall(5e-4), GradientMask("random", density=0.25)],
    "anchor": lambda: [WeightAnchor(strength=10.0)],
}


@pytest.mark.parametrize("host", TRAINERS)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_balls_and_masks_apply_to_the_factors_not_to_the_merged_change(constraint: str, host: str) -> None:
    _, watch = train(host, [scope(), *CONSTRAINTS[constraint]()])
    names = adapters(watch, "lora_A", "lora_B")
    assert set(watch.moved()) == names
    apart = {name: (watch.after[name].double() - watch.before[name].double()) for name in names}
    if "l2" in constraint:
        assert 5e-3 < float(torch.stack([d.square().sum() for d in apart.values()]).sum() ** 0.5) <= 1e-2
    elif "ball" in constraint:
        assert 4e-4 < max(float(d.abs().max()) for d in apart.values()) <= 5e-4
    if "mask" in constraint:
        for name, entries in watch.moved().items():
            assert entries <= round(0.25 * apart[name].numel())
    if constraint == "anchor":
        free = train(host, [scope()])[1]
        assert sum(d.square().sum() for d in apart.values()) < sum(
            (free.after[n].double() - free.before[n].double()).square().sum() for n in names
        )
    if constraint == "ball":
        # B starts at zero, so the merged change is alpha/r (B A), whose size is not bounded by the radius.
        for name in adapters(watch, "lora_B"):
            merged = 2 * watch.after[name] @ watch.after[name.replace("lora_B", "lora_A")]
            assert float(merged.abs().max()) != pytest.approx(5e-4, rel=0.05)


def test_scores_that_are_zero_for_fresh_factors_are_an_error() -> None:
    edits = EditDataset(world.edits(n=4))
    # B is zero, and so is the gradient of A.
    for mask, factor in ((GradientMask("magnitude"), "lora_B"), (GradientMask("gradient", edits=edits), "lora_A")):
        with pytest.raises(EditError, match=rf"{factor}.*all scores are 0.*choose another score"):
            train("Trainer", [scope(), mask])
        train("Trainer", [scope(f"down_proj.{'lora_A' if factor == 'lora_B' else 'lora_B'}"), mask])


@pytest.mark.parametrize("host", TRAINERS)
def test_the_null_space_holds_for_the_merged_change_of_lora(host: str) -> None:
    _, watch = train(host, [scope(), NullSpace(texts=TEXTS)])
    assert set(watch.moved()) == adapters(watch, "lora_A", "lora_B")
    assert watch.rows[-1]["edit/drift/null_space_leak"] < 1e-5
    # The merged change maps the inputs of the base model to zero.
    tokenizer = world.load()[1]
    base = world.load()[0]
    caught: list[Tensor] = []
    handle = base.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    with torch.no_grad():
        for text in TEXTS:
            base(**tokenizer(text, return_tensors="pt"))
    handle.remove()
    inputs = torch.cat([c.flatten(0, 1) for c in caught]).double()
    prefix = next(n for n in adapters(watch, "lora_A") if "layers.2." in n)
    a, b = watch.after[prefix].double(), watch.after[prefix.replace("lora_A", "lora_B")].double()
    values, vectors = torch.linalg.eigh(inputs.T @ inputs)
    # The fewest directions with 90 % of the energy.
    rank = int((values.flip(0).cumsum(0) < 0.9 * values.sum()).sum()) + 1
    directions = vectors[:, -rank:]
    change = b @ a
    assert change.norm() > 0
    assert (change @ directions).norm() < 1e-4 * change.norm()


@pytest.mark.parametrize(
    ("constraint", "options", "why"),
    [
        (lambda: NullSpace(texts=TEXTS), {"use_dora": True}, "NullSpace"),
        (lambda: LowCurvature(texts=TEXTS), {}, "must not contain LoRA factors"),
    ],
)
def test_unsupported_adapters_are_an_error(constraint: Any, options: Any, why: str) -> None:
    with pytest.raises(EditError, match=why):
        train("Trainer", [scope(), constraint()], **options)
    if options:
        # The norm in DoRA changes with the weights, whatever the scope contains.
        with pytest.raises(EditError, match="DoRA"):
            train("Trainer", [scope("down_proj.lora_A"), constraint()], **options)


class Packed(torch.nn.Linear):
    """Stands for a quantized layer: integer weights without gradient."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.scale = float(layer.weight.detach().abs().max()) / 127
        packed = (layer.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return torch.nn.functional.linear(input, self.weight.to(input.dtype) * self.scale)


def packed(kind: str) -> tuple[Any, Any]:
    model, tokenizer = world.load()
    for layer in model.model.layers:
        setattr(layer.mlp, kind, Packed(getattr(layer.mlp, kind)))
    return model, tokenizer


def test_a_quantized_weight_in_the_scope_is_an_error() -> None:
    model, tokenizer = packed("down_proj")
    with pytest.raises(EditError, match=r"quantized weights \(int8\), .* adapter"):
        HOSTS["Trainer"](model, tokenizer, EditDataset(world.edits(n=4)), [scope()], 1)
    assert all(p.requires_grad == p.dtype.is_floating_point for p in model.parameters())


def test_a_model_with_quantized_weights_outside_of_the_scope_can_be_edited() -> None:
    model, tokenizer = packed("up_proj")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    used = [scope(), KLLocality(texts=TEXTS, batch_size=2), NormBall(5e-4), NullSpace(texts=TEXTS, energy=0.5)]
    HOSTS["Trainer"](model, tokenizer, EditDataset(world.edits(n=8)), used, 2)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in (2, 3)}
