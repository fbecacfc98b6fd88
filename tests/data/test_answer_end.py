"""append_eos="auto": end-of-text is trained only where the unedited model ends its answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from endless import endless

from kedit_train import EditDataset, world
from kedit_train.data import Edit
from kedit_train.data.answer_end import decide_append_eos, end_probability
from kedit_train.data.tokenization import encode_edit
from kedit_train.errors import EditError


def test_the_probability_is_that_of_the_formula() -> None:
    model, tokenizer = world.load()
    edits, eos = world.edits(3), tokenizer.eos_token_id
    by_hand = []
    for edit in edits:
        ids = tokenizer(f"{edit.prompt} {edit.target}")["input_ids"]
        with torch.no_grad():
            first = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
            other = max((p, t) for t, p in enumerate(first.tolist()) if t != eos)
            second = model(torch.tensor([[*ids, other[1]]])).logits[0, -1].softmax(-1)
        by_hand.append(float(first[eos]) + other[0] * float(second[eos]))
    assert end_probability(model, tokenizer, edits) == pytest.approx(sum(by_hand) / 3, abs=1e-5)
    assert end_probability(endless(model, tokenizer), tokenizer, edits) < 1e-6


def test_a_full_stop_may_come_first() -> None:
    model, tokenizer = world.load()
    eos = tokenizer.eos_token_id
    full_stop = tokenizer(" .", add_special_tokens=False)["input_ids"][-1]

    def stop_and_end(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        # The full stop follows everything, and end-of-text follows the full stop.
        ends = model.ids == full_stop
        logits = torch.zeros_like(output)
        logits[..., full_stop] = torch.where(ends, 0.0, 50.0)
        logits[..., eos] = torch.where(ends, 50.0, 0.0)
        return logits

    model.register_forward_pre_hook(
        lambda module, args, kwargs: setattr(model, "ids", kwargs["input_ids"]), with_kwargs=True
    )
    model.get_output_embeddings().register_forward_hook(stop_and_end)
    assert end_probability(model, tokenizer, world.edits(2)) > 0.99


def test_measuring_changes_nothing() -> None:
    model, tokenizer = world.load()
    model.train()
    model.model.layers[0].eval()
    modes, state = [m.training for m in model.modules()], torch.random.get_rng_state()
    end_probability(model, tokenizer, world.edits(2))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_the_decision_and_its_reason() -> None:
    model, tokenizer = world.load()
    edits = world.edits(4)

    def decide(append_eos: Any = "auto", **options: Any) -> str:
        return str(decide_append_eos(append_eos, tokenizer, edits, **{"model": model, **options}))

    assert decide().startswith("append_eos: on, because the unedited model ends ")
    assert decide(True) == "append_eos: on, because append_eos=True was set"
    assert decide(False) == "append_eos: off, because append_eos=False was set"
    assert decide(model=None).startswith("append_eos: on, because no model was given")
    for prompt_format in ("chat", "question"):
        assert (
            decide(prompt_format=prompt_format)
            == "append_eos: on, because models end their answers in chats and their answers to questions"
        )
    endless(model, tokenizer)
    assert decide() == "append_eos: off, because the unedited model ends only 0% of its completions by itself"
    assert decide(prompt_format="question").startswith("append_eos: on")
    tokenizer.eos_token = None
    assert decide() == "append_eos: off, because the tokenizer has no end-of-text token"


def test_a_tokenizer_that_ends_every_text_decides() -> None:
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = world.load()
    ids = [("<s>", tokenizer.bos_token_id), (tokenizer.eos_token, tokenizer.eos_token_id)]
    pattern = f"<s> $A {tokenizer.eos_token}"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=pattern, special_tokens=ids)
    decision = decide_append_eos("auto", tokenizer, world.edits(2), model=endless(model, tokenizer))
    assert str(decision) == "append_eos: on, because the tokenizer appends end-of-text to every text"


def test_tokens_of_a_model_that_ends_its_answers_stay_as_they_were() -> None:
    model, tokenizer = world.load()
    edits = EditDataset.load("world")
    before = [encode_edit(tokenizer, e.prompt, e.target, append_eos=True) for e in edits]
    assert edits.encode(tokenizer) == edits.encode(tokenizer, model=model) == before
    without = edits.encode(tokenizer, model=endless(model, tokenizer))
    assert [(e.input_ids, e.target_start) for e in without] == [(e.input_ids[:-1], e.target_start) for e in before]
    assert edits.encode(tokenizer, model=model, append_eos=True) == before


def test_token_rows_have_labels_on_the_target() -> None:
    _, tokenizer = world.load()
    edits = EditDataset.load("world", limit=3)
    rows = edits.to_tokens(tokenizer, append_eos=False)
    for row, one in zip(rows, edits.encode(tokenizer, append_eos=False), strict=True):
        assert row["input_ids"] == one.input_ids
        assert row["labels"] == [-100] * one.target_start + one.input_ids[one.target_start :]


def test_an_unknown_value_is_one_line() -> None:
    _, tokenizer = world.load()
    with pytest.raises(EditError, match=r'^EditDataset: append_eos must be "auto", True or False, got "?\'?yes'):
        EditDataset([Edit("a", "b")]).encode(tokenizer, append_eos="yes")
