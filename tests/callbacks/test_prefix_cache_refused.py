"""PrefixCache refuses models that it cannot serve. Batches that it cannot identify are computed in full."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from callbacks.prefixed import GPT2, HALVES, STILL, batch, build, rates, same, scope, train
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
)

from kedit_train.callbacks import ParameterScope, PrefixCache, editing
from kedit_train.errors import EditError


class ReadsFirstLayer(nn.Module):
    """A last layer that reads the output of the first layer besides its own input."""

    def __init__(self, layer: nn.Module, first: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        first.register_forward_hook(lambda module, args, output: setattr(self, "shared", output * 2))

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shared, self.shared = self.shared, torch.zeros(())
        return self.layer(hidden, *args, **kwargs) + shared


def unsupported_models() -> dict[str, tuple[Any, list[Any], str]]:
    def reads_first_layer() -> Any:
        model = build()
        layers = model.model.layers
        layers[3] = ReadsFirstLayer(layers[3], layers[0])
        return model

    def compiled() -> Any:
        model = build()
        model.compile(backend="eager")
        return model

    def tied() -> Any:
        return build("llama", tie_word_embeddings=True)

    def bloom() -> Any:
        config = BloomConfig(vocab_size=61, hidden_size=16, n_layer=4, n_head=2)
        return AutoModelForCausalLM.from_config(config).train()

    return {
        "first layer": (build, [scope(0)], "in layer 0 is trained"),
        "everything": (build, [], "in layer 0 is trained"),
        "embedding": (
            build,
            [ParameterScope(modules=["embed_tokens", "layers.3.mlp"])],
            "model.embed_tokens.weight is trained and is used before layer 3",
        ),
        "tied": (
            tied,
            [ParameterScope(modules=["embed_tokens", "layers.3.mlp"])],
            "as an embedding that is tied to the output head",
        ),
        "compiled": (compiled, [scope()], "the model is compiled"),
        "reads more": (
            reads_first_layer,
            [scope()],
            "stores only the hidden states that enter layer 3, but a later module also reads",
        ),
        "unknown": (bloom, [scope()], "to the next layer, but BloomForCausalLM has none"),
    }


@pytest.mark.parametrize("case", unsupported_models())
def test_an_unsupported_model_is_an_error_before_the_first_step(case: str) -> None:
    build_model, callbacks, message = unsupported_models()[case]
    model = build_model()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(EditError) as error:
        train(model, [*callbacks, PrefixCache()], [batch()])
    assert message in str(error.value)
    assert str(error.value).startswith("PrefixCache: ")
    assert "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any("forward" in m.__dict__ or m._forward_pre_hooks for m in model.base_model.modules())


def test_a_run_without_trained_parameters_is_an_error() -> None:
    with editing(build().requires_grad_(False), [PrefixCache()]) as edit, pytest.raises(EditError) as error:
        edit.before_step()
    assert str(error.value) == (
        "PrefixCache: no parameter is trainable; unfreeze the parameters that the run should train."
    )


@pytest.mark.parametrize("where", ["embd_pdrop", "resid_pdrop", "attn_pdrop"])
def test_active_dropout_below_the_scope_is_an_error(where: str) -> None:
    def with_dropout() -> Any:
        return AutoModelForCausalLM.from_config(GPT2Config(**GPT2, **(STILL | {where: 0.1})))

    with pytest.raises(EditError, match=r"^PrefixCache: a module below layer 3 draws random numbers \(dropout"):
        train(with_dropout().train(), [scope(), PrefixCache()], [batch()])
    # Lightning trains a model in the evaluation mode in which from_pretrained returned it.
    cached = train(with_dropout().eval(), [scope(), PrefixCache()], [batch()])
    assert rates(cached[2]) == [0.0, 1.0, 1.0]


def test_hidden_states_of_evaluation_mode_do_not_serve_training_mode() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(**GPT2, **(STILL | {"embd_pdrop": 0.1}))).eval()
    with editing(model, [scope(), PrefixCache()]) as edit:
        edit.before_step()
        model(**batch())
        model.train()
        with pytest.raises(EditError, match="draws random numbers"):
            model(**batch())


def test_checkpointing_the_whole_backbone_is_an_error() -> None:
    from torch.utils.checkpoint import checkpoint

    model = build()
    with editing(model, [scope(), PrefixCache()]) as edit:
        edit.before_step()
        inputs = batch()
        loss = checkpoint(lambda: model(**inputs).loss, use_reentrant=False)
        with pytest.raises(EditError, match=r"^PrefixCache: the backward pass runs the whole backbone again"):
            loss.backward()


# transformers 5.23 renames gradient_checkpointing_enable.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_layer_by_layer_is_supported(reentrant: bool) -> None:
    def checkpointed() -> Any:
        model = build()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        return model

    batches = [batch(rows=half) for half in HALVES]
    plain = train(checkpointed(), [scope()], batches)
    cached = train(checkpointed(), [scope(), PrefixCache()], batches)
    assert same(plain, cached)
    assert rates(cached[2])[-1] == 1.0


def test_a_loop_that_compiles_the_model_gets_a_warning() -> None:
    model, inputs = build(), batch()
    with editing(model, [scope(), PrefixCache()]) as edit:
        compiled, optimizer = torch.compile(model, backend="eager"), torch.optim.SGD(edit.parameters(), lr=0.1)
        edit.before_step()
        compiled(**inputs).loss.backward()
        with pytest.warns(UserWarning, match=r"^PrefixCache: the training loop compiles the model"):
            optimizer.step()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: {"attention_mask": torch.zeros(8, 1, 12, 12)}, "attention_mask does not have the shape"),
        (lambda x: {"attention_mask": x["attention_mask"].index_fill(1, torch.tensor([1]), 0)}, "has a gap"),
        (
            lambda x: {"position_ids": torch.arange(12).remainder(6).expand(8, 12)},
            r"restart within a sequence, .*\(packing",
        ),
        (lambda x: {"input_ids": None, "inputs_embeds": torch.randn(8, 12, 16)}, "without input_ids"),
        (lambda x: {"output_hidden_states": True}, "called with output_hidden_states"),
        (lambda x: {"use_cache": True}, "called with use_cache=True"),
        (lambda x: {"labels": x["input_ids"]}, "a supervised token is predicted from padding"),
    ],
)
def test_a_batch_whose_sequences_cannot_be_identified_is_computed_in_full(change: Any, reason: str) -> None:
    inputs = {**batch(), **change(batch())}
    plain = train(build(), [scope()], [inputs])
    with pytest.warns(
        UserWarning, match=rf"^PrefixCache: a batch is computed in full, without the cache, because .*{reason}"
    ):
        cached = train(build(), [scope(), PrefixCache()], [inputs])
    assert same(plain, cached)
    assert cached[2][-1]["edit/cache/bypassed"] == 3
    assert cached[2][-1]["edit/cache/sequences"] == 0
