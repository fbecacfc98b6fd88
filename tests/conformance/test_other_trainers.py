"""TRL trainers with their own losses (DPO, KTO, reward): constraints hold; callbacks that need targets are an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.hosts import ARGUMENTS, arguments_of_this_version
from conformance.settings import TEXTS
from installed import older
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from kedit_train import world
from kedit_train.callbacks import (
    EditCallback,
    EditMetrics,
    GradientMask,
    KLLocality,
    NormBall,
    NullSpace,
    ParameterScope,
    TokenSmoothing,
    WeightAnchor,
)
from kedit_train.errors import EditError

# TRL uses a name that transformers will remove.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_.*` is deprecated:FutureWarning")

TRAINERS = ["DPO", "KTO", "Reward"]
STEPS = 3
SCOPE = {f"model.layers.{i}.mlp.down_proj.weight" for i in (2, 3)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint folder, because DPO loads its reference model from the path of the trained model."""
    folder = tmp_path_factory.mktemp("world")
    model, tokenizer = world.load()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trainer(
    kind: str,
    checkpoint: Path,
    folder: Path,
    callbacks: list[Any],
    model: Any = None,
    peft_config: Any = None,
    **arguments: Any,
) -> Any:
    import trl
    from datasets import Dataset

    torch.manual_seed(0)
    edits = world.edits(n=4 * STEPS)
    if kind == "KTO":
        rows = [{"prompt": e.prompt, "completion": f" {e.target}", "label": i % 2 == 0} for i, e in enumerate(edits)]
    else:
        rows = [{"prompt": e.prompt, "chosen": f" {e.target}", "rejected": " nothing"} for e in edits]
    if model is None and kind == "Reward":
        model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=1)
    elif model is None:
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
    arguments = {"output_dir": str(folder), "max_steps": STEPS} | ARGUMENTS | arguments
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        args=getattr(trl, f"{kind}Config")(**arguments_of_this_version(arguments)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        callbacks=callbacks,
        peft_config=peft_config,
    )


class Rows(EditCallback):
    order = 90

    def attach(self, run: Any) -> None:
        self.before: dict[str, Tensor] = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        self.rows: list[dict[str, float]] = []

    def after_step(self, run: Any) -> None:
        self.rows.append(run.collect())


def moved(model: Any, before: dict[str, Tensor]) -> dict[str, int]:
    """Return name -> number of entries whose bits changed."""
    now = {name: p.detach() for name, p in model.named_parameters()}
    changed = {n: int((now[n].view(torch.int32) != before[n].view(torch.int32)).sum()) for n in before}
    return {name: entries for name, entries in changed.items() if entries}


def scope() -> ParameterScope:
    return ParameterScope(layers="2-3", modules="mlp.down_proj")


@pytest.mark.parametrize("kind", TRAINERS)
def test_scope_mask_ball_and_anchor_are_exact(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    rows = Rows()
    constraints = [scope(), GradientMask("magnitude", density=0.25), NormBall(1e-3), WeightAnchor(strength=10.0)]
    used = trainer(kind, checkpoint, tmp_path, [*constraints, rows])
    used.train()
    assert set(moved(used.model, rows.before)) == SCOPE
    for name, entries in moved(used.model, rows.before).items():
        start, now = rows.before[name], used.model.get_parameter(name).detach()
        kept = start.abs().flatten().argsort()[: round(0.75 * start.numel())]
        assert torch.equal(start.flatten()[kept].view(torch.int32), now.flatten()[kept].view(torch.int32))
        assert entries > 0.2 * start.numel()
        assert 5e-4 < float((now.double() - start.double()).abs().max()) <= 1e-3
    assert len(rows.rows) == STEPS
    assert rows.rows[-1]["edit/drift/anchor"] > 0.0
    assert used.state.log_history[0]["edit/scope/mask_density"] == pytest.approx(0.25, abs=1e-4)
    assert all(p.requires_grad for p in used.model.parameters())


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_null_space_holds(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    rows = Rows()
    used = trainer(kind, checkpoint, tmp_path, [scope(), NullSpace(texts=TEXTS), rows])
    used.train()
    assert set(moved(used.model, rows.before)) == SCOPE
    assert rows.rows[-1]["edit/drift/null_space_leak"] < 1e-5
    # The inputs of the first constrained layer do not change, so its outputs must not change either.
    tokens = AutoTokenizer.from_pretrained(checkpoint)(TEXTS[0], return_tensors="pt")
    caught: list[tuple[Tensor, Tensor]] = []
    layer = used.model.model.layers[2].mlp.down_proj
    handle = layer.register_forward_hook(lambda module, args, output: caught.append((args[0], output)))
    with torch.no_grad():
        used.model.eval()(**tokens)
    handle.remove()
    inputs, outputs = caught[0]
    expected = inputs @ rows.before["model.layers.2.mlp.down_proj.weight"].T
    change = (layer.weight - rows.before["model.layers.2.mlp.down_proj.weight"]).norm() * inputs.norm()
    # energy=0.99 leaves at most a tenth of the norm of the inputs.
    assert (outputs - expected).norm() < 0.1 * change


@pytest.mark.parametrize(("kind", "rate", "weight"), [("DPO", 0.03, 20.0), ("KTO", 0.3, 3.0)])
def test_kl_locality_adds_its_penalty_to_any_loss(
    kind: str, rate: float, weight: float, checkpoint: Path, tmp_path: Path
) -> None:
    def run(weight: float) -> list[float]:
        rows = Rows()
        locality = KLLocality(texts=TEXTS, weight=weight, batch_size=len(TEXTS))
        # Plain gradient descent, because the step size of Adam does not depend on the size of the gradient.
        options = {"optim": "sgd", "learning_rate": rate, "max_steps": 6}
        used = trainer(kind, checkpoint, tmp_path, [scope(), locality, rows], **options)
        used.train()
        assert set(moved(used.model, rows.before)) == SCOPE
        return [row["edit/locality/kl"] for row in rows.rows]

    free, held = run(0.0), run(weight)
    assert abs(free[0]) < 1e-6
    assert 0.0 < sum(held[2:]) < 0.8 * sum(free[2:])


class Gradients(EditCallback):
    """Records which parameters have a gradient when the optimizer steps, because clipping includes all of them."""

    def attach(self, run: Any) -> None:
        self.names: set[str] = set()

    def skip_step(self, run: Any) -> bool:
        self.names |= {name for name, p in run.model.named_parameters() if p.grad is not None}
        return False


@pytest.mark.parametrize(
    ("kind", "existing", "checkpointing"),
    [
        pytest.param(
            kind,
            existing,
            checkpointing,
            marks=() if existing != (kind == "KTO") and checkpointing else pytest.mark.slow,
        )
        for kind in ("DPO", "KTO")
        for existing in (True, False)
        for checkpointing in (True, False)
    ],
)
def test_adapters_out_of_scope_stay_frozen(
    kind: str, existing: bool, checkpointing: bool, checkpoint: Path, tmp_path: Path
) -> None:
    # The trainers compute their reference with the adapters switched off or replaced, which makes them trainable.
    from peft import LoraConfig, get_peft_model

    rows, gradients = Rows(), Gradients()
    lora = LoraConfig(
        r=4, target_modules=["down_proj", "q_proj"], task_type="CAUSAL_LM", init_lora_weights=not existing
    )
    options: dict[str, Any] = {"activation_checkpointing": checkpointing}
    if existing:
        options["model"] = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), lora)
    else:
        options["peft_config"] = lora
    used = trainer(kind, checkpoint, tmp_path, [scope(), NormBall(5e-4), rows, gradients], **options)
    factors = {f"base_model.model.model.layers.{i}.mlp.down_proj.lora_{f}.default.weight" for i in (2, 3) for f in "AB"}
    used.train()
    assert gradients.names == factors
    assert set(moved(used.model, rows.before)) == factors
    for name in factors:
        apart = used.model.get_parameter(name).detach().double() - rows.before[name].double()
        assert float(apart.abs().max()) <= 5e-4
    assert all(p.requires_grad for name, p in used.model.named_parameters() if ".default." in name)
    # After training they are trainable again.
    with used.model.disable_adapter():
        used.model(input_ids=torch.arange(4).unsqueeze(0))
    used.model(input_ids=torch.arange(4).unsqueeze(0))
    assert all(p.requires_grad for name, p in used.model.named_parameters() if ".default." in name)


# Arguments of TRL 0.24 also contain the length of completions.
OWN_LOSS = "TokenSmoothing: the loss .* cannot be replaced: " + (
    "this trainer .* computes its own loss"
    if older("trl", "1.0")
    else "with loss_type=.* does not use the loss that the model returns"
)
REFUSALS = {
    (
        "DPO",
        "TokenSmoothing",
    ): OWN_LOSS,
    (
        "KTO",
        "TokenSmoothing",
    ): OWN_LOSS,
    (
        "Reward",
        "TokenSmoothing",
    ): "the model must be a causal language model, got LlamaForSequenceClassification",
    (
        "Reward",
        "KLLocality",
    ): "KLLocality: the model must be a causal language model",
    (
        "Reward",
        "EditMetrics",
    ): "EditMetrics: the model must be a causal language model",
    ("Reward", "GradientMask"): "needs a causal language model, and LlamaForSequenceClassification",
    ("Reward", "WeightAnchor"): "needs a causal language model, and LlamaForSequenceClassification",
}


@pytest.mark.parametrize(("kind", "callback"), REFUSALS)
def test_unsupported_callbacks_are_an_error_before_the_first_step(
    kind: str, callback: str, checkpoint: Path, tmp_path: Path
) -> None:
    used = {
        "TokenSmoothing": lambda: TokenSmoothing(),
        "KLLocality": lambda: KLLocality(texts=TEXTS),
        "EditMetrics": lambda: EditMetrics(world.edits(n=2)),
        "GradientMask": lambda: GradientMask("gradient", edits=world.edits(n=2)),
        "WeightAnchor": lambda: WeightAnchor("ewc", texts=TEXTS),
    }[callback]
    steps: list[int] = []
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        with pytest.raises(EditError, match=REFUSALS[kind, callback]):
            trainer(kind, checkpoint, tmp_path, [scope(), used()]).train()
    finally:
        handle.remove()
    assert not steps
