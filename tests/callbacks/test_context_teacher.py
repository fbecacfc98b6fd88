"""The loss of ContextTeacher equals its formula, computed with separate forward passes of the unedited model."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kedit_train.callbacks import ActiveSet, BatchAnchor, ContextTeacher, EditMetrics, ParameterScope, editing
from kedit_train.data import ChatFormat, Edit, EditDataset
from kedit_train.data.prompts import encode_in_format
from kedit_train.data.tokenization import Encoded, collate, position_ids
from kedit_train.errors import EditError
from kedit_train.evaluation.options import EvaluationOptions

PROMPTS = [[f"w{5 * i + j}" for j in range(1, 2 + i % 3)] for i in range(9)]
STOP = 0  # The tokenizer has no full stop, so the full stop after the fact becomes the unknown token.
END = 1


def ids_of(text: str) -> list[int]:
    return [2 + int(word[1:]) for word in text.split()]


def with_fact(edit: Edit) -> list[int]:
    return [*ids_of(edit.prompt), *ids_of(edit.target), STOP, *ids_of(edit.prompt)]


@torch.no_grad()
def distributions(model: Any, head: list[int], answer: list[int]) -> Tensor:
    """Return the probabilities of the next token at each token of the answer, from one forward pass."""
    logits = model(input_ids=torch.tensor([head + answer])).logits[0]
    return logits[len(head) - 1 : -1].double().softmax(-1)


@pytest.fixture
def model(make: Any) -> Any:
    return make().eval()


@pytest.fixture
def edits(model: Any) -> list[Edit]:
    """Return six edits. The model follows the first three when it reads them; trying every target finds these three."""
    follows, others = [], []
    for words in PROMPTS:
        prompt = " ".join(words)
        for i in range(59):
            edit = Edit(prompt, f"w{i}")
            followed = distributions(model, with_fact(edit), ids_of(edit.target)).argmax() == 2 + i
            (follows if followed else others).append(edit)
    chosen = list({edit.prompt: edit for edit in follows}.values())[:3]
    assert len(chosen) == 3
    others = [edit for edit in others if edit.prompt not in {e.prompt for e in chosen}]
    return [*chosen, others[0], Edit(others[100].prompt, "w3 w7 w9"), Edit(others[200].prompt, "w2 w2")]


def soft_targets(edit: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return edit.run.loss_head().soft_targets(inputs)


def rows_of(edits: list[Edit], ends: bool = True) -> list[Encoded]:
    rows = [(ids_of(edit.prompt), ids_of(edit.target) + [END] * ends) for edit in edits]
    return [Encoded(prompt + answer, len(prompt)) for prompt, answer in rows]


def losses_by_hand(model: Any, before: Any, edit: Edit, k: int, ends: bool = True) -> list[Tensor]:
    """Return the loss of each answer token of an edit, from the definition."""
    prompt, answer = ids_of(edit.prompt), ids_of(edit.target) + [END] * ends
    teacher = distributions(before, with_fact(edit), answer).tolist()
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    losses = []
    for p, q, label in zip(teacher, logits.softmax(-1), answer, strict=True):
        top = sorted(range(61), key=lambda i: -p[i])[:k]
        if top[0] != label:
            losses.append(-q[label].log())
            continue
        rest = [i for i in range(61) if i not in top]
        terms = [p[i] * (math.log(p[i]) - q[i].log()) for i in top]
        others = math.fsum(p[i] for i in rest)
        losses.append(torch.stack([*terms, others * (math.log(others) - q[rest].sum().log())]).sum())
    return losses


def assert_same(model: Any, loss: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(loss, want.to(loss), rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(value, list(model.parameters())) for value in (loss, want)]
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 8, 60])
@pytest.mark.parametrize(("side", "reduction", "ends"), [("right", "token", True), ("left", "sample", False)])
def test_the_loss_equals_the_formula(model, edits, words, k, side, reduction, ends):
    teacher = ContextTeacher(edits, top_k=k, reduction=reduction)
    shuffled = [edits[i] for i in (4, 0, 5, 2, 1, 3)]
    batch = collate(rows_of(shuffled, ends), pad_id=END, padding_side=side)
    with editing(model, [teacher], tokenizer=words) as edit:
        edit.before_step()
        loss = model(**batch, position_ids=position_ids(batch["attention_mask"])).loss
        # The teacher is the model before the edit, also in later steps.
        rows = [losses_by_hand(model, model, e, k, ends) for e in shuffled]
        per_row = [torch.stack(row).mean() for row in rows]
        want = torch.stack([x for row in rows for x in row]) if reduction == "token" else torch.stack(per_row)
        assert_same(model, loss, want.mean())
        means = teacher.metrics(edit.run)
    assert means["edit/tokens/followed"] == 0.5
    assert 0.0 < means["edit/tokens/taught"] < 1.0


def test_the_teacher_is_the_unedited_model_in_every_step(model, edits, words):
    before, batch = copy.deepcopy(model), collate(rows_of(edits), pad_id=END)
    callbacks = [ParameterScope(modules="*"), ContextTeacher(edits, top_k=5)]
    with editing(model, callbacks, tokenizer=words) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=0.5)
        for _ in range(3):
            edit.before_step()
            loss = model(**batch).loss
            want = torch.stack([x for e in edits for x in losses_by_hand(model, before, e, 5)]).mean()
            torch.testing.assert_close(loss, want.to(loss), rtol=1e-5, atol=1e-6)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def test_a_packed_row_equals_its_sequences(model, edits, words):
    rows = rows_of(edits)
    packed = {
        "input_ids": torch.tensor([[t for row in rows for t in row.input_ids]]),
        "position_ids": torch.tensor([[i for row in rows for i in range(len(row.input_ids))]]),
        "labels": torch.tensor([[x for r in rows for x in [-100] * r.target_start + r.input_ids[r.target_start :]]]),
    }
    with editing(model, [ContextTeacher(edits, top_k=5)], tokenizer=words) as edit:
        edit.before_step()
        # Attention is not restricted to a sequence here, so only the targets of the tokens are compared.
        found = soft_targets(edit, packed)
        padded = soft_targets(edit, collate(rows, pad_id=END, padding_side="left"))
    assert all(torch.equal(a, b) for a, b in zip(found, padded, strict=True))
    assert found[2].sum() >= 3


def test_other_examples_are_trained_towards_their_labels(model, edits, words):
    other = Encoded([9, 8, 7, 6], 2)
    changed = Encoded([*rows_of(edits)[0].input_ids[:-2], 40, END], rows_of(edits)[0].target_start)
    batch = collate([other, rows_of(edits)[0], changed], pad_id=END)
    with editing(model, [ContextTeacher(edits, top_k=5)], tokenizer=words) as edit:
        edit.before_step()
        loss = model(**batch).loss
        terms = losses_by_hand(model, model, edits[0], 5)
        for row in (other, changed):
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, row.target_start - 1 : -1]
            labels = torch.tensor(row.input_ids[row.target_start :])
            terms += list(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
        assert_same(model, loss, torch.stack(terms).mean())


def test_text_that_is_supervised_around_the_answer_keeps_its_labels(model, edits, words):
    row = rows_of(edits)[0]
    ids = [*row.input_ids, 20, 21]
    batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([[-100, *ids[1:]]])}
    with editing(model, [ContextTeacher(edits, top_k=5)], tokenizer=words) as edit:
        edit.before_step()
        _, _, taught = soft_targets(edit, batch)
        alone = soft_targets(edit, collate([row], pad_id=END))[2]
    expected = [False] * (len(ids) - 1)
    expected[row.target_start - 1 : row.target_start - 1 + len(alone)] = alone.tolist()
    assert taught.tolist() == expected


def test_it_works_with_batch_anchor_and_with_positional_arguments(model, edits, words):
    batch = collate(rows_of(edits), pad_id=END)
    losses = []
    for more in ([], [BatchAnchor(weight=0.5)]):
        with editing(model, [ContextTeacher(edits, top_k=5), *more], tokenizer=words) as edit:
            edit.before_step()
            losses.append(model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss)
    # Before the first step, the divergence from the unedited model is 0.
    torch.testing.assert_close(*losses)


def test_learned_edits_can_be_left_out(model, edits, words):
    callbacks = [ParameterScope(modules="*"), ContextTeacher(edits, top_k=5, epsilon=0.2), ActiveSet(recheck=2)]
    batch = collate(rows_of(edits), pad_id=END)
    with editing(model, callbacks, tokenizer=words, log_every_n_steps=100) as edit:
        optimizer = torch.optim.Adam(edit.parameters(), lr=1e-2)
        for _ in range(100):
            edit.before_step()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert edit.history[0]["edit/active/examples_left_out"] > 0.1


@pytest.mark.parametrize("chat", ["chat", ChatFormat(system="w40")])
def test_a_chat_has_the_fact_in_the_message_of_the_user(model, words, chat):
    words.chat_template = "{% for m in messages %}w{{ 50 + loop.index }} {{ m.content }} w50 {% endfor %}w49 "
    edits = EditDataset([Edit("w1 w2", "w3"), Edit("w4", "w5 w6")])
    rows = [encode_in_format(words, e.prompt, e.target, chat) for e in edits]
    batch = collate(rows, pad_id=END)
    teacher = ContextTeacher(edits, prompt_format=chat, min_followed=0.0, top_k=61)
    with editing(model, [teacher], tokenizer=words) as edit:
        edit.before_step()
        log_probs, tokens, _ = soft_targets(edit, batch)
    place = 0
    for one, row in zip(edits, rows, strict=True):
        answer = row.input_ids[row.target_start :]
        informed = Edit(f"{one.prompt} {one.target}. {one.prompt}", one.target)
        head = encode_in_format(words, informed.prompt, informed.target, chat)
        want = distributions(model, head.input_ids[: head.target_start], answer)
        for p in want:
            got = torch.zeros(61, dtype=torch.float64).scatter(0, tokens[place], log_probs[place, :-1].double().exp())
            torch.testing.assert_close(got, p, rtol=1e-4, atol=1e-7)
            place += 1
    assert place == len(tokens)


def test_the_edits_of_other_callbacks_are_used(model, edits, words):
    metrics = EditMetrics(edits, every_n_steps=0, show=False, evaluation=EvaluationOptions(max_new_tokens=2))
    with editing(model, [ContextTeacher(top_k=5), metrics], tokenizer=words) as edit:
        edit.before_step()
        assert edit.run.loss_head().soft_targets is not None


def test_a_run_without_edits_is_refused(model, words):
    with (
        editing(model, [ContextTeacher()], tokenizer=words) as edit,
        pytest.raises(EditError, match=r"^ContextTeacher: the edits of this run are unknown; pass edits= "),
    ):
        edit.before_step()


def test_a_model_that_follows_too_few_facts_is_refused_with_the_fraction(model, edits, words):
    with (
        editing(model, [ContextTeacher(edits, top_k=5, min_followed=0.6)], tokenizer=words) as edit,
        pytest.raises(EditError) as error,
    ):
        edit.before_step()
    assert str(error.value) == (
        "ContextTeacher: with the new fact in its context, the unedited model gives the new answer for only 0.500 of "
        "the edits (3 of 6), but min_followed=0.6; use a larger model or another context=, or train with TokenLoss "
        "instead."
    )


def test_training_examples_without_the_edits_get_one_warning(model, edits, words):
    batch = collate([Encoded([9, 8, 7, 6], 2)] * 8, pad_id=END)
    with editing(model, [ContextTeacher(edits, top_k=5)], tokenizer=words) as edit:
        edit.before_step()
        model(**batch)
        model(**batch)
        with pytest.warns(UserWarning, match=r"^ContextTeacher: none of the first 24 training .* \(now 'plain'\)"):
            model(**batch)
        model(**batch)


def test_more_probabilities_than_tokens_are_refused(model, edits, words):
    with (
        editing(model, [ContextTeacher(edits, top_k=62)], tokenizer=words) as edit,
        pytest.raises(EditError, match=r"^ContextTeacher: top_k must be at most 61, the size of the vocabulary"),
    ):
        edit.before_step()


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ({"context": "{fact}"}, "a template with {fact} and {prompt}"),
        ({"top_k": 0}, "an integer >= 1"),
        ({"min_followed": 1.5}, "in [0, 1]"),
        ({"epsilon": -1.0}, ">= 0, or None"),
        ({"reduction": "mean"}, '"token" or "sample"'),
    ],
)
def test_arguments_out_of_range_are_refused(argument, expected):
    ((name, value),) = argument.items()
    with pytest.raises(EditError) as error:
        ContextTeacher(**argument)
    assert str(error.value) == f"ContextTeacher: {name} must be {expected}, got {value!r}."
