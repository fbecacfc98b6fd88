"""The built-in items for general ability: their right choices, and the scores computed from logits in another way."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from real_models import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

from kedit_train import world
from kedit_train.evaluation.scoring.abilities import AbilityItem, ability_items, ability_scores
from kedit_train.evaluation.scoring.capability import CapabilityProbe

ABILITIES = ["arithmetic", "grammar", "copying", "reading"]


def of(ability: str, seed: int = 0) -> list[AbilityItem]:
    return [item for item in ability_items(seed=seed) if item.ability == ability]


@pytest.mark.parametrize("ability", ABILITIES)
def test_items_differ_from_each_other_and_have_different_choices(ability: str) -> None:
    items = of(ability)
    assert len(items) == len(set(items)) == 60
    assert all(len(set(item.choices)) == len(item.choices) for item in items)
    assert {len(item.choices) for item in items} == {2 if ability == "grammar" else 4}
    assert items == of(ability)
    assert items != of(ability, seed=1)


def test_each_calculation_is_right() -> None:
    for item in of("arithmetic"):
        lines = [*item.prompt.split("\n")[:-1], f"{item.prompt.splitlines()[-1]} {item.choices[0]}"]
        for line in lines:
            first, sign, second, result = re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)", line).groups()  # type: ignore[union-attr]
            assert int(result) == int(first) + int(second) * (1 if sign == "+" else -1)


def test_the_right_word_to_copy_is_the_next_one() -> None:
    for item in of("copying"):
        first, second = (line.split(": ")[1] for line in item.prompt.split("\n"))
        words, begun = first.rstrip(".").split(", "), second.rstrip(",").split(", ")
        assert words[: len(begun)] == begun
        assert item.choices[0] == words[len(begun)]


def test_the_right_place_is_the_place_of_the_thing_in_the_question() -> None:
    for item in of("reading"):
        places = dict(re.findall(r"put the (\w+) into the (\w+)\.", item.prompt))
        asked = re.search(r"So the (\w+) is", item.prompt)
        assert asked is not None
        assert item.choices[0] == f"{places[asked[1]]}."


def test_the_right_form_agrees_with_the_sentence() -> None:
    for item in of("grammar"):
        right, wrong = item.choices
        if subject := re.match(r"The (\w+) near", item.prompt):
            assert right.split()[0] in (("are", "were") if subject[1].endswith("s") else ("is", "was"))
        elif "bought" in item.prompt:
            assert (right[:-2], right[-2:]) == (wrong[:-1], "s.")
        elif item.prompt.endswith("saw") and "mirror" not in item.prompt:
            assert right.startswith("an ") == (right.split()[1][0] in "aeiou")
        elif "mirror" in item.prompt:
            assert right == (
                "himself." if item.prompt.split()[0] in ("David", "Frank", "Jack", "Peter") else "herself."
            )
        else:
            assert item.prompt.startswith("Yesterday")
            assert right.split()[0] in ("went", "ate", "wrote", "came", "saw", "took")


def test_scores_equal_a_computation_from_the_logits_of_each_choice() -> None:
    model, tokenizer = world.load()
    items = [item for name in ABILITIES for item in of(name)[:5]]
    expected: dict[str, list[bool]] = {}
    for item in items:
        sums = []
        for choice in item.choices:
            prompt, whole = (tokenizer(text)["input_ids"] for text in (item.prompt, f"{item.prompt} {choice}"))
            assert whole[: len(prompt)] == prompt
            with torch.no_grad():
                log_probs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(sum(float(log_probs[i - 1, whole[i]]) for i in range(len(prompt), len(whole))))
        expected.setdefault(item.ability, []).append(sums[0] > max(sums[1:]))
    scores = ability_scores(model, tokenizer, items)
    assert {name: (s.value, s.n) for name, s in scores.items()} == {
        f"ability/{name}": (pytest.approx(sum(own) / 5), 5) for name, own in expected.items()
    }
    # A random choice between right and wrong would also agree if all items had the same result.
    assert len({result for own in expected.values() for result in own}) == 2


def test_a_model_without_preference_gets_no_item_right(scripted_model: Any) -> None:
    model, tokenizer = scripted_model({})
    items = [AbilityItem("copying", "a:", ("xy", "yx"))]
    assert ability_scores(model, tokenizer, items)["ability/copying"].value == 0.0


def test_capability_probe_measures_the_abilities_before_and_after() -> None:
    model, tokenizer = world.load()
    probe = CapabilityProbe(["The baker found a coin near the river."], abilities=True, max_new_tokens=4)
    unedited = probe(model, tokenizer)
    assert [name for name in unedited.scores() if name.startswith("ability/")] == [f"ability/{n}" for n in ABILITIES]
    assert all(unedited.scores()[f"ability/{name}"].n == 60 for name in ABILITIES)
    again = probe(model, tokenizer, unedited=unedited)
    assert again.tasks == unedited.tasks


@pytest.mark.slow
def test_smollm2_is_better_than_chance() -> None:
    folder = smollm2()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    scores = ability_scores(model, tokenizer, ability_items())
    for name, chance in zip(ABILITIES, (0.25, 0.5, 0.25, 0.25), strict=True):
        assert scores[f"ability/{name}"].low > chance  # type: ignore[operator]
