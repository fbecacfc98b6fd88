"""``controlled``: bitwise no-op, generated positions only, both padding sides, cache, batches, restoration, errors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from control.small_models import HIDDEN, PROMPTS, batch, build
from installed import CACHE
from torch import Tensor
from transformers import DynamicCache

from kedit_train.compatibility import TRANSFORMERS_4
from kedit_train.control import ValueModel, controlled
from kedit_train.control.positions import GeneratedPositions
from kedit_train.control.sites import find_sites


def generate(model: Any, inputs: dict[str, Tensor], n: int = 6, **options: Any) -> Any:
    return model.generate(
        **inputs, max_new_tokens=n, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )


def recorded(model: Any, layers: list[Any], run: Callable[[], Any]) -> dict[str, list[Tensor]]:
    """Return the hidden states of every pass by layer. The hooks run after those of ``controlled``."""
    seen: dict[str, list[Tensor]] = {}
    sites = find_sites(model, layers)

    def keep(name: str, hidden: Tensor) -> None:
        seen.setdefault(name, []).append(hidden.clone())

    handles = [site.register(lambda hidden, name=site.name: keep(name, hidden)) for site in sites]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def equal_bits(a: Tensor, b: Tensor) -> bool:
    kinds = {2: torch.int16, 4: torch.int32}
    return torch.equal(a.view(kinds[a.element_size()]), b.view(kinds[b.element_size()]))


@pytest.mark.parametrize("zero", [{"step_size": 0}, {"steps": 0}, {"radius": 0}])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_a_control_of_size_zero_is_a_bitwise_no_op(
    zero: dict[str, Any], side: str, use_cache: bool, value: ValueModel
) -> None:
    model, inputs = build(), batch(side)
    before = generate(model, inputs, use_cache=use_cache)
    with controlled(model, value, **({"step_size": 9.0} | zero)):
        during = generate(model, inputs, use_cache=use_cache)
    assert torch.equal(before.sequences, during.sequences)
    assert all(equal_bits(a, b) for a, b in zip(before.logits, during.logits, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_only_generated_positions_change(family: str, side: str, use_cache: bool, value: ValueModel) -> None:
    model, inputs = build(family), batch(side)
    width = inputs["input_ids"].shape[1]
    plain = recorded(model, [1], lambda: generate(model, inputs, use_cache=use_cache))["1"]
    with controlled(model, value, step_size=50.0, radius=0.3) as control:
        moved = recorded(model, [1], lambda: generate(model, inputs, use_cache=use_cache))["1"]
    # The first pass reads the prompt. Its hidden states are the same, bit for bit.
    assert equal_bits(plain[0], moved[0])
    for one, other in zip(plain[1:], moved[1:], strict=True):
        if use_cache:
            assert one.shape[1] == 1
        else:
            assert equal_bits(one[:, :width], other[:, :width])
    # The second pass reads the same first token, so its generated position differs only by the control.
    change = (moved[1][:, -1] - plain[1][:, -1]).norm(dim=-1)
    norm = plain[1][:, -1].norm(dim=-1)
    assert bool((change > 0).all())
    assert bool((change <= 0.3 * norm * (1 + 1e-6)).all())
    passes = len(plain) - 1
    expected = passes if use_cache else passes * (passes + 1) // 2
    # With a cache, the head receives one position in each pass; generate() also asks for one without a cache.
    assert control.positions == len(PROMPTS) * (expected + passes)


@pytest.mark.parametrize("first_token", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_with_and_without_a_cache_the_same_is_generated(first_token: bool, value: ValueModel) -> None:
    model, inputs = build(), batch("left")
    with controlled(model, value, step_size=50.0, radius=0.2, first_token=first_token):
        cached, whole = (generate(model, inputs, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    for a, b in zip(cached.logits, whole.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first_token", [False, True])
def test_a_batch_equals_each_row_alone(first_token: bool, value: ValueModel) -> None:
    model = build()
    with controlled(model, value, step_size=50.0, steps=2, radius=0.2, first_token=first_token):
        both = generate(model, batch("left"))
        for i, prompt in enumerate(PROMPTS):
            alone = generate(model, batch("left", [prompt]))
            assert torch.equal(alone.sequences[0, len(prompt) :], both.sequences[i, len(PROMPTS[0]) :])
            for a, b in zip(alone.logits, both.logits, strict=True):
                torch.testing.assert_close(a[0], b[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_first_token_option_controls_the_last_token_of_each_prompt_and_no_other(
    side: str, value: ValueModel
) -> None:
    model, inputs = build(), batch(side)
    plain = recorded(model, [1], lambda: model(**inputs))["1"][0]
    with controlled(model, value, step_size=50.0, radius=0.3, first_token=True):
        moved = recorded(model, [1], lambda: model(**inputs))["1"][0]
    changed = (plain != moved).any(-1)
    last = [4, 4] if side == "left" else [4, 2]
    assert changed.nonzero().tolist() == [[0, last[0]], [1, last[1]]]


def test_a_prompt_that_is_read_in_parts_does_not_change(value: ValueModel) -> None:
    model, ids = build(), torch.tensor([[5, 9, 12, 7, 30, 2]])
    plain = recorded(model, [1], lambda: generate(model, {"input_ids": ids}, n=3, prefill_chunk_size=2))["1"]
    with controlled(model, value, step_size=50.0, radius=0.3):
        moved = recorded(model, [1], lambda: generate(model, {"input_ids": ids}, n=3, prefill_chunk_size=2))["1"]
    # transformers 4 reads the last token of the prompt alone, so this token counts as a generated position.
    assert [part.shape[1] for part in plain] == ([2, 2, 1, 1, 1, 1] if TRANSFORMERS_4 else [2, 2, 2, 1, 1])
    assert all(equal_bits(a, b) for a, b in zip(plain[:3], moved[:3], strict=True))
    assert not equal_bits(plain[3], moved[3])


def test_the_rest_of_a_prompt_after_a_filled_cache_does_not_change(value: ValueModel) -> None:
    model, ids = build(), torch.tensor([[5, 9, 12, 7, 30, 2]])

    def run() -> None:
        with torch.no_grad():
            cache = getattr(model(input_ids=ids[:, :3], use_cache=True), CACHE)
        generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, n=2, **{CACHE: cache})

    plain = recorded(model, [1], run)["1"]
    with controlled(model, value, step_size=50.0, radius=0.3):
        moved = recorded(model, [1], run)["1"]
    assert [part.shape[1] for part in plain] == [3, 3, 1]
    assert all(equal_bits(a, b) for a, b in zip(plain[:2], moved[:2], strict=True))
    assert not equal_bits(plain[2], moved[2])


@pytest.mark.parametrize("use_cache", [True, False])
def test_beam_search_runs_and_reads_its_prompt_unchanged(use_cache: bool, value: ValueModel) -> None:
    model, inputs = build(), batch("left")
    options = {"num_beams": 3, "use_cache": use_cache}
    plain = recorded(model, [1], lambda: generate(model, inputs, **options))["1"]
    with controlled(model, value, step_size=50.0, radius=0.2):
        moved = recorded(model, [1], lambda: generate(model, inputs, **options))["1"]
    assert equal_bits(plain[0], moved[0])
    assert not equal_bits(plain[1], moved[1])
    # Without a cache, the prompts of all passes are known by their tokens, whatever the order of the beams.
    if not use_cache:
        width = inputs["input_ids"].shape[1]
        for one in moved[1:]:
            rows = [any(torch.allclose(row, other, atol=1e-5) for other in plain[0]) for row in one[:, :width]]
            assert all(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_value_rises_and_the_change_stays_in_the_trust_region(dtype: torch.dtype, value: ValueModel) -> None:
    model, inputs = build(dtype=dtype), batch("left")
    plain = recorded(model, ["head"], lambda: generate(model, inputs, n=2))["head"][1]
    with controlled(model, value, step_size=0.5, steps=3, radius=0.1, layers=["head"]) as control:
        moved = recorded(model, ["head"], lambda: generate(model, inputs, n=2))["head"][1]
    assert moved.dtype == dtype
    assert bool((value.at("head", moved) > value.at("head", plain)).all())
    change = (moved.double() - plain.double()).norm(dim=-1)
    assert bool((change <= 0.1 * plain.double().norm(dim=-1)).all())
    assert 0 < control.mean_change <= 0.1 * (1 + 1e-5)
    assert control.positions == 2


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_restored(fails: bool, value: ValueModel) -> None:
    model, inputs = build(), batch("left")

    def hooks() -> list[Any]:
        return [(list(m._forward_hooks), list(m._forward_pre_hooks), vars(m).keys()) for m in model.modules()]

    names, weights = hooks(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = generate(model, inputs)
    expected = pytest.raises(RuntimeError, match="stop") if fails else nullcontext()
    with expected, controlled(model, value, step_size=50.0, radius=0.3):
        during = generate(model, inputs)
        if fails:
            raise RuntimeError("stop")
    assert hooks() == names
    assert all(equal_bits(tensor, weights[name]) for name, tensor in model.state_dict().items())
    after = generate(model, inputs)
    assert all(equal_bits(a, b) for a, b in zip(before.logits, after.logits, strict=True))
    assert not torch.equal(before.logits[1], during.logits[1])


def test_a_peft_model_is_controlled_as_its_base_model(value: ValueModel) -> None:
    peft = pytest.importorskip("peft")
    model, inputs = build(), batch("left")
    with controlled(model, value, step_size=50.0, radius=0.3) as one:
        expected = generate(model, inputs)
    # A new adapter adds zeros.
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with controlled(wrapped, value, step_size=50.0, radius=0.3) as other:
        found = generate(wrapped, inputs)
    assert torch.equal(expected.sequences, found.sequences)
    assert one.positions == other.positions > 0
    for a, b in zip(expected.logits, found.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_two_plain_passes_are_two_prompts(value: ValueModel) -> None:
    model, ids = build(), torch.tensor([[5, 9, 12, 7, 30, 2]])
    with torch.no_grad(), controlled(model, value, step_size=50.0, radius=0.3) as control:
        model(input_ids=ids[:, :5])
        model(input_ids=ids)
    assert control.positions == 0


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_both_names_of_the_cache_show_a_generated_position(name: str) -> None:
    """transformers 5.24 still accepts the old name, and a hook receives the name that the caller has used."""
    model, ids = build(), torch.tensor([[5, 9, 12]])
    with torch.no_grad():
        cache = getattr(model(input_ids=ids, use_cache=True), CACHE)
    positions = GeneratedPositions(first_token=False)
    assert positions.read(model, (), {"input_ids": ids[:, :1], name: cache}).tolist() == [[True]]
    assert positions.read(model, (), {"input_ids": ids[:, :1], name: DynamicCache()}).tolist() == [[False]]


def test_an_error_in_a_pass_ends_the_control_of_this_pass(value: ValueModel) -> None:
    model, ids = build(), torch.tensor([[5, 9, 12]])

    def fail(*args: Any) -> None:
        raise RuntimeError("stop")

    hidden = torch.randn(1, 1, HIDDEN)
    expected = model.lm_head(hidden)
    with torch.no_grad(), controlled(model, value, step_size=50.0, radius=0.3):
        cache = getattr(model(input_ids=ids, use_cache=True), CACHE)
        hook = model.model.layers[2].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            model(input_ids=ids[:, :1], **{CACHE: cache})
        hook.remove()
        assert torch.equal(model.lm_head(hidden), expected)
