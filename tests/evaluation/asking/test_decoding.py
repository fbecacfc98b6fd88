"""Batched decoding of several architectures against the greedy search of transformers, one sequence at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from kedit_train.evaluation import generate_answers
from kedit_train.evaluation.asking.decoding import PromptBatch, can_pad, decode_greedily

PROMPTS = ["Paris is in", "The long and winding way to the town of", "A", "Who is the mother of the king of Spain?"]


def _model(name: str) -> Any:
    small: dict[str, Any] = {"vocab_size": 4096, "initializer_range": 0.5}
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=16, n_layer=2, n_head=2, **small))
    if name == "mistral":
        # The sliding window is shorter than the prompts.
        wide = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        return MistralForCausalLM(MistralConfig(**wide, num_key_value_heads=1, sliding_window=4, **small))
    if name == "bloom":
        return BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=2, n_head=2, **small))
    return MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, **small))


@pytest.mark.parametrize(("name", "padded"), [("gpt2", True), ("mistral", True), ("bloom", False), ("mamba", False)])
def test_batched_decoding_equals_greedy_search_of_transformers(factlm: Path, name: str, padded: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(factlm)
    model = _model(name).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert can_pad(model) is padded
    found = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=9, stops=())
    for prompt, answer in zip(PROMPTS, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, pad_token_id=0
        )
        assert answer.margin > 1e-4
        assert answer.text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_the_head_receives_hidden_states_in_the_layout_of_a_new_tensor() -> None:
    """On a CPU, torch copies a frozen half-precision weight for each sequence if the input has other strides."""
    model = _model("mistral").eval().requires_grad_(False)
    received: list[torch.Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda module, args: received.append(args[0]))
    rows = [[5, 6, 7, 8], [9, 10]]
    decode_greedily(model, rows, [3, 3], lambda token: False, pad_id=0)
    assert [tuple(states.shape) for states in received] == [(2, 1, 16)] * 3
    assert all(states.stride() == torch.empty(2, 1, 16).stride() for states in received)


def test_a_model_outside_of_the_cpu_receives_no_index() -> None:
    """With ``device_map``, the hidden states may be on another GPU than the index."""
    model = _model("mistral").eval().to("meta")

    def stop(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        raise InterruptedError(repr(inputs["logits_to_keep"]))

    model.register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(InterruptedError, match=r"^1$"):
        PromptBatch(model, [[5, 6, 7], [9, 10]], 0).next_logits()


def test_ended_sequences_leave_the_batch(scripted_model: Any) -> None:
    script = {"1:": " a", "2:": " bcdefgh", "3:": " ij", "4:": " k"}
    model, tokenizer = scripted_model(script)
    widths: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    rows = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in script]
    with torch.no_grad():
        found = decode_greedily(model, rows, [20] * 4, lambda token: token == tokenizer.eos_token_id, pad_id=0)
    assert [tokenizer.decode(one.ids[:-1]) for one in found] == list(script.values())
    assert widths == [4] * 3 + [2] + [1] * 5
    assert all(one.margin == pytest.approx(10.0) for one in found)


def test_known_starts_are_not_generated_again(scripted_model: Any) -> None:
    model, tokenizer = scripted_model({"Q:": " Rome, Italy", "P:": " Oslo"})
    known_starts = {"Q:": (tokenizer(" Rome", add_special_tokens=False)["input_ids"], 3.0)}
    answers = generate_answers(model, tokenizer, ["Q:"], known_starts=known_starts)
    assert [(a.text, a.ended, a.margin) for a in answers] == [("Rome, Italy", True, 3.0)]
    assert model.calls == len(", Italy") + 1
    whole = {"P:": ([*tokenizer(" Oslo", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id], 2.0)}
    model.calls = 0
    assert [a.text for a in generate_answers(model, tokenizer, ["P:"], known_starts=whole)] == ["Oslo"]
    assert model.calls == 0
