"""The output head reproduces the logits of many model families, and refuses models where it cannot."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from kedit_train.callbacks import EditMetrics, editing
from kedit_train.core import EditRun, Host, OutputHead, find_language_model
from kedit_train.core.output_head import evaluation_mode
from kedit_train.data import Edit
from kedit_train.errors import EditError

FAMILIES = ["llama", "llama-tied", "qwen3", "gpt2", "gemma2", "gemma3", "cohere", "granite", "mixtral", "phi"]
IDS = torch.tensor([[5, 7, 11, 13, 17, 3], [2, 4, 8, 16, 32, 60]])


def head_of(model: nn.Module) -> OutputHead:
    return EditRun(model, Host(object())).head()


@pytest.mark.parametrize("family", FAMILIES)
def test_projection_equals_the_logits_of_the_model(tiny, family):
    model = tiny(family).eval()
    with torch.no_grad():
        # With a cache, torch may round attention differently.
        want = model(input_ids=IDS, use_cache=False).logits
        head = head_of(model)
        hidden = head.hidden(input_ids=IDS)
        torch.testing.assert_close(head.project(hidden.flatten(0, 1)).view_as(want), want, rtol=1e-6, atol=1e-6)
        # These heads change the logits after the matrix, by so much that the comparison above would fail without it.
        if family in ("gemma2", "gemma3", "cohere", "granite"):
            assert (head.module(hidden) - want).abs().max() > 0.1
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, want), (
            "the model is unchanged outside of capturing()"
        )


def test_the_head_receives_one_position_in_the_layout_of_a_new_tensor(tiny):
    """On a CPU, torch copies a frozen half-precision weight if a product has an input with other strides."""
    model = tiny("llama").requires_grad_(False).eval()
    head = head_of(model)
    received = []
    model.lm_head.register_forward_pre_hook(lambda module, args: received.append(args[0]))
    hidden = head.hidden(input_ids=IDS)
    (own,) = received
    assert torch.equal(own, hidden[:1, -1:])
    assert own.stride() == torch.empty(1, 1, 16).stride() != hidden[:1, -1:].stride()


@pytest.mark.parametrize(("family", "scale"), [("cohere", 0.0625), ("granite", 1 / 8), ("llama", 1.0)])
def test_the_logits_of_the_model_decide_whether_a_scale_multiplies_or_divides(tiny, family, scale):
    assert head_of(tiny(family)).scale == scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "phi"])
def test_half_precision_and_autocast_are_reproduced(tiny, family, dtype):
    own = head_of(tiny(family).to(dtype))
    assert own.project(own.hidden(input_ids=IDS)[0]).dtype == torch.float32
    model = tiny(family)

    class Mixed(Host):
        def forward_context(self) -> Any:
            return torch.autocast("cpu", dtype=dtype)

    head = EditRun(model, Mixed(object())).head()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        want = model.eval()(input_ids=IDS, use_cache=False).logits.float()
        hidden = head.hidden(input_ids=IDS)
    # This call is outside of autocast, but must return what the model returns under autocast. Soft-capping is the
    # exception: the model rounds its steps to half precision. TRL and kedit-train do not.
    tight = 5e-3 if family == "gemma2" else 0.0
    # In fp16, the model rounds scaled logits near 0 to multiples of 2 ** -24.
    rounded = 2.0**-25 if family == "cohere" and dtype == torch.float16 else 0.0
    for fp32_gradients in (False, True):
        got = head.project(hidden.flatten(0, 1), fp32_gradients=fp32_gradients).view_as(want)
        torch.testing.assert_close(got, want, rtol=tight, atol=max(tight, rounded))


def test_only_one_position_is_projected_while_capturing(tiny):
    model = tiny("llama")
    head = head_of(model)
    with head.capturing():
        assert model(input_ids=IDS).logits.shape == (1, 1, 61)
        assert head.captured is not None
        assert head.captured.shape == (2, 6, 16)
    assert head.captured is None
    assert model(input_ids=IDS).logits.shape == (2, 6, 61)


@pytest.mark.parametrize("decoder", [False, True])
def test_a_model_that_is_not_causal_is_refused(tiny, decoder):
    model = tiny("bert", transformers.BertLMHeadModel, is_decoder=decoder)
    if decoder:
        assert head_of(model).scale == 1.0
        return
    with pytest.raises(EditError) as error:
        head_of(model)
    assert str(error.value) == (
        "BertLMHeadModel is not a causal language model: the hidden states of a position depend on later tokens; use "
        "a model loaded with AutoModelForCausalLM."
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), "no hook is left"


def test_a_masked_language_model_is_refused(tiny):
    with pytest.raises(EditError, match=r"^BertForMaskedLM is not a causal language model: (the hidden|its forward)"):
        head_of(tiny("bert", transformers.BertForMaskedLM))


def test_an_encoder_decoder_is_refused(tiny):
    with pytest.raises(EditError) as error:
        head_of(tiny("t5", transformers.AutoModelForSeq2SeqLM))
    assert str(error.value) == (
        "the model must be a causal language model, got T5ForConditionalGeneration, which is an encoder-decoder; "
        "load a model with AutoModelForCausalLM, or remove this callback."
    )


@pytest.mark.parametrize("make", [lambda tiny: tiny("llama", transformers.AutoModel), lambda tiny: nn.Linear(2, 2)])
def test_a_model_without_head_is_refused(tiny, make):
    model = make(tiny)
    assert find_language_model(model) is None
    with pytest.raises(EditError) as error:
        head_of(model)
    assert str(error.value) == (
        f"the model must be a causal language model, got {type(model).__name__}, which has no language-model head; "
        "load a model with AutoModelForCausalLM, or remove this callback."
    )


class Shifted(transformers.LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output: Any = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.linspace(0, 1, output.logits.shape[-1])
        return output


class Bypassing(transformers.LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output: Any = self.model(kwargs["input_ids"])
        logits = output.last_hidden_state @ self.lm_head.weight.t()
        return CausalLMOutput(logits=logits)


def test_a_model_that_changes_its_logits_afterwards_is_refused(tiny):
    with pytest.raises(EditError) as error:
        head_of(tiny("llama", Shifted))
    assert str(error.value) == (
        "the logits of Shifted differ from the result of its output head, because the model changes the logits in a "
        "way that its configuration does not describe; remove this callback and use the training loop's own loss."
    )


def test_a_head_that_is_not_called_as_a_module_is_refused(tiny):
    with pytest.raises(EditError, match=r"^Bypassing does not call its output head as a module, so its hidden states"):
        head_of(tiny("llama", Bypassing))


def test_the_language_model_is_found_inside_other_modules(tiny):
    model = tiny("llama")
    assert find_language_model(nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Sequential(model)})) is model


def test_evaluation_mode_restores_the_mode_of_every_module(tiny):
    model = tiny("llama").train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    assert {True, False} == set(before)
    seen: list[bool] = []
    model.model.register_forward_pre_hook(lambda *_: seen.extend(m.training for m in model.modules()))
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), evaluation_mode(model):
        model(input_ids=IDS)
    assert seen
    assert not any(seen)
    assert [m.training for m in model.modules()] == before


def test_verify_leaves_nothing_on_the_model(tiny):
    model = tiny("gpt2", attn_pdrop=0.5).train()
    head = OutputHead(model)
    head.verify(nullcontext())
    head.remove()
    assert model.training
    assert model.transformer.h[0].training
    assert not any(p.grad is not None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_edit_metrics_refuses_an_encoder_decoder(tiny):
    model = tiny("t5", transformers.AutoModelForSeq2SeqLM)
    refused = pytest.raises(EditError, match=r"^EditMetrics: the model must be a causal .* is an encoder-decoder")
    with refused, editing(model, [EditMetrics([Edit("a", "b")])]):
        pass


def test_a_model_with_nan_logits_is_refused(tiny):
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(EditError, match=r"^LlamaForCausalLM returns NaN or infinite logits before the edit"):
        head_of(model)
