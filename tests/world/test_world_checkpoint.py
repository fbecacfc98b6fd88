"""The packaged checkpoint is small, loads like any other, and has the scores in its card."""

from __future__ import annotations

import re
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kedit_train import world
from kedit_train.world import facts, pretrain
from kedit_train.world import knowledge_check as measure
from kedit_train.world.templates import BY_NAME


@pytest.fixture(scope="module")
def loaded():
    torch.set_num_threads(1)
    return world.load()


@pytest.fixture(scope="module")
def card() -> dict[str, float]:
    rows = re.findall(r"^\| (.+) \| ([\d.]+) \| [\d,]+ \|$", (world.path() / "README.md").read_text(), re.MULTILINE)
    return {name: float(score) for name, score in rows}


def test_it_is_small_and_complete(loaded):
    files = {file.name: file.stat().st_size for file in world.path().iterdir()}
    assert sum(files.values()) <= 6_000_000
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert wanted <= set(files)
    model, _ = loaded
    assert model.num_parameters() <= 3_000_000
    assert model.dtype == torch.float32
    assert not model.training


def test_it_loads_with_the_auto_classes_and_adds_only_the_first_special_token():
    model = AutoModelForCausalLM.from_pretrained(world.path())
    tokenizer = AutoTokenizer.from_pretrained(world.path())
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    ids = tokenizer("Where is it? Answer:").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Where is it? Answer:"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.vocab_size == len(tokenizer)


def test_a_prompt_has_the_same_tokens_with_and_without_its_answer(loaded):
    _, tokenizer = loaded
    for fact in list(facts.build().facts.values())[::7]:
        prompt = BY_NAME[fact.relation].statements[0].format(s=fact.subject)
        joined = tokenizer(f"{prompt} {fact.object}").input_ids
        assert joined[: len(tokenizer(prompt).input_ids)] == tokenizer(prompt).input_ids


def test_the_scores_in_the_card_are_high_enough(card):
    assert card["trained wordings, one-hop facts"] >= 0.99
    assert card["two-hop, all"] >= 0.95


@pytest.mark.parametrize(
    ("name", "two_hop", "held_out"),
    [
        ("trained wordings, one-hop facts", False, False),
        ("held-out wordings, one-hop facts", False, True),
        ("two-hop, all", True, False),
    ],
)
def test_greedy_recall_on_a_sample_agrees_with_the_card(loaded, card, name, two_hop, held_out):
    known = facts.build()
    pool = known.two_hop if two_hop else known.facts
    asked = [
        (fact, wording)
        for fact in pool.values()
        for wording in (BY_NAME[fact.relation].held_out if held_out else BY_NAME[fact.relation].trained)
    ]
    sample = Random(4).sample(asked, 150)
    deviation = (card[name] * (1 - card[name]) / 150) ** 0.5
    assert abs(measure.recall(*loaded, sample) - card[name]) <= 3 * deviation + 0.005


def test_perplexity_on_held_out_prose_agrees_with_the_card(loaded, card):
    texts = world.prose(200, seed=1)
    assert measure.perplexity(*loaded, texts) == pytest.approx(card["prose perplexity, held-out part"], rel=1e-3)


@pytest.mark.slow
def test_pretraining_is_deterministic_and_writes_a_complete_checkpoint(tmp_path):
    torch.set_num_threads(1)
    small = facts.build(people=20, companies=3, cities=4)
    shape = pretrain.Shape(vocabulary=400, width=16, inner=32, layers=1, heads=2)
    first = pretrain.pretrain(tmp_path / "a", epochs=1, world=small, shape=shape)
    again = pretrain.pretrain(tmp_path / "b", epochs=1, world=small, shape=shape)
    assert first == again
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    assert measure.load(tmp_path / "a")[0].num_parameters() < 50_000
    assert "| trained wordings, one-hop facts | 0." in (tmp_path / "a" / "README.md").read_text()
