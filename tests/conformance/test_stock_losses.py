"""Cross-entropy through the loss head gives the losses and gradient norms of the stock trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.hosts import HOSTS

from kedit_train import world
from kedit_train.callbacks import TokenLoss
from kedit_train.compatibility import TRANSFORMERS_4
from kedit_train.data import EditDataset

# transformers 4 rounds the losses that it logs to four decimals.
ROUNDING = 1.001e-4 if TRANSFORMERS_4 else 1e-6

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "checkpointing": {"activation_checkpointing": True},
    # In bf16, TRL sums exponentials in another order. A rounding difference in the loss can change the rounding of a
    # gradient and so the sign of an Adam step, so steps after the first are compared with a larger tolerance.
    "bf16": {"bf16": True, "learning_rate": 1e-5},
    "bf16, accumulation, checkpointing": {
        "bf16": True,
        "learning_rate": 1e-5,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "activation_checkpointing": True,
    },
}


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["down_proj"], task_type="CAUSAL_LM")


def losses(host: str, callbacks: list[Any], options: dict[str, Any]) -> list[tuple[float, float]]:
    """Return the loss and the gradient norm of every step."""
    torch.manual_seed(0)
    model, tokenizer = world.load()
    edits = EditDataset(world.edits(n=24))
    trainer = HOSTS[host](model, tokenizer, edits, callbacks, 3, **options)
    return [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]


# The default run takes every host once. In one host, it also takes the option that combines all others.
ALONE = {("SFTTrainer", "bf16, accumulation, checkpointing")}


@pytest.mark.parametrize(
    ("host", "option"),
    [
        pytest.param(host, option, marks=() if option == "plain" or (host, option) in ALONE else pytest.mark.slow)
        for host in ("Trainer", "SFTTrainer", "SFTTrainer, LoRA")
        for option in OPTIONS
    ],
)
def test_cross_entropy_through_the_loss_head_is_the_stock_loss(host: str, option: str) -> None:
    host, _, adapter = host.partition(", ")
    options = [OPTIONS[option] | ({"peft_config": lora()} if adapter else {}) for _ in range(2)]
    stock = losses(host, [], options[0])
    ours = losses(host, [TokenLoss()], options[1])
    assert len(stock) == 3
    for (loss, norm), (own_loss, own_norm) in zip(stock, ours, strict=True):
        half = "bf16" in option
        assert own_loss == pytest.approx(loss, rel=5e-3 if half else 1e-6, abs=ROUNDING)
        assert own_norm == pytest.approx(norm, rel=2e-2 if half else 2e-5)
    # The first step starts from the same weights.
    assert ours[0][0] == pytest.approx(stock[0][0], rel=1e-6, abs=ROUNDING)
    # Gradients in bf16 are rounded to a relative precision of 4e-3, in an order that depends on the CPU.
    assert ours[0][1] == pytest.approx(stock[0][1], rel=1e-3 if "bf16" in option else 1e-4)


@pytest.mark.parametrize("host", ["Trainer", "Lightning"])
def test_the_mean_over_samples_does_not_depend_on_accumulation(host: str) -> None:
    edits = EditDataset(world.edits(n=16))
    whole = {"per_device_train_batch_size": 8} if host == "Trainer" else {}
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    pairs = [(whole, {}), (split, {"accumulate_grad_batches": 4})]
    finals = []
    for trainer_options, lightning_options in pairs:
        model, tokenizer = world.load()
        torch.manual_seed(0)
        smoothing = [TokenLoss(reduction="sample")]
        if host == "Trainer":
            HOSTS[host](model, tokenizer, edits, smoothing, 2, lr_scheduler_type="constant", **trainer_options)
        else:
            size = 2 if lightning_options else 8
            HOSTS[host](model, tokenizer, edits, smoothing, 2, batch_size=size, **lightning_options)
        finals.append({name: p.detach().clone() for name, p in model.named_parameters()})
    start = dict(world.load()[0].named_parameters())
    moved = torch.cat([(finals[0][n] - start[n]).flatten() for n in start])
    apart = torch.cat([(finals[0][n] - finals[1][n]).flatten() for n in start])
    assert apart.norm() < 1e-2 * moved.norm()
