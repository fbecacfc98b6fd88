"""Responses of the bundled model: how they are sampled, padded, stored and read again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from control.response_runs import EIGHT_PROMPTS, IGNORED, SIX_TOKENS, records, trainer

from kedit_train import world
from kedit_train.control import PatternReward, ResponseDataModule, SamplingOptions, ShortAnswer, ValueModule
from kedit_train.control.response_data import pad_states
from kedit_train.control.responses import encode_responses, sample_responses
from kedit_train.control.sites import find_sites
from kedit_train.control.state_shards import read_states

pytestmark = IGNORED


def test_samples_do_not_depend_on_the_batch_and_follow_the_seed() -> None:
    model, tokenizer = world.load()
    options = {size: SamplingOptions(max_new_tokens=8, batch_size=size) for size in (1, 8)}
    one, eight = (sample_responses(model, tokenizer, EIGHT_PROMPTS, options[size]) for size in (1, 8))
    assert one == eight
    assert one[2:] == sample_responses(model, tokenizer, EIGHT_PROMPTS[2:], options[8], first=2)
    assert one != sample_responses(model, tokenizer, EIGHT_PROMPTS, SamplingOptions(max_new_tokens=8, seed=1))
    assert all(1 <= len(response.ids) <= 8 for response in one)


def test_samples_have_the_probabilities_of_the_model() -> None:
    model, tokenizer = world.load()
    options = SamplingOptions(max_new_tokens=1, temperature=2.0, batch_size=500)
    found = [r.ids[0] for r in sample_responses(model, tokenizer, ["The"] * 2000, options)]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokenizer("The")["input_ids"]])).logits[0, -1, : len(tokenizer)]
    expected = (logits / 2.0).softmax(-1)
    counted = torch.bincount(torch.tensor(found), minlength=len(expected)) / 2000
    assert float((counted - expected).abs().max()) < 0.05


@pytest.mark.parametrize("layers", [["head"], [0, -1, "head"]])
def test_the_recorded_states_are_those_from_which_the_tokens_are_generated(layers: list[Any]) -> None:
    model, tokenizer = world.load()
    responses = encode_responses(model, tokenizer, records(3))
    sites = find_sites(model, layers)
    for response, states in zip(responses, read_states(model, sites, responses, tokenizer.eos_token_id), strict=True):
        ids = torch.tensor([[*response.prompt_ids, *response.ids]])
        with torch.no_grad():
            output = model(input_ids=ids, output_hidden_states=True)
        start = len(response.prompt_ids) - 1
        for site in sites:
            assert states[site.name].shape == (len(response.ids), model.config.hidden_size)
        # The states before the output head give the logits of exactly the tokens of the response.
        logits = output.logits[0, start:-1]
        torch.testing.assert_close(model.lm_head(states["head"]), logits, rtol=1e-4, atol=1e-4)
        if "0" in states:
            expected = output.hidden_states[1][0, start:-1]
            torch.testing.assert_close(states["0"], expected, rtol=1e-4, atol=1e-4)


def test_a_batch_is_padded_and_its_mask_says_where() -> None:
    states = [{"head": torch.ones(3, 2)}, {"head": torch.ones(1, 2)}]
    batch = pad_states(states, torch.tensor([1.0, 0.0]))
    assert batch["mask"].tolist() == [[True, True, True], [True, False, False]]
    assert batch["states"]["head"].shape == (2, 3, 2)
    assert batch["states"]["head"][1, 1:].sum() == 0


def test_shards_are_read_again_and_written_again_when_something_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kedit_train.control.response_data._CHUNK", 5)

    def run(sampling: SamplingOptions, reward: Any = None) -> tuple[ResponseDataModule, dict[Path, int]]:
        data = ResponseDataModule(
            EIGHT_PROMPTS, reward=reward or ShortAnswer(8), sampling=sampling, cache_dir=str(tmp_path), validation=0.25
        )
        trainer().fit(ValueModule(width=8), data)
        return data, {path: path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())}

    first, files = run(SIX_TOKENS)
    assert all(re.fullmatch(r"states-[0-9a-f]{16}-\d{5}\.safetensors", path.name) for path in files)
    assert sorted(path.name.split("-")[2] for path in files) == [f"{i:05d}.safetensors" for i in range(4)]
    assert len(first.shards or ()) == 16
    # An interrupted run has only the first files.
    list(files)[-1].unlink()
    second, again = run(SIX_TOKENS, PatternReward("a"))
    assert list(files.values())[:-1] == list(again.values())[:-1]
    assert second.shards is not None
    assert first.shards is not None
    assert second.shards.texts == first.shards.texts
    # A damaged file, or other settings: the states are computed again.
    oldest = next(iter(files))
    oldest.write_bytes(b"damaged")
    assert run(SIX_TOKENS)[1][oldest] != files[oldest]
    # Runs with other settings have their own files.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    _, other = run(SamplingOptions(samples=2, max_new_tokens=6, seed=3))
    assert len(other) == 2 * len(files)
    assert all(other[path] == before[path] for path in files)


def test_all_responses_to_a_prompt_are_in_the_same_part() -> None:
    data = ResponseDataModule(EIGHT_PROMPTS, reward=ShortAnswer(8), sampling=SIX_TOKENS, validation=0.25)
    trainer().fit(ValueModule(width=8), data)
    owner = [prompt for prompt in EIGHT_PROMPTS for _ in range(2)]
    train, held_out = ({owner[i] for i in part} for part in (data.train_indices, data.validation_indices))
    assert len(held_out) == 2
    assert not train & held_out
    assert train | held_out == set(EIGHT_PROMPTS)


def test_records_are_read_from_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One\n\nTwo\n")
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, records(2))))
    read = ResponseDataModule(tmp_path / "a.txt", reward=ShortAnswer())
    assert [record["prompt"] for record in read.records] == ["One", "Two"]
    assert ResponseDataModule(str(tmp_path / "b.jsonl"), reward=ShortAnswer()).records == records(2)
