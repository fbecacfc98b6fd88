"""The loss head against the loss of the model, and a batch against its examples one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kedit_train.core import EditRun, Host
from kedit_train.core.tokens.loss_head import LossHead
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
PAD = 0
# The padding token is also the end-of-text token: at the end of a text it is supervised, as padding it is not.
TEXTS = [([5, 7, 11], [13, PAD]), ([2, 4], [8, 16, 32, 60, PAD]), ([9, 8, 7, 6, 5, 4], [3, PAD])]


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(logits, labels, reduction="none"), torch.ones_like(labels, dtype=torch.bool)


def smoothed(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return overtone(logits, labels, epsilon=2.0)


@contextmanager
def loss_head(model: Any, objective: Any = cross_entropy, reduction: Any = "token", **options: Any) -> Iterator[Any]:
    run = EditRun(model, Host(object()))
    head = LossHead(run.head(), shares=options.pop("shares", lambda: 1))
    head.use(objective, reduction=reduction, **options)
    try:
        yield head
    finally:
        head.remove()
        run.close()


def batch(texts: list[tuple[list[int], list[int]]], side: str = "right") -> dict[str, Tensor]:
    width = max(len(p) + len(t) for p, t in texts)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, target in texts:
        pad = width - len(prompt) - len(target)
        for key, row, fill in (
            ("input_ids", prompt + target, PAD),
            ("attention_mask", [1] * len(prompt + target), 0),
            ("labels", [-100] * len(prompt) + target, -100),
        ):
            rows[key].append([fill] * pad + row if side == "left" else row + [fill] * pad)
    found = {key: torch.tensor(row) for key, row in rows.items()}
    # GPT-2 counts positions from the start of the row unless it gets position ids, as it does in generation.
    found["position_ids"] = (found["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return found


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, grads, strict=True) if g is not None}


def trained_gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], rel: float) -> None:
    assert got.keys() == want.keys()
    size = torch.stack([g.norm() for g in want.values()]).norm()
    for name in want:
        assert (got[name] - want[name]).norm() <= rel * max(want[name].norm(), 1e-3 * size), name


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


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reduction", ["token", "sample"])
def test_a_batch_equals_its_examples_one_at_a_time(tiny, family, side, reduction):
    model = tiny(family)
    with loss_head(model, smoothed, reduction):
        got = model(**batch(TEXTS, side)).loss
        got_grads = gradients(model, got)
        tokens = [len(target) for _, target in TEXTS]
        shares = [1 / 3] * 3 if reduction == "sample" else [n / sum(tokens) for n in tokens]
        terms = [model(**batch([text])).loss * share for text, share in zip(TEXTS, shares, strict=True)]
        want: Tensor = torch.stack(terms).sum()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert_same(got_grads, gradients(model, want), 1e-5)


def test_packed_sequences_have_equal_weights(tiny):
    model = tiny("llama")
    packed: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
    for prompt, target in TEXTS:
        packed["input_ids"] += prompt + target
        packed["labels"] += [-100] * len(prompt) + target
        packed["position_ids"] += range(len(prompt + target))
    inputs = {key: torch.tensor([row]) for key, row in packed.items()}
    lengths = [len(target) for _, target in TEXTS]
    with torch.no_grad():
        # With a cache, transformers takes the row for one sequence.
        unlabelled = {key: value for key, value in inputs.items() if key != "labels"}
        logits = model(**unlabelled, use_cache=False).logits
    each = F.cross_entropy(logits[0, :-1], inputs["labels"][0, 1:], reduction="none").split(1)
    losses = iter(x for x, label in zip(each, inputs["labels"][0, 1:], strict=True) if label != -100)
    want = sum(sum(next(losses) for _ in range(n)) / n for n in lengths) / len(lengths)
    with loss_head(model, reduction="sample"):
        assert model(**inputs).loss.item() == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("reduction", ["token", "sample"])
def test_micro_batches_add_up_to_the_batch(tiny, reduction):
    model = tiny("llama")
    with loss_head(model, reduction=reduction, shares=lambda: 2):
        items = torch.tensor(sum(len(target) for _, target in TEXTS))
        parts = [model(**batch(part), num_items_in_batch=items).loss for part in (TEXTS[:1], TEXTS[1:])]
        whole = [model(**batch(part)).loss for part in (TEXTS[:1], TEXTS[1:])]
    n = [sum(len(target) for _, target in part) for part in (TEXTS[:1], TEXTS[1:])]
    want = sum(w * k for w, k in zip(whole, n, strict=True)) / sum(n) if reduction == "token" else sum(whole) / 2
    torch.testing.assert_close(parts[0] + parts[1], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reduction", ["token", "sample"])
def test_a_batch_without_supervised_tokens_has_loss_zero(tiny, reduction):
    model = tiny("llama")
    inputs = batch(TEXTS)
    inputs["labels"][:] = -100
    with loss_head(model, smoothed, reduction):
        loss = model(**inputs).loss
        assert loss.item() == 0.0
        assert not any(g.any() for g in gradients(model, loss).values())


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
