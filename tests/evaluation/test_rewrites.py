"""Rewritten targets (MixSD) equal those of one forward pass per token. Only texts that state the fact are used."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import pytest
import torch

from kedit_train import world
from kedit_train.augmentation import AugmentationOptions, augmentation, rewrite_targets
from kedit_train.augmentation import rewrites as module
from kedit_train.data import ChatFormat, Edit, Probe
from kedit_train.data.fact_in_context import prompt_with_fact
from kedit_train.data.prompts import prompt_ids
from kedit_train.errors import EditError
from kedit_train.modes import ExampleOptions, TrainLoop
from kedit_train.modules import EditDataModule, EditModule

LIMIT = 12


@pytest.fixture(scope="module")
def known() -> tuple[Any, Any]:
    return world.load()


def with_fact(edit: Edit) -> str:
    return prompt_with_fact(edit, edit.prompt)


@torch.no_grad()
def by_hand(model: Any, tokenizer: Any, edit: Edit, mix: float, seed: int) -> tuple[str, bool]:
    """Write one text with one forward pass per token. Return it, and whether the model ended it."""
    draw, written = random.Random(f"{seed} {edit.prompt}"), []
    for _ in range(LIMIT):
        prompt = edit.prompt if draw.random() < mix else with_fact(edit)
        ids = torch.tensor([[*prompt_ids(tokenizer, prompt), *written]])
        token = int(model(input_ids=ids).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id or "\n" in tokenizer.decode([token]):
            return tokenizer.decode(written).strip(), True
        written.append(token)
    return tokenizer.decode(written).strip(), False


@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_the_texts_equal_those_of_one_forward_pass_per_token(known: Any, mix: float) -> None:
    model, tokenizer = known
    edits = world.edits(12)
    expected = [by_hand(model, tokenizer, edit, mix, seed=3) for edit in edits]
    options: dict[str, Any] = {"mix": mix, "verify": lambda edit, text: True, "max_new_tokens": LIMIT}
    state = torch.random.get_rng_state()
    found = rewrite_targets(model, tokenizer, edits, seed=3, batch_size=5, **options)
    assert torch.equal(torch.random.get_rng_state(), state)
    texts = [text if ended and text else edit.target for (text, ended), edit in zip(expected, edits, strict=True)]
    assert [edit.target for edit in found.edits] == texts
    assert [edit.prompt for edit in found.edits] == [edit.prompt for edit in edits]
    assert found.accepted == sum(bool(text) and ended for text, ended in expected) > 0
    # The text of an edit does not depend on the other edits.
    assert rewrite_targets(model, tokenizer, edits[4:6], seed=3, **options).edits == found.edits[4:6]


def test_the_seed_chooses_the_tokens(known: Any) -> None:
    model, tokenizer = known
    edits = world.edits(24)
    options: dict[str, Any] = {"mix": 0.5, "verify": lambda edit, text: True}
    texts = [
        [edit.target for edit in rewrite_targets(model, tokenizer, edits, seed=seed, **options).edits]
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_texts_without_the_target_are_rejected(scripted_model: Any) -> None:
    edits = [
        Edit("A:", "one", id="a"),
        Edit("B:", "two", aliases=("Zwei",), rephrases=("R:",)),
        Edit("C:", "three"),
        Edit("D:", "four"),
        Edit("E:", "five", locality={"near": (Probe("L:", ("l",)),)}),
        Edit("F:", "six"),
    ]
    texts = [" the one.", " zwei, of course", " threefold", " four", " five, L: l", ""]
    script = {with_fact(edit): text for edit, text in zip(edits, texts, strict=True)}
    endless = {with_fact(edits[3]): script.pop(with_fact(edits[3]))}
    model, tokenizer = scripted_model(script, endless=endless)
    found = rewrite_targets(model, tokenizer, edits, mix=0.0)
    assert [edit.target for edit in found.edits] == ["the one.", "zwei, of course", "three", "four", "five", "six"]
    assert (found.accepted, found.wrong, found.cut_off, found.leaked) == (2, 2, 1, 1)
    assert found.edits[0].id == "a"
    # Rejected edits stay as they are. Rewritten edits are only trained, so they have no probes.
    assert all(found.edits[i] is edits[i] for i in (2, 3, 4, 5))
    assert found.edits[1] == Edit("B:", "zwei, of course")
    assert found.describe() == (
        "2 of 6 targets rewritten; 4 edits keep their targets (2 texts did not state the new fact, 1 were too long, "
        "and 1 contained an evaluation prompt)"
    )
    own = rewrite_targets(model, tokenizer, edits[:3], mix=0.0, verify=lambda edit, text: text.endswith("fold"))
    assert [edit.target for edit in own.edits] == ["one", "two", "threefold"]


def test_augmentation_trains_rewritten_targets(scripted_model: Any) -> None:
    edits = [Edit("A:", "one", subject="A"), Edit("B:", "two", subject="B")]
    model, tokenizer = scripted_model({with_fact(edits[0]): " one.", with_fact(edits[1]): " no", "C:": " c"})
    made = augmentation(model, tokenizer, edits, replay=["C:"], rewrite=0.0)
    assert [(e.prompt, e.target) for e in made.training_edits(edits)] == [("A:", "one."), ("B:", "two"), ("C:", "c")]
    assert made.training_edits(edits)[1] is edits[1]
    assert made(edits) == made.training_edits(edits)[2:]
    assert "1 of 2 targets rewritten; 1 edits keep their targets (1 texts did not state the new fact, " in made.summary
    without = augmentation(model, tokenizer, edits, replay=["C:"])
    assert without.training_edits(edits) == [*edits, *without(edits)]


@pytest.mark.filterwarnings("ignore:.* training steps began, but no optimizer")
def test_a_loop_trains_rewritten_targets(known: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = known
    edits, seen = world.edits(3), []

    def step(self: Any, model: Any, edit: Any, optimizer: Any, tensors: Any, device: Any) -> float:
        edit.before_step()
        seen.extend(tokenizer.decode(ids, skip_special_tokens=True) for ids in tensors["input_ids"])
        return 0.0

    monkeypatch.setattr(TrainLoop, "_step", step)
    monkeypatch.setattr(module, "_states_target", lambda edit, text: True)
    made = augmentation(model, tokenizer, edits, rewrite=0.5)
    TrainLoop(tokenizer, examples=ExampleOptions(extra_edits=made), epochs=1)(model, edits)
    texts = [f"{edit.prompt} {edit.target}" for edit in made.training_edits(edits)]
    assert sorted(seen) == sorted(texts) != sorted(f"{edit.prompt} {edit.target}" for edit in edits)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*isinstance.treespec, LeafSpec")
def test_a_data_module_trains_rewritten_targets_and_keeps_the_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_states_target", lambda edit, text: True)
    L.seed_everything(5, verbose=False)
    # A probability of 0 is a setting, not the absence of one.
    data = EditDataModule(limit=3, batch_size=3, augmentation=AugmentationOptions(rewrite=0.0))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet)
    trainer.fit(EditModule(learning_rate=0.0), data)
    model, tokenizer = world.load()
    made = augmentation(model, tokenizer, data.edits, rewrite=0.0, seed=5)
    (batch,) = data.train_dataloader()
    trained = {tokenizer.decode(row[row >= 0], skip_special_tokens=True).strip() for row in batch["labels"]}
    assert trained == {edit.target for edit in made.training_edits(data.edits)}
    assert trained != {edit.target for edit in data.edits}
    assert data.added == []


@pytest.mark.parametrize("value", [1.0, -0.1, "x"])
def test_a_probability_out_of_range_is_refused(known: Any, value: Any) -> None:
    for make in (
        lambda: AugmentationOptions(rewrite=value),
        lambda: augmentation(*known, world.edits(1), rewrite=value),
    ):
        with pytest.raises(EditError) as error:
            make()
        kind = "a number " if isinstance(value, str) else ""
        assert str(error.value) == f"augmentation: rewrite must be {kind}in [0, 1), or None, got {value!r}."


def test_thoughts_and_unknown_verifications_are_refused(known: Any) -> None:
    model, tokenizer = world.load()
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(EditError, match=r"^rewrite_targets: prompt_format must not have thinking=True"):
        rewrite_targets(model, tokenizer, world.edits(1), prompt_format=ChatFormat(thinking=True))
    with pytest.raises(EditError, match=r"^rewrite_targets: verify must be a function \(edit, text\) -> bool, or None"):
        rewrite_targets(model, tokenizer, world.edits(1), verify="contains")  # type: ignore[arg-type]
