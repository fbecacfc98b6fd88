"""BatchAnchor: loss and gradient against a second copy of the model, for any batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from installed import CACHE
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from kedit_train.callbacks import BatchAnchor, ParameterScope, ReferenceCache, TokenLoss, TokenSmoothing, editing
from kedit_train.errors import EditError

ROWS = [([5, 7, 11], [13, 17, 3]), ([2, 4], [8]), ([9, 8, 7, 6], [5, 32, 60])]


def batch(rows: list[tuple[list[int], list[int]]], side: str = "right", extra: int = 0) -> dict[str, Tensor]:
    width = max(len(p) + len(t) for p, t in rows) + extra
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, target in rows:
        pad = width - len(prompt + target)
        full = {"input_ids": (prompt + target, 0), "attention_mask": ([1] * len(prompt + target), 0)}
        full |= {"labels": ([-100] * len(prompt) + target, -100)}
        for key, (row, fill) in full.items():
            columns[key].append([fill] * pad + row if side == "left" else row + [fill] * pad)
    found = {key: torch.tensor(rows) for key, rows in columns.items()}
    found["position_ids"] = (found["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return found


def by_hand(before: Any, now: Any, inputs: dict[str, Tensor], weight: float, direction: str = "forward") -> Tensor:
    """Return the mean over supervised tokens of cross-entropy plus weighted divergence, token by token in fp64."""
    labels, unlabelled = inputs["labels"][:, 1:], {k: v for k, v in inputs.items() if k != "labels"}
    with torch.no_grad():
        reference = before(**unlabelled, use_cache=False).logits[:, :-1].double()
    logits = now(**unlabelled, use_cache=False).logits[:, :-1].double()
    terms = []
    for p, q, label in zip(reference.flatten(0, 1), logits.flatten(0, 1), labels.flatten(), strict=True):
        if label == -100:
            continue
        first, second = (p, q) if direction == "forward" else (q, p)
        kl = (first.softmax(-1) * (first.log_softmax(-1) - second.log_softmax(-1))).sum()
        terms.append(F.cross_entropy(q, label) + weight * kl)
    return torch.stack(terms).mean()


def shake(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def assert_same(model: Any, got: Tensor, want: Tensor) -> None:
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, a, b in zip(
        own,
        torch.autograd.grad(got, list(own.values()), retain_graph=True),
        torch.autograd.grad(want.float(), list(own.values())),
        strict=True,
    ):
        assert (a - b).norm() <= 2e-5 * b.norm() + 1e-9, name


def start(edit: Any) -> Any:
    edit.before_step()
    return edit.run.loss_head().term


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("smoothed", [False, True])
def test_loss_and_gradient(make, words, family, side, smoothed):
    model = make(family)
    before = copy.deepcopy(model)
    used = [ParameterScope(1), BatchAnchor(weight=0.7)] + [TokenLoss()] * smoothed
    with editing(model, used, tokenizer=words) as edit:
        anchor = start(edit)
        loss = model(**batch(ROWS, side)).loss
        assert loss.item() == pytest.approx(by_hand(before, model, batch(ROWS, side), 0.0).item(), rel=1e-6)
        shake(model)
        loss = model(**batch(ROWS, side)).loss
        assert_same(model, loss, by_hand(before, model, batch(ROWS, side), 0.7))
        assert (anchor.examples, anchor.hits) == (6, 3)
        assert by_hand(before, model, batch(ROWS, side), 0.7) - by_hand(before, model, batch(ROWS, side), 0.0) > 1e-3


def test_hidden_states_may_be_stored_in_bf16(make, words):
    model = make()
    before = copy.deepcopy(model)
    with editing(
        model, [BatchAnchor(cache=ReferenceCache(dtype="bfloat16")), ParameterScope(1)], tokenizer=words
    ) as edit:
        anchor = start(edit)
        shake(model)
        want = by_hand(before, model, batch(ROWS), 1.0).item()
        assert model(**batch(ROWS)).loss.item() == pytest.approx(want, rel=0.02)
        assert anchor.store.memory_bytes == 7 * 16 * 2


def test_the_reverse_direction(make, words):
    model = make()
    before = copy.deepcopy(model)
    with editing(model, [BatchAnchor(2.0, direction="reverse"), ParameterScope(0)], tokenizer=words) as edit:
        start(edit)
        shake(model)
        assert_same(model, model(**batch(ROWS)).loss, by_hand(before, model, batch(ROWS), 2.0, "reverse"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("modules", [["lm_head"], ["norm"], ["embed_tokens"], None])
def test_the_head_the_norms_and_tied_embeddings_may_be_in_the_scope(make, words, tied, modules):
    model = make(tie_word_embeddings=tied)
    before = copy.deepcopy(model)
    used = [BatchAnchor(), *([ParameterScope(modules=modules)] if modules else [])]
    with editing(model, used, tokenizer=words) as edit:
        start(edit)
        shake(model)
        # The examples are first seen after the weights have changed; the reference is the model before that.
        assert_same(model, model(**batch(ROWS)).loss, by_hand(before, model, batch(ROWS), 1.0))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_adapters(make, words):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
    before = copy.deepcopy(model)
    with editing(model, [BatchAnchor(), ParameterScope(modules="*")], tokenizer=words) as edit:
        start(edit)
        shake(model)
        assert_same(model, model(**batch(ROWS)).loss, by_hand(before, model, batch(ROWS), 1.0))


def test_examples_are_recognized_in_another_order_and_padding(make, words):
    model = make()
    before = copy.deepcopy(model)
    with editing(model, [BatchAnchor(), ParameterScope(1)], tokenizer=words) as edit:
        anchor = start(edit)
        model(**batch(ROWS))
        shake(model)
        calls: list[int] = []
        model.register_forward_pre_hook(lambda m, a: calls.append(1))
        for rows, side, extra in ((ROWS[::-1], "left", 3), ([ROWS[1], ROWS[1]], "right", 0), (ROWS[1:], "right", 7)):
            calls.clear()
            inputs = batch(rows, side, extra)
            loss = model(**inputs).loss
            assert len(calls) == 1, "no second forward pass"
            assert_same(model, loss, by_hand(before, model, inputs, 1.0))
        assert (anchor.examples, anchor.hits) == (10, 7)


@pytest.mark.parametrize("change", ["ids", "labels", "positions", "types"])
def test_an_example_that_differs_in_anything_is_another_example(make, words, change):
    model = make("gpt2")
    before = copy.deepcopy(model)
    with editing(model, [BatchAnchor(), ParameterScope(1)], tokenizer=words) as edit:
        anchor = start(edit)
        inputs = batch(ROWS)
        model(**inputs)
        shake(model)
        if change == "ids":
            inputs["input_ids"][0, 0] += 1
        elif change == "labels":
            inputs["labels"][0, 1:3] = inputs["input_ids"][0, 1:3]
        elif change == "positions":
            inputs["position_ids"][0] += 2
        else:
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        assert_same(model, model(**inputs).loss, by_hand(before, model, inputs, 1.0))
        assert anchor.hits == (0 if change == "types" else 2)


def test_a_packed_row_counts_as_one_example(make, words):
    model = make()
    before = copy.deepcopy(model)
    packed: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
    for prompt, target in ROWS:
        packed["input_ids"] += prompt + target
        packed["labels"] += [-100] * len(prompt) + target
        packed["position_ids"] += range(len(prompt + target))
    inputs = {key: torch.tensor([row]) for key, row in packed.items()}
    with editing(model, [BatchAnchor(), ParameterScope(1)], tokenizer=words) as edit:
        anchor = start(edit)
        model(**inputs)
        shake(model)
        assert_same(model, model(**inputs).loss, by_hand(before, model, inputs, 1.0))
        single = {k: v for k, v in batch(ROWS).items() if k != "attention_mask"}
        assert model(**single).loss.item() == pytest.approx(by_hand(before, model, single, 1.0).item(), rel=1e-5)
        assert anchor.hits == 1


@pytest.mark.parametrize("folder", [False, True])
def test_beyond_the_memory_limit_examples_are_computed_again_or_read_from_disk(make, words, tmp_path, folder):
    model = make()
    before = copy.deepcopy(model)
    kl = BatchAnchor(cache=ReferenceCache(tmp_path if folder else None, memory_limit=16 * 4 * 3))
    with editing(model, [kl, ParameterScope(1)], tokenizer=words) as edit:
        anchor = start(edit)
        if folder:
            model(**batch(ROWS))
        else:
            with pytest.warns(UserWarning, match="BatchAnchor: memory_limit of the ReferenceCache is reached"):
                model(**batch(ROWS))
        shake(model)
        assert_same(model, model(**batch(ROWS)).loss, by_hand(before, model, batch(ROWS), 1.0))
        assert anchor.hits == (3 if folder else 1)
        assert len(list(tmp_path.rglob("*.safetensors"))) == int(folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:other code has changed")
def test_a_step_without_active_tokens_is_taken_because_the_anchor_has_a_gradient(make, words, ids):
    model = make()
    used = [ParameterScope(1), TokenSmoothing(epsilon=1e9), BatchAnchor(1.0)]
    with editing(model, used, tokenizer=words, log_every_n_steps=1) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=1.0)
        edit.before_step()
        shake(model)
        moved = model.model.layers[1].mlp.down_proj.weight.detach().clone()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        assert not torch.equal(moved, model.model.layers[1].mlp.down_proj.weight)
        row = edit.history[-1]
        assert row["edit/tokens/active"] == 0.0
        assert row["edit/locality/batch_kl"] > 1e-3
        assert row["edit/locality/batch_hits"] == 0.0
        assert row["edit/locality/batch_bytes"] == 10 * 16 * 4


def test_an_evaluation_is_unchanged(make, words):
    model = make()
    with editing(model, [BatchAnchor(), ParameterScope(1)], tokenizer=words) as edit:
        anchor = start(edit)
        with torch.no_grad():
            model(**batch(ROWS))
        assert anchor.examples == 0


def test_dropout_does_not_count_as_change(make, words):
    model = make("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).eval()
    before = copy.deepcopy(model)
    with editing(model.train(), [BatchAnchor(), ParameterScope(1)], tokenizer=words) as edit:
        start(edit)
        model(**batch(ROWS))
        shake(model.eval())
        assert_same(model, model(**batch(ROWS)).loss, by_hand(before, model, batch(ROWS), 1.0))


def test_batches_that_cannot_be_anchored_are_errors(make, words, ids):
    with (
        pytest.raises(EditError, match="BatchAnchor: there are two callbacks of this class on this model; keep one"),
        editing(make(), [BatchAnchor(), BatchAnchor()]),
    ):
        pass
    model = make()
    with editing(model, [BatchAnchor(), ParameterScope(1)], tokenizer=words) as edit:
        edit.before_step()
        with pytest.raises(EditError, match=f"argument {CACHE} of type DynamicCache"):
            model(input_ids=ids, labels=ids, **{CACHE: DynamicCache()})
        with pytest.raises(EditError, match=r"attention_mask of shape \(3, 6\) for 2 examples"):
            model(input_ids=ids, labels=ids, attention_mask=torch.ones(3, 6))
        optimizer = torch.optim.SGD(edit.parameters(), lr=1.0)
        model(input_ids=ids).logits.sum().backward()
        with pytest.raises(EditError, match="the model was not called with labels= since the last optimizer step"):
            optimizer.step()


def test_several_optimizers_may_share_a_step(make):
    model, inputs = make(), batch(ROWS)
    before = [p.detach().clone() for p in model.parameters()]
    with editing(model, [BatchAnchor()]) as edit:
        optimizers = [torch.optim.SGD(part, lr=0.1) for part in (edit.parameters()[:2], edit.parameters()[2:])]
        for _ in range(2):
            edit.before_step()
            model(**inputs).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert edit.run.step == 2
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
