"""ActiveSet leaves learned edits out, keeps the gradient of all other edits, and checks learned edits again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kedit_train.callbacks import ActiveSet, BatchAnchor, ParameterScope, TokenLoss, TokenSmoothing, editing
from kedit_train.core.tokens.active_examples import ActiveExamples
from kedit_train.errors import EditError

# Tokens of prompt in each example.
PROMPT = 3


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Four right-padded examples of different lengths, with targets after three tokens of prompt."""
    torch.manual_seed(1)
    ids, mask = torch.randint(1, 61, (4, 9)), torch.zeros(4, 9, dtype=torch.long)
    for row, length in enumerate((9, 5, 7, 6)):
        mask[row, :length] = 1
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :PROMPT] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def flipped(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same examples padded on the left."""
    shifts = (9 - batch["attention_mask"].sum(1)).tolist()
    return {k: torch.stack([r.roll(s) for r, s in zip(v, shifts, strict=True)]) for k, v in batch.items()}


def gradients(edit: Any) -> list[Tensor]:
    return [p.grad.clone() for p in edit.parameters()]


def learned(active: Any, batch: dict[str, Tensor], rows: list[int], times: int) -> None:
    """Record by hand that these examples are learned."""
    # One example at a time, twice in its batch, because a batch of one is never reduced.
    for row in rows:
        one = {k: v[[row, row]] for k, v in batch.items()}
        active.select(one)
        where = one["labels"][:, 1:] != -100
        count = int(where.sum())
        active.record(where, torch.zeros(count, dtype=torch.bool), torch.full((count,), 0.25))
    active.learned = {key: [times, *seen[1:]] for key, seen in active.learned.items()}


@pytest.mark.parametrize("reduction", ["token", "sample"])
@pytest.mark.parametrize("items", [None, 16])
@pytest.mark.parametrize("side", [dict, flipped], ids=["right", "left"])
def test_the_gradient_of_the_other_examples_does_not_change(make, batch, reduction, items, side):
    model = make().train()
    given = side(batch) | ({} if items is None else {"num_items_in_batch": items})
    # Examples 0 and 3 are active; the others are learned.
    lengths = {row: int((batch["labels"][row, 1:] != -100).sum()) for row in range(4)}
    with editing(model, [ParameterScope(modules="*"), TokenSmoothing(reduction=reduction), ActiveSet()]) as edit:
        edit.before_step()
        want: dict[str, Tensor] = {}
        # By hand: the sum over the remaining examples, with their weights in the whole batch.
        head = edit.run.loss_head()
        active = head.filter
        own = 0.0
        for row in (0, 3):
            head.filter = None
            length = int(batch["attention_mask"][row].sum())
            one = {k: v[[row], :length] for k, v in batch.items()}
            mean = model(**one).loss
            share = lengths[row] / (items or sum(lengths.values())) if reduction == "token" else 1 / 4
            own += float(mean.detach()) * share
            (mean * share).backward()
        want = {n: p.grad.clone() for n, p in edit.run.scope.items()}
        model.zero_grad()
        head.filter = active
        learned(active, side(batch), [1, 2], 9)
        loss = model(**given).loss
        # The logged loss includes the last losses of the learned examples, which are 0.25 per token here.
        share = (lengths[1] + lengths[2]) / (items or sum(lengths.values())) if reduction == "token" else 2 / 4
        assert float(loss.detach()) == pytest.approx(own + 0.25 * share, rel=1e-5)
        loss.backward()
        for name, parameter in edit.run.scope.items():
            torch.testing.assert_close(parameter.grad, want[name], rtol=2e-4, atol=1e-7)


def test_learned_examples_return_after_the_recheck_interval(batch):
    active = ActiveExamples(recheck=2, probability=None)
    seen = []
    for round_ in range(8):
        kwargs, left = active.select(batch)
        kept = kwargs["input_ids"].shape[0]
        seen.append((kept, len(left.examples)))
        where = kwargs["labels"][:, 1:] != -100
        # Example 0 is always active. In round 6, all examples are active.
        busy = torch.zeros(where.shape, dtype=torch.bool)
        busy[0] = True
        active.record(where, (busy | (round_ == 6))[where], torch.zeros(int(where.sum())))
    # The rounds have all examples, example 0 alone (twice), all, example 0 alone (twice), all (which are active now),
    # and therefore all again.
    assert seen == [(4, 0), (1, 3), (1, 3), (4, 0), (1, 3), (1, 3), (4, 0), (4, 0)]
    assert active.examples == 32
    assert active.examples_left_out == 12


def test_columns_that_hold_only_padding_are_removed(batch):
    active = ActiveExamples(recheck=5, probability=None)
    learned(active, batch, [0, 2], 5)
    kwargs, left = active.select(batch)
    assert kwargs["input_ids"].shape == (2, 6)
    assert torch.equal(kwargs["attention_mask"].sum(1), torch.tensor([5, 6]))
    assert len(left.examples) == 2
    assert left.tokens == 6 + 4


def test_an_example_is_recognised_in_another_padding(batch):
    active = ActiveExamples(recheck=5, probability=None)
    learned(active, batch, [0, 1, 2], 5)
    kwargs, _ = active.select(flipped(batch))
    assert len(kwargs["input_ids"]) == 1


def test_one_example_stays_if_all_are_learned_and_no_weight_moves(make, batch):
    model = make().train()
    with editing(model, [ParameterScope(modules="*"), TokenSmoothing(epsilon=1e6), ActiveSet(recheck=3)]) as edit:
        optimizer = torch.optim.AdamW(edit.parameters(), lr=0.1, weight_decay=0.5)
        for _ in range(6):
            before = [p.detach().clone() for p in edit.parameters()]
            edit.before_step()
            loss = model(**batch).loss
            assert loss.requires_grad
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert all(torch.equal(a, b) for a, b in zip(before, edit.parameters(), strict=True))
        found = edit.run.collect()
    assert found["edit/active/examples_left_out"] == pytest.approx(16 / 24)
    assert "edit/active/tokens_left_out" in found


def test_probability_replaces_the_clip(make, batch):
    model = make().train()
    with editing(model, [TokenLoss(), ActiveSet(probability=1e-30)]) as edit:
        edit.before_step()
        model(**batch).loss.backward()
        # Every token is more probable than this, so all four are learned.
        assert len(edit.run.loss_head().filter.learned) == 4
    with editing(model, [TokenLoss(), ActiveSet(probability=0.999)]) as edit:
        edit.before_step()
        model(**batch).loss.backward()
        assert not edit.run.loss_head().filter.learned


def test_nothing_is_left_out_of_batches_that_are_not_one_entry_per_example(batch):
    active = ActiveExamples(recheck=5, probability=None)
    learned(active, batch, [0, 1, 2, 3], 5)
    for extra in ({"cu_seq_lens_q": torch.tensor([0, 4, 9])}, {"features": [1, 2]}):
        kwargs, left = active.select(batch | extra)
        assert (len(kwargs["labels"]), len(left.examples)) == (4, 0)
    kwargs, _ = active.select({k: v[:1] for k, v in batch.items()})
    assert len(kwargs["labels"]) == 1


def test_input_ids_may_be_a_positional_argument(make, batch):
    model = make().train()
    with editing(model, [TokenSmoothing(epsilon=1e6), ActiveSet()]) as edit:
        edit.before_step()
        model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss.backward()
        assert len(edit.run.loss_head().filter.learned) == 4


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ([], "add TokenSmoothing"),
        ([TokenSmoothing(epsilon=0.0)], "probability must be given"),
        ([TokenSmoothing(), BatchAnchor()], "would not anchor the edits that ActiveSet leaves out"),
    ],
)
def test_a_list_of_callbacks_that_cannot_work_is_refused(make, words, others, said):
    with editing(make(), [ActiveSet(), *others], tokenizer=words) as edit, pytest.raises(EditError, match=said):
        edit.before_step()


@pytest.mark.parametrize("wrong", [{"recheck": 0}, {"probability": 1.0}, {"probability": 0.0}])
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(EditError, match="ActiveSet"):
        ActiveSet(**wrong)


def test_logs_and_reliability_in_trl_are_those_without_it(tmp_path):
    pytest.importorskip("trl")
    from trl import SFTConfig, SFTTrainer
    from trl.trainer import utils

    from kedit_train import EditDataset, evaluate, world

    edits = EditDataset(world.edits(n=8))
    rows: dict[bool, list[dict[str, float]]] = {}
    reliability = {}
    for active in (False, True):
        model, tokenizer = world.load()
        scope = ParameterScope(layers="0.3-1.0", modules="mlp.down_proj")
        arguments = SFTConfig(
            str(tmp_path),
            num_train_epochs=14,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            processing_class=tokenizer,
            train_dataset=edits.to_prompt_completion(),
            callbacks=[scope, TokenSmoothing(), *([ActiveSet(recheck=2)] if active else [])],
        )
        trainer.train()
        rows[active] = [row for row in trainer.state.log_history if "loss" in row]
        report = evaluate(model, tokenizer, edits, progress=False)
        reliability[active] = report.metrics["reliability"]["generated"].value
    assert max(row["edit/active/examples_left_out"] for row in rows[True]) > 0.4
    assert reliability[True] >= reliability[False]
    # The logs include the edits that were left out, so the two runs log nearly the same.
    # Without a fused head, TRL computes the accuracy and the entropy from logits, which are 0 for edits left out.
    fused = hasattr(utils, "FusedCausalLMOutput")
    for key in ("loss", "mean_token_accuracy", "entropy") if fused else ("loss",):
        assert [r[key] for r in rows[True]] == pytest.approx([r[key] for r in rows[False]], abs=0.15), key
    assert not fused or rows[True][-1]["mean_token_accuracy"] > 0.9
