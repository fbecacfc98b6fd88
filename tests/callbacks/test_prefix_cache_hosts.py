"""PrefixCache in the trainers: with the same batches in every epoch, only the time differs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.hosts import HOSTS, collator
from transformers import TrainerCallback

from kedit_train import world
from kedit_train.callbacks import ParameterScope, PrefixCache, TokenSmoothing
from kedit_train.data import EditDataset
from kedit_train.errors import EditError

LAYER = 3
IN_ORDER = {"train_sampling_strategy": "sequential"}


def watch(model: Any) -> list[float]:
    """Return a list that collects the unrounded losses of the training forward passes."""
    losses: list[float] = []

    def read(module: Any, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            losses.append(float((-output.log_probs.sum() if output.loss is None else output.loss).detach()))

    model.register_forward_hook(read)
    return losses


def run(host: str, *callbacks: Any, steps: int = 9, head: bool = True, **options: Any) -> dict[str, Any]:
    """Train 12 edits in batches of 4 for three epochs."""
    torch.manual_seed(0)
    model, tokenizer = world.load()
    losses = watch(model)
    made = [ParameterScope(layers=LAYER, modules="mlp.down_proj"), *callbacks, *([TokenSmoothing()] if head else [])]
    loop = HOSTS[host](model, tokenizer, EditDataset(world.edits(n=12)), made, steps, **options)
    weight = model.get_parameter(f"model.layers.{LAYER}.mlp.down_proj.weight").detach()
    rows = getattr(loop.state, "log_history", [])
    rates = [row["edit/cache/hit_rate"] for row in rows if "edit/cache/hit_rate" in row]
    return {"losses": losses, "weight": weight, "rates": rates}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a["losses"] == b["losses"] and torch.equal(a["weight"].view(torch.int32), b["weight"].view(torch.int32))


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("host", ["Trainer", "SFTTrainer", "Lightning"])
def test_the_same_batches_in_every_epoch_give_the_same_bits(host: str, head: bool) -> None:
    options = {} if host == "Lightning" else IN_ORDER
    plain, cached = (run(host, *more, head=head, **options) for more in ([], [PrefixCache()]))
    assert same(plain, cached)
    assert len(plain["losses"]) >= 9
    assert len(set(plain["losses"])) == len(plain["losses"])
    if host != "Lightning":
        assert cached["rates"] == [0.0] * 3 + [1.0] * 6


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        pytest.param({"gradient_checkpointing": False}, marks=pytest.mark.slow),
        pytest.param({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, marks=pytest.mark.slow),
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ],
    ids=["bf16 autocast", "no checkpointing", "reentrant checkpointing", "accumulation"],
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_kwargs` is deprecated:FutureWarning")
def test_common_settings_of_sft_trainer_give_the_same_bits(options: dict[str, Any]) -> None:
    plain, cached = (run("SFTTrainer", *more, **IN_ORDER, **options) for more in ([], [PrefixCache()]))
    assert same(plain, cached)
    assert cached["rates"] == [0.0] * 3 + [1.0] * 6


@pytest.mark.slow
def test_with_shuffling_the_cache_changes_less_than_other_padding_does() -> None:
    plain, cached, padded = (
        run("SFTTrainer", *more, **options)["weight"]
        for more, options in (([], {}), ([PrefixCache()], {}), ([], {"pad_to_multiple_of": 32}))
    )
    served = run("SFTTrainer", PrefixCache())["rates"]
    assert served == [0.0] * 3 + [1.0] * 6
    assert (padded - plain).norm() > 0.0
    assert (cached - plain).norm() < (padded - plain).norm()


def test_evaluation_during_training_gives_the_same_losses() -> None:
    class Evaluate(TrainerCallback):
        """Compute the loss on training examples after every step."""

        def __init__(self) -> None:
            self.losses: list[float] = []

        @torch.no_grad()
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.eval()
            self.losses.append(float(model(**inputs).loss))
            model.train()

    _, tokenizer = world.load()
    inputs = collator(tokenizer)(EditDataset(world.edits(n=12)).encode(tokenizer)[:4])
    evaluations = [Evaluate(), Evaluate()]
    plain = run("Trainer", evaluations[0], **IN_ORDER)
    cached = run("Trainer", evaluations[1], PrefixCache(), **IN_ORDER)
    assert same(plain, cached)
    assert evaluations[0].losses == evaluations[1].losses
    assert len(set(evaluations[0].losses)) == 9
    assert cached["rates"] == [0.0] * 3 + [1.0] * 6


def test_packed_sequences_are_computed_in_full_and_noise_is_an_error() -> None:
    packed = {"packing": True, "max_length": 64, **IN_ORDER}
    plain = run("SFTTrainer", steps=3, **packed)
    with pytest.warns(
        UserWarning, match=r"computed in full, without the cache, because position_ids restart .*\(packing"
    ):
        cached = run("SFTTrainer", PrefixCache(), steps=3, **packed)
    assert same(plain, cached)
    assert cached["rates"] == []
    with pytest.raises(EditError, match="a module below layer 3 draws random numbers"):
        run("SFTTrainer", PrefixCache(), steps=3, neftune_noise_alpha=5.0)
