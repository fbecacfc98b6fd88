"""TokenLoss in a plain loop: each objective against its formula, the clip and the metrics."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kedit_train.callbacks import KLLocality, ParameterScope, TokenLoss, TokenSmoothing, editing
from kedit_train.data.tokenization import Encoded, collate
from kedit_train.functional import overtone, overtone_statistics

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5),
    "adamw, one by one": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.5),
}
# A clip above the loss of every token of these models.
HUGE = 1e6


def step(edit: Any, model: Any, optimizer: Any, **inputs: Tensor) -> None:
    edit.before_step()
    model(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def frozen_copy(model: Any, optimizer: Any) -> Any:
    return copy.deepcopy([dict(model.named_parameters()), optimizer.state_dict()["state"]])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return all(same(x, y) for x, y in zip(a, b, strict=True)) if isinstance(a, list) else a == b


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scope", [{"modules": "*"}, {"layers": 1}])
def test_weights_and_optimizer_state_stay_bitwise_if_no_token_is_active(make, ids, optimizer, scope):
    model = make()
    smoothing = TokenSmoothing(epsilon=0.0)
    with editing(model, [smoothing, ParameterScope(**scope)]) as edit:
        chosen = OPTIMIZERS[optimizer](edit.parameters())
        for _ in range(3):
            step(edit, model, chosen, input_ids=ids, labels=ids)
        warm = frozen_copy(model, chosen)
        assert warm[1], "the optimizer has state"
        smoothing.epsilon = HUGE
        for _ in range(3):
            step(edit, model, chosen, input_ids=ids, labels=ids)
        assert same(frozen_copy(model, chosen), warm)
        assert edit.run.step == 6
        assert edit.run.scores["edit/tokens/active_now"] == 0
        smoothing.epsilon = 0.05
        step(edit, model, chosen, input_ids=ids, labels=ids)
        assert not same(frozen_copy(model, chosen), warm)
        assert edit.run.scores["edit/tokens/active_now"] > 0


def test_a_step_is_taken_if_one_of_its_micro_batches_has_an_active_token(make, ids):
    model = make()
    smoothing = TokenSmoothing(epsilon=HUGE)
    with editing(model, [smoothing]) as edit:
        optimizer = OPTIMIZERS["sgd"](edit.parameters())
        before = frozen_copy(model, optimizer)
        for epsilon in (HUGE, 0.05, HUGE):
            smoothing.epsilon = epsilon
            if epsilon != 0.05:
                edit.before_step()
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        assert not same(frozen_copy(model, optimizer), before)


def test_a_step_with_a_penalty_is_taken_without_active_tokens(make, ids, words):
    model = make()
    smoothing = TokenSmoothing(epsilon=0.0)
    with editing(
        model, [smoothing, KLLocality(["w1 w2 w3"], batch_size=1), ParameterScope(1)], tokenizer=words
    ) as edit:
        optimizer = OPTIMIZERS["sgd"](edit.parameters())
        step(edit, model, optimizer, input_ids=ids, labels=ids)
        before = frozen_copy(model, optimizer)
        smoothing.epsilon = HUGE
        step(edit, model, optimizer, input_ids=ids, labels=ids)
        assert not same(frozen_copy(model, optimizer), before)


def overtone_by_hand(model: Any, inputs: dict[str, Tensor], reduction: str, **options: Any) -> Tensor:
    """Compute the loss one sequence and one token at a time, from the full logits of the model."""
    sequences = []
    for row in range(len(inputs["input_ids"])):
        logits = model(input_ids=inputs["input_ids"][row : row + 1]).logits[0]
        losses = []
        for position in range(1, logits.shape[0]):
            label = inputs["labels"][row, position]
            if label != -100:
                losses.append(overtone(logits[position - 1 : position], label[None], **options)[0].squeeze())
        sequences.append(losses)
    if reduction == "token":
        return torch.stack([loss for losses in sequences for loss in losses]).mean()
    return torch.stack([torch.stack(losses).mean() for losses in sequences]).mean()


@pytest.mark.parametrize("reduction", ["token", "sample"])
@pytest.mark.parametrize(
    "options",
    [{}, {"label_weight": 0.5, "epsilon": 3.0, "n_sigma": 1.0}, {"label_weight": 1.0, "epsilon": 0.0}],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_overtone_equals_the_formula_in_both_reductions(make, ids, reduction, options, family):
    model = make(family)
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, :2] = -100
    inputs = {"input_ids": ids, "labels": labels}
    want = overtone_by_hand(model, inputs, reduction, **options)
    wanted = torch.autograd.grad(want, list(model.parameters()))
    with editing(model, [TokenLoss("overtone", **options, reduction=reduction)]) as edit:
        edit.before_step()
        loss = model(**inputs).loss
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
        for got, grad in zip(torch.autograd.grad(loss, list(model.parameters())), wanted, strict=True):
            torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, 3.5])
def test_cross_entropy_is_overtone_with_all_weight_on_the_label_bit_for_bit(make, ids, epsilon):
    model = make()
    results = []
    for loss in (TokenLoss(epsilon=epsilon), TokenLoss("overtone", label_weight=1.0, epsilon=epsilon)):
        with editing(model, [loss]) as edit:
            edit.before_step()
            value = model(input_ids=ids, labels=ids).loss
            results.append([value.detach(), *torch.autograd.grad(value, list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    logits = torch.randn(7, 61) * 4
    labels = torch.arange(7)
    direct = TokenLoss(epsilon=epsilon).score(logits, labels)
    smoothed = overtone_statistics(logits, labels, label_weight=1.0, epsilon=epsilon, n_sigma=0.5)
    assert all(torch.equal(a, b) for a, b in zip(direct, smoothed[:2], strict=True))


def test_uniform_is_label_smoothing(make, ids):
    model = make()
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    want = F.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1)
    entropy = -torch.special.xlogy(p := F.one_hot(ids[:, 1:].flatten(), 61) * 0.9 + 0.1 / 61, p).sum(-1).mean()
    with editing(model, [TokenLoss("uniform", label_weight=0.9)]) as edit:
        edit.before_step()
        torch.testing.assert_close(model(input_ids=ids, labels=ids).loss + entropy, want)


@pytest.mark.parametrize("epsilon", [0.0, 4.0])
def test_dft_weights_each_token_by_its_probability(make, ids, epsilon):
    model = make()
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    cross_entropy = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    assert 0 < int((cross_entropy > 4.0).sum()) < len(cross_entropy)
    want = ((-cross_entropy).exp().detach() * cross_entropy.clamp(min=epsilon)).mean()
    wanted = torch.autograd.grad(want, list(model.parameters()))
    with editing(model, [TokenLoss("dft", epsilon=epsilon)]) as edit:
        edit.before_step()
        loss = model(input_ids=ids, labels=ids).loss
        torch.testing.assert_close(loss, want)
        for got, grad in zip(torch.autograd.grad(loss, list(model.parameters())), wanted, strict=True):
            torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["token", "sample"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_prompt_last_scores_every_target_token_at_the_last_prompt_position(make, side, reduction):
    """FT-L is -(1/m) sum_i log p(y_i | x), here from forward passes on the prompts alone."""
    model, rows = make(), [([5, 7, 11], [13, 2]), ([2, 4], [8, 16, 32]), ([9, 8, 7, 6], [3])]
    terms = [
        -model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[torch.tensor(target)]
        for prompt, target in rows
    ]
    want = torch.cat(terms).mean() if reduction == "token" else torch.stack([t.mean() for t in terms]).mean()
    wanted = torch.autograd.grad(want, list(model.parameters()))
    batch = collate([Encoded(p + t, len(p)) for p, t in rows], pad_id=0, padding_side=side)
    with editing(model, [TokenLoss("prompt_last", reduction=reduction)]) as edit:
        edit.before_step()
        loss = model(**batch, position_ids=(batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)).loss
        torch.testing.assert_close(loss, want)
        for got, grad in zip(torch.autograd.grad(loss, list(model.parameters())), wanted, strict=True):
            torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-6)


def test_prompt_last_finds_the_sequences_of_a_packed_row(make):
    model, rows = make(), [([5, 7, 11], [13, 2]), ([2, 4], [8, 16, 32])]
    packed = {
        "input_ids": torch.tensor([[t for p, a in rows for t in p + a]]),
        "position_ids": torch.tensor([[i for p, a in rows for i in range(len(p + a))]]),
    }
    labels = torch.tensor([[t for p, a in rows for t in [-100] * len(p) + a]])
    with torch.no_grad():
        logp = model(**packed, use_cache=False).logits[0].log_softmax(-1)
    want = -torch.cat([logp[2, [13, 2]], logp[6, [8, 16, 32]]]).mean()
    with editing(model, [TokenLoss("prompt_last")]) as edit:
        edit.before_step()
        torch.testing.assert_close(model(**packed, labels=labels).loss, want)


def test_each_objective_has_its_own_defaults():
    shown = [repr(TokenLoss(objective)) for objective in ("cross_entropy", "overtone", "uniform", "dft", "prompt_last")]
    assert shown == [
        'TokenLoss("cross_entropy", epsilon=0.0)',
        'TokenLoss("overtone", label_weight=0.1, epsilon=0.05, n_sigma=0.5)',
        'TokenLoss("uniform", label_weight=0.9, epsilon=0.0)',
        'TokenLoss("dft", epsilon=0.0)',
        'TokenLoss("prompt_last", epsilon=0.0)',
    ]


def test_the_size_of_the_tokenizer_is_the_true_vocabulary(make, words, ids):
    losses = []
    for padded in (False, True):
        torch.manual_seed(1)
        model = make(tie_word_embeddings=True)
        if padded:
            with torch.no_grad():
                model.resize_token_embeddings(80, mean_resizing=False)
                model.lm_head.weight[61:] = 0
        with editing(model, [smoothing := TokenSmoothing()], tokenizer=words) as edit:
            edit.before_step()
            with torch.no_grad():
                hidden = edit.run.head().hidden(input_ids=ids)[:, :-1].flatten(0, 1)
                scored = smoothing.score(edit.run.head().project(hidden), ids[:, 1:].flatten())
        losses.append(scored[2:])
    for plain, wide in zip(*losses, strict=True):
        torch.testing.assert_close(plain, wide, rtol=1e-5, atol=1e-6)


def test_metrics_are_means_over_tokens(make, ids):
    model = make()
    with editing(model, [TokenSmoothing(epsilon=2.0)], log_every_n_steps=1) as edit:
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        _, active = overtone(logits, ids[:, 1:].flatten(), epsilon=2.0)
        step(edit, model, OPTIMIZERS["sgd"](edit.parameters()), input_ids=ids, labels=ids)
        row = edit.history[0]
    assert row["edit/tokens/active"] == pytest.approx(active.float().mean().item())
    assert set(row) == {"step", *(f"edit/tokens/{x}" for x in ("active", "accepted", "survivors", "label_mass"))}
    assert 0 < row["edit/tokens/label_mass"] <= 1
    assert 1 <= row["edit/tokens/survivors"] <= 61
