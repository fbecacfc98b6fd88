"""TokenSmoothing in a loop: what it trains towards, and that nothing moves where nothing is left to learn."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kedit_train.callbacks import KLLocality, ParameterScope, TokenSmoothing, editing
from kedit_train.data.tokenization import Encoded, collate
from kedit_train.errors import EditError
from kedit_train.functional import overtone

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5),
    "adamw, one by one": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.5),
}
# A divergence that no token of these models reaches.
NEVER = 1e6


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
@pytest.mark.parametrize("scope", [None, 1])
def test_without_active_tokens_weights_and_optimizer_stay_bitwise(make, ids, optimizer, scope):
    model = make()
    smoothing = TokenSmoothing(epsilon=0.0)
    with editing(model, [smoothing, ParameterScope(scope)]) as edit:
        chosen = OPTIMIZERS[optimizer](edit.parameters())
        for _ in range(3):
            step(edit, model, chosen, input_ids=ids, labels=ids)
        warm = frozen_copy(model, chosen)
        assert warm[1], "momentum is there, and weight decay pulls"
        smoothing.epsilon = NEVER
        for _ in range(3):
            step(edit, model, chosen, input_ids=ids, labels=ids)
        assert same(frozen_copy(model, chosen), warm)
        assert edit.run.step == 6
        assert edit.run.scores["edit/tokens/active_now"] == 0
        smoothing.epsilon = 0.05
        step(edit, model, chosen, input_ids=ids, labels=ids)
        assert not same(frozen_copy(model, chosen), warm)
        assert edit.run.scores["edit/tokens/active_now"] > 0


def test_one_active_token_in_an_accumulated_step_is_enough(make, ids):
    model = make()
    smoothing = TokenSmoothing(epsilon=NEVER)
    with editing(model, [smoothing]) as edit:
        optimizer = OPTIMIZERS["sgd"](edit.parameters())
        before = frozen_copy(model, optimizer)
        for epsilon in (NEVER, 0.05, NEVER):
            smoothing.epsilon = epsilon
            if epsilon != 0.05:
                edit.before_step()
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        assert not same(frozen_copy(model, optimizer), before)


def test_a_penalty_still_pulls_where_no_token_is_active(make, ids, words):
    model = make()
    smoothing = TokenSmoothing(epsilon=0.0)
    with editing(
        model, [smoothing, KLLocality(["w1 w2 w3"], batch_size=1), ParameterScope(1)], tokenizer=words
    ) as edit:
        optimizer = OPTIMIZERS["sgd"](edit.parameters())
        step(edit, model, optimizer, input_ids=ids, labels=ids)
        before = frozen_copy(model, optimizer)
        smoothing.epsilon = NEVER
        step(edit, model, optimizer, input_ids=ids, labels=ids)
        assert not same(frozen_copy(model, optimizer), before)


def by_hand(model: Any, inputs: dict[str, Tensor], reduction: str, **options: Any) -> Tensor:
    """Each sequence by itself, each token by itself, through the model's whole logits."""
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
@pytest.mark.parametrize("options", [{}, {"lam": 0.5, "epsilon": 3.0, "n_sigma": 1.0}, {"lam": 1.0, "epsilon": 0.0}])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_both_reductions(make, ids, reduction, options, family):
    model = make(family)
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, :2] = -100
    inputs = {"input_ids": ids, "labels": labels}
    want = by_hand(model, inputs, reduction, **options)
    wanted = torch.autograd.grad(want, list(model.parameters()))
    with editing(model, [TokenSmoothing(**options, reduction=reduction)]) as edit:
        edit.before_step()
        loss = model(**inputs).loss
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
        for got, grad in zip(torch.autograd.grad(loss, list(model.parameters())), wanted, strict=True):
            torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-6)


def test_uniform_is_label_smoothing(make, ids):
    model = make()
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    want = F.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1)
    entropy = -torch.special.xlogy(p := F.one_hot(ids[:, 1:].flatten(), 61) * 0.9 + 0.1 / 61, p).sum(-1).mean()
    with editing(model, [TokenSmoothing(lam=0.9, epsilon=0.0, target="uniform")]) as edit:
        edit.before_step()
        torch.testing.assert_close(model(input_ids=ids, labels=ids).loss + entropy, want)


@pytest.mark.parametrize("epsilon", [0.0, 4.0])
def test_dft_weighs_each_token_by_its_own_probability(make, ids, epsilon):
    model = make()
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    cross_entropy = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    assert 0 < int((cross_entropy > 4.0).sum()) < len(cross_entropy)
    want = ((-cross_entropy).exp().detach() * cross_entropy.clamp(min=epsilon)).mean()
    wanted = torch.autograd.grad(want, list(model.parameters()))
    with editing(model, [TokenSmoothing(target="dft", epsilon=epsilon)]) as edit:
        edit.before_step()
        loss = model(input_ids=ids, labels=ids).loss
        torch.testing.assert_close(loss, want)
        for got, grad in zip(torch.autograd.grad(loss, list(model.parameters())), wanted, strict=True):
            torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["token", "sample"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_prompt_last_scores_every_target_token_where_the_prompt_ends(make, side, reduction):
    """FT-L: -(1/m) sum_i log p(y_i | x), each prompt asked alone, the target never seen by the model."""
    model, rows = make(), [([5, 7, 11], [13, 2]), ([2, 4], [8, 16, 32]), ([9, 8, 7, 6], [3])]
    terms = [
        -model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[torch.tensor(target)]
        for prompt, target in rows
    ]
    want = torch.cat(terms).mean() if reduction == "token" else torch.stack([t.mean() for t in terms]).mean()
    wanted = torch.autograd.grad(want, list(model.parameters()))
    batch = collate([Encoded(p + t, len(p)) for p, t in rows], pad_id=0, padding_side=side)
    with editing(model, [TokenSmoothing(target="prompt_last", epsilon=0.0, reduction=reduction)]) as edit:
        edit.before_step()
        loss = model(**batch, position_ids=(batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)).loss
        torch.testing.assert_close(loss, want)
        for got, grad in zip(torch.autograd.grad(loss, list(model.parameters())), wanted, strict=True):
            torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-6)


def test_prompt_last_counts_the_sequences_of_a_packed_row(make):
    model, rows = make(), [([5, 7, 11], [13, 2]), ([2, 4], [8, 16, 32])]
    packed = {
        "input_ids": torch.tensor([[t for p, a in rows for t in p + a]]),
        "position_ids": torch.tensor([[i for p, a in rows for i in range(len(p + a))]]),
    }
    labels = torch.tensor([[t for p, a in rows for t in [-100] * len(p) + a]])
    with torch.no_grad():
        logp = model(**packed, use_cache=False).logits[0].log_softmax(-1)
    want = -torch.cat([logp[2, [13, 2]], logp[6, [8, 16, 32]]]).mean()
    with editing(model, [TokenSmoothing(target="prompt_last", epsilon=0.0)]) as edit:
        edit.before_step()
        torch.testing.assert_close(model(**packed, labels=labels).loss, want)


def test_an_anchor_at_the_tokens_own_positions_is_refused_beside_it(make, ids):
    labels = ids.clone()
    labels[:, :2] = -100
    callbacks = [TokenSmoothing(target="prompt_last"), KLLocality(texts="batch")]
    with editing(make(), callbacks) as edit:
        edit.before_step()
        with pytest.raises(EditError, match="scores it at another: leave one out"):
            edit.run.model(input_ids=ids, labels=labels)


@pytest.mark.parametrize(
    ("given", "unread"),
    [({"target": "dft", "lam": 0.3}, "lam=0.3"), ({"target": "uniform", "n_sigma": 1.0}, "n_sigma=1.0")],
)
def test_what_a_target_does_not_read_is_refused(given, unread):
    with pytest.raises(EditError) as error:
        TokenSmoothing(**given)
    assert str(error.value) == f"TokenSmoothing: target={given['target']!r} does not read {unread}; leave it out"


def test_the_tokenizer_tells_the_true_vocabulary(make, words, ids):
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


def test_metrics_are_shares_of_tokens(make, ids):
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


def test_labels_that_never_arrive_are_an_error(make, ids):
    model = make()
    with editing(model, [TokenSmoothing()]) as edit:
        optimizer = OPTIMIZERS["sgd"](edit.parameters())
        step(edit, model, optimizer, input_ids=ids, labels=ids)
        edit.before_step()
        F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        with pytest.raises(EditError) as error:
            optimizer.step()
    assert str(error.value) == (
        "TokenSmoothing: the model was not called with labels= since the last optimizer step, so its loss was not "
        "replaced; let the training step call model(..., labels=labels) and use the loss that it returns, "
        "and let one optimizer step the whole scope"
    )


def test_two_of_them_are_refused(make):
    with pytest.raises(EditError) as error, editing(make(), [TokenSmoothing(), TokenSmoothing(lam=0.2)]):
        pass
    assert str(error.value) == ("two TokenSmoothing callbacks on one model; a token can have one target only: keep one")


def test_a_module_without_a_language_model_is_refused():
    with pytest.raises(EditError, match=r"^TokenSmoothing needs a causal language model, and Linear has no"):
        editing(torch.nn.Linear(2, 2), [TokenSmoothing()]).__enter__()


@pytest.mark.parametrize(
    "given",
    [
        *({"lam": lam} for lam in (-0.1, 1.1, float("nan"))),
        {"epsilon": -1e-9},
        {"n_sigma": 0.0},
        {"reduction": "mean"},
        {"target": "soft"},
    ],
)
def test_bounds(given):
    with pytest.raises(EditError) as error:
        TokenSmoothing(**given)
    ((name, value),) = given.items()
    assert str(error.value) == (
        f"TokenSmoothing: {name}={value!r} is out of bounds (0 <= lam <= 1, epsilon >= 0, n_sigma > 0, reduction "
        "token|sample, target overtone|uniform|dft|prompt_last)"
    )
