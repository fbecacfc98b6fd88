"""Additional training examples, made with the bundled model and with a model that gives scripted answers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from kedit_train import world
from kedit_train.augmentation import augmentation, generate_prefixes, replay_facts
from kedit_train.augmentation.prefixes import OPENINGS, _sample
from kedit_train.data import Edit, EditDataset, Probe
from kedit_train.data.leaks import with_prefixes
from kedit_train.edit import scored_prompts
from kedit_train.errors import EditError
from kedit_train.evaluation import generate_answers
from kedit_train.evaluation.asking.probes import PREFIXES
from kedit_train.modes import ExampleOptions, TrainLoop


@pytest.fixture(scope="module")
def known() -> tuple[Any, Any]:
    return world.load()


def test_prefixes_are_sampled_from_the_model_and_depend_on_the_seed_only(known: Any) -> None:
    model, tokenizer = known
    model.train()
    state = torch.random.get_rng_state()
    texts = generate_prefixes(model, tokenizer, 30, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    model.eval()
    torch.rand(3)
    assert texts == generate_prefixes(model, tokenizer, 30, seed=4) != generate_prefixes(model, tokenizer, 30, seed=5)
    assert len(set(texts)) == 30
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    # Five or ten tokens and a full stop.
    assert all(length <= 11 for length in lengths)
    assert sum(length <= 6 for length in lengths) >= 5
    assert sum(length > 6 for length in lengths) >= 5
    assert all(text == " ".join(text.split()) and text[-1] in ".!?:" for text in texts)
    assert not any(token in text for text in texts for token in tokenizer.all_special_tokens)


def test_samples_follow_the_probabilities_of_the_model(known: Any, scripted_model: Any) -> None:
    model, tokenizer = known
    n = 4000
    texts = _sample(model, tokenizer, n, 1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[tokenizer.bos_token_id]])).logits[0, -1]
    logits[tokenizer.all_special_ids] = -torch.inf
    expected: Counter[str] = Counter()
    for token, share in enumerate(logits.softmax(-1).tolist()):
        text = tokenizer.decode([token], skip_special_tokens=True).strip()
        expected[text if text[-1:] in tuple(".!?:") else f"{text}."] += share
    found = Counter(texts)
    assert sum(abs(found[text] / n - share) for text, share in expected.items()) < 0.2
    top = expected.most_common(3)
    assert all(abs(found[text] / n - share) < 4 * (share / n) ** 0.5 for text, share in top)
    # Without a begin-of-text token the texts start with common words; this model repeats its first choice.
    model, tokenizer = scripted_model({}, endless={opening[0]: "a" for opening in OPENINGS})
    assert tokenizer.bos_token_id is None
    text = generate_prefixes(model, tokenizer, 1, lengths=(6,))[0]
    assert text[0] in {opening[0] for opening in OPENINGS}
    assert text.count("a") >= 4
    with pytest.raises(EditError, match="generate_prefixes: n=400 is too high"):
        generate_prefixes(model, tokenizer, 400, lengths=(1,))


def test_replayed_facts_have_the_answers_of_the_model(scripted_model: Any) -> None:
    edit = Edit("P:", "new", subject="Ann", rephrases=("R:",), locality={"near": (Probe("L:", ("l",)),)})
    said = {
        "A:": " one",
        "B:": " two\nmore",
        "C:": "",
        "L:": " l",
        "R:": " r",
        "Ann is": " x",
        "P:": " old",
        "D": " L: x",
    }
    model, tokenizer = scripted_model(said, endless={"E:": " la"})
    prompts = [*said, "E:", "A:", "Hm. L:"]
    facts = replay_facts(model, tokenizer, prompts, [edit], max_new_tokens=12)
    assert {(row.prompt, row.target) for row in facts.examples} == {("A:", "one"), ("B:", "two")}
    assert (facts.prompts, facts.leaked, facts.empty, facts.cut_off) == (10, 6, 1, 1)
    one = replay_facts(model, tokenizer, ["A:", "B:"], [edit], limit=1, seed=1)
    assert len(one.examples) == 1
    assert one == replay_facts(model, tokenizer, ["A:", "B:"], [edit], limit=1, seed=1)
    with pytest.raises(EditError, match=r"2 of 2 prompts \(100.0%\) were left out .* text of an edit"):
        replay_facts(model, tokenizer, ["P:", "L:"], [edit])


@pytest.mark.parametrize("form", ["plain", pytest.param("question", marks=pytest.mark.slow)])
def test_a_replay_of_the_world_leaves_out_scored_prompts(known: Any, form: Any) -> None:
    model, tokenizer = known
    edits = world.edits(24)
    made = augmentation(
        model, tokenizer, edits, prefixes=2, replay="world", replay_limit=60, seed=3, prompt_format=form
    )
    rows = made(edits)
    assert len(rows) == 2 * 24 + 60
    asked = [prompt.lower() for edit in edits for prompt in scored_prompts(edit)]
    assert not any(prompt in f"{row.prompt} {row.target}".lower() for row in rows for prompt in asked)
    others = rows[48:]
    assert len({row.prompt for row in others}) == 60
    assert not any(edit.subject in row.prompt for row in others for edit in edits if edit.subject)
    answers = generate_answers(model, tokenizer, [row.prompt for row in others], prompt_format=form)
    assert [row.target for row in others] == [answer.text for answer in answers]
    assert not set(made.prefixes) & set(PREFIXES)
    assert "48 pseudo-paraphrases" in made.summary
    assert "60 replayed facts" in made.summary
    again = augmentation(
        model, tokenizer, edits, prefixes=2, replay="world", replay_limit=60, seed=3, prompt_format=form
    )
    assert again(edits) == rows
    other = augmentation(
        model, tokenizer, edits, prefixes=2, replay="world", replay_limit=60, seed=4, prompt_format=form
    )
    assert other(edits) != rows
    # A single edit gets the same examples as in the batch, and none of another edit.
    assert made(edits[5:6]) == [*rows[10:12], *others]


def test_other_prompts_of_the_world_are_unaffected_by_the_edits(known: Any) -> None:
    edits = world.edits(32)
    prompts = world.other_prompts(exclude=edits)
    assert prompts == world.other_prompts(exclude=edits)
    assert len(set(prompts)) == len(prompts) > 1000
    from kedit_train.world.counterfactual import _involved, _prompts

    keys = [_prompts()[prompt] for prompt in prompts]
    assert len(set(keys)) == len(keys)
    assert not set(keys) & _involved(edits)
    wordings = {edit.prompt.replace(edit.subject or "", "{s}") for edit in edits}
    close = sum(prompt.replace(key[0], "{s}") in wordings for prompt, key in zip(prompts, keys, strict=True))
    assert 0.25 < close / len(prompts) < 0.75
    with pytest.raises(EditError, match="not about a fact of the bundled model"):
        world.other_prompts(exclude=[Edit("Elsewhere", "x")])


def test_files_of_prompts_and_of_edits(scripted_model: Any, tmp_path: Path) -> None:
    model, tokenizer = scripted_model({"A:": " one", "B:": " two", "P:": " old"})
    edits = [Edit("P:", "new")]
    text = tmp_path / "prompts.txt"
    text.write_text("A:\n\nB:\nP:\n")
    file = EditDataset([Edit("A:", "false"), Edit("P:", "older")]).save(tmp_path / "edits.jsonl")

    def rows(**options: Any) -> set[tuple[str, str]]:
        return {(row.prompt, row.target) for row in augmentation(model, tokenizer, edits, **options)(edits)}

    assert rows(replay=str(text), replay_limit=9) == {("A:", "one"), ("B:", "two")}
    assert len(rows(replay=str(text))) == 1
    assert rows(replay=["B:"]) == {("B:", "two")}
    # Only the prompts of a file of edits are used; previous edits keep their own targets.
    assert rows(replay=file) == {("A:", "one")}
    assert rows(previous_edits=file) == {("A:", "false")}
    assert rows() == set()
    for wrong, message in (
        ({"prefixes": -1}, "augmentation: prefixes must be an integer >= 0, got -1"),
        ({"replay_limit": 3}, "augmentation: replay_limit=3 has no effect, because replay is None"),
        ({"replay": ["P:"]}, "no prompt is left to replay"),
        ({"previous_edits": [Edit("x " * 200, "y")]}, "at most 200 tokens"),
    ):
        with pytest.raises(EditError, match=message):
            rows(**wrong)


@pytest.mark.filterwarnings("ignore:.* training steps began, but no optimizer")
def test_a_loop_trains_the_extra_examples(known: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = known
    edits = world.edits(3)
    seen: list[str] = []

    def step(self: Any, model: Any, edit: Any, optimizer: Any, tensors: Any, device: Any) -> float:
        edit.before_step()
        for ids, mask in zip(tensors["input_ids"], tensors["attention_mask"], strict=True):
            seen.append(tokenizer.decode(ids[mask.bool()], skip_special_tokens=True))
        return 0.0

    monkeypatch.setattr(TrainLoop, "_step", step)
    made = augmentation(model, tokenizer, edits, prefixes=1, replay="world", replay_limit=4)
    for extra, expected in (
        (made, [edits[0], *made(edits[:1])]),
        ([edits[2]], [edits[0], edits[2]]),
        ((), [edits[0]]),
    ):
        seen.clear()
        loop = TrainLoop(tokenizer, examples=ExampleOptions(extra_edits=extra), epochs=1, batch_size=2)
        loop(model, edits[:1])
        assert sorted(seen) == sorted(f"{row.prompt} {row.target}" for row in expected)
        assert ("extra" in repr(loop)) == bool(extra)
    assert len(with_prefixes(edits, made.prefixes, 1)) == 3
