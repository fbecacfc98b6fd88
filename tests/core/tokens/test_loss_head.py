"""The loss head against the loss of the model and the formula of each objective, and calls that it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from core.tokens.loss_heads import TEXTS, assert_same, batch, gradients, loss_head, smoothed
from torch import Tensor
from torch.nn import functional as F

from kedit_train.errors import EditError
from kedit_train.functional import (
    dynamic_cross_entropy,
    overtone,
    overtone_target,
    smoothed_loss,
    uniform,
    uniform_target,
)

FAMILIES = ["llama", "llama-tied", "qwen3", "gpt2", "gemma2", "gemma3", "cohere", "granite", "mixtral", "phi"]


def trained_gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("items", [None, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_cross_entropy_equals_the_loss_of_the_model(tiny, family, items):
    model = tiny(family)
    extra = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    inputs = batch(TEXTS)
    want = model(**inputs, **extra).loss
    want_grads = gradients(model, want)
    with loss_head(model):
        got = model(**inputs, **extra)
        for read in (lambda x: x.shape, lambda x: x[:, -1], lambda x: F.cross_entropy(x, inputs["labels"])):
            with pytest.raises(EditError, match="are not computed"):
                read(got.logits)
        torch.testing.assert_close(got.loss, want, rtol=1e-6, atol=1e-6)
        assert_same(gradients(model, got.loss), want_grads, 1e-6 if family != "mixtral" else 1e-5)
    if family == "mixtral":
        plain = F.cross_entropy(model(**batch(TEXTS)).logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
        assert items or (want - plain).abs() > 1e-4, "the balancing term is part of it"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_fp64_stays_fp64(tiny, family):
    model = tiny(family).double()
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch(TEXTS).items() if k != "labels"}).logits
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch(TEXTS)["labels"][:, 1:].flatten())
    with loss_head(model):
        got = model(**batch(TEXTS)).loss
    assert got.dtype == torch.float64
    assert got.item() == pytest.approx(want.item(), rel=1e-7)


OBJECTIVES: dict[str, tuple[Any, Any]] = {
    "overtone": (
        overtone,
        lambda z, y: smoothed_loss(z, overtone_target(z.detach(), y)[0], epsilon=0.05),
    ),
    "uniform": (uniform, lambda z, y: smoothed_loss(z, uniform_target(z, y))),
    "dft": (
        dynamic_cross_entropy,
        lambda z, y: (F.cross_entropy(z, y, reduction="none") * z.softmax(-1).gather(-1, y[:, None])[:, 0].detach(),),
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("family", ["llama-tied", "gemma2", "gemma3", "cohere", "granite", "phi"])
def test_every_objective_equals_its_formula_on_the_logits_of_the_model(tiny, family, name):
    model, (objective, formula) = tiny(family), OBJECTIVES[name]
    inputs = batch(TEXTS)
    labels = inputs["labels"][:, 1:]
    where = labels != -100
    logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits[:, :-1][where]
    want = formula(logits.float(), labels[where])[0].mean()
    want_grads = gradients(model, want)
    with loss_head(model, objective):
        got = model(**inputs).loss
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert_same(gradients(model, got), want_grads, 1e-5)


def test_adapter_factors_on_the_head_are_trained(tiny):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny("llama"), LoraConfig(r=3, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    )
    inputs = batch(TEXTS)
    want = model(**inputs).loss
    want_grads = trained_gradients(model, want)
    assert any("lm_head" in name for name in want_grads)
    with loss_head(model):
        got = model(**inputs).loss
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        assert_same(trained_gradients(model, got), want_grads, 1e-5)


@pytest.mark.parametrize("scope", ["lm_head", "layers.1"])
def test_frozen_and_trained_heads_give_the_same_gradients(tiny, scope):
    model = tiny("llama")
    inputs = batch(TEXTS)
    with loss_head(model):
        full = gradients(model, model(**inputs).loss)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(scope in name)
    with loss_head(model):
        model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, full[name], rtol=1e-5, atol=1e-6)


def test_only_the_supervised_positions_are_projected(tiny):
    model = tiny("llama")
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda m, a, out: rows.append(out[..., 0].numel()))
    with loss_head(model):
        rows.clear()
        model(**batch(TEXTS)).loss.backward()
    assert max(rows) <= sum(len(target) for _, target in TEXTS)


def test_statistics_reach_the_observer(tiny):
    seen: list[tuple[Tensor, Tensor]] = []
    with loss_head(model := tiny("llama"), smoothed, observe=lambda *given: seen.append(given)):
        mean = model(**batch(TEXTS)).loss
    ((active, loss),) = seen
    assert len(active) == len(loss) == sum(len(target) for _, target in TEXTS)
    assert loss.mean().item() == pytest.approx(mean.item(), rel=1e-6)


def test_the_model_is_unchanged_without_gradients_or_labels(tiny):
    model = tiny("llama")
    inputs = batch(TEXTS)
    with torch.no_grad():
        want = model(**inputs)
        with loss_head(model, smoothed):
            got = model(**inputs)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.logits, want.logits)
    with loss_head(model, smoothed):
        assert model(input_ids=inputs["input_ids"]).logits.shape[1] == inputs["input_ids"].shape[1]


def test_the_loss_is_the_first_entry_of_the_output(tiny):
    model = tiny("mixtral")
    want = list(model(**batch(TEXTS)).keys())
    with loss_head(model):
        got = model(**batch(TEXTS))
        assert got[0] is got.loss
        assert next(iter(got.keys())) == want[0] == "loss"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        ({"return_dict": False}, "LlamaForCausalLM must return a ModelOutput, got a tuple; remove return_dict"),
        ({"shift_labels": torch.zeros(1)}, "shift_labels must not be passed to the model"),
    ],
)
def test_unsupported_calls_are_refused(tiny, break_it, message):
    model = tiny("llama")
    with loss_head(model), pytest.raises(EditError) as error:
        model(**batch(TEXTS), **break_it)
    assert str(error.value).startswith(message)


def test_a_failed_forward_pass_leaves_the_model_unchanged(tiny):
    model = tiny("llama")
    fail: Callable[..., None] = lambda *_: (_ for _ in ()).throw(MemoryError)  # noqa: E731
    with loss_head(model):
        handle = model.lm_head.register_forward_hook(fail)
        with pytest.raises(MemoryError):
            model(**batch(TEXTS))
        handle.remove()
        with torch.no_grad():
            assert model(**batch(TEXTS)).logits.shape[1] == batch(TEXTS)["input_ids"].shape[1]


def test_small_gradients_survive_fp16_with_a_scaler(tiny):
    """The scaler acts in the backward pass; gradients taken before it would be lost in fp16."""
    model = tiny("llama", vocab_size=32_000)
    # Many tokens, so that each has a small share of the mean.
    ids = torch.randint(5, 32_000, (8, 60))
    inputs = {"input_ids": ids, "labels": ids}
    want = gradients(model, model(**inputs).loss)

    def relative(got: dict[str, Tensor]) -> float:
        return max(float((got[n] / 65536 - g).norm() / g.norm()) for n, g in want.items())

    with torch.autocast("cpu", torch.float16):
        native = relative(gradients(model, model(**inputs).loss * 65536))
        with loss_head(model):
            ours = relative(gradients(model, model(**inputs).loss * 65536))
    assert ours < 2 * native + 1e-3
