"""PrefixCache notices changes of the frozen layers."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from callbacks.prefixed import HALVES, batch, build, rates, same, scope, train
from installed import CACHE, older
from torch import Tensor, nn

from kedit_train.callbacks import BatchAnchor, KLLocality, PrefixCache, TokenSmoothing, editing
from kedit_train.core.integrity import Integrity
from kedit_train.errors import EditError


@pytest.fixture(autouse=True)
def only_the_cache_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the checks of the run, which refuse changes of frozen parameters that this file makes."""
    monkeypatch.setattr(Integrity, "_compare_frozen", lambda self, every: None)
    monkeypatch.setattr(Integrity, "_check_added", lambda self: None)


def replaced(model: Any, factor: float = 1.5) -> None:
    old = model.model.layers[1].mlp.up_proj
    old.weight = nn.Parameter(old.weight.detach() * factor, requires_grad=False)


def assigned(model: Any) -> None:
    state = {name: value.clone() for name, value in model.model.layers[1].state_dict().items()}
    state["mlp.up_proj.weight"] *= 1.5
    model.model.layers[1].load_state_dict(state, assign=True)
    model.model.layers[1].requires_grad_(False)


def written(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)


def other_storage(model: Any) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.detach() * 1.5


UP = r"layers\.1\.mlp\.up_proj\.weight"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (written, UP),
        (other_storage, UP),
        (replaced, UP),
        (assigned, r"layers\.1\."),
        (lambda model: model.model.rotary_emb.inv_freq.mul_(1.5), r"rotary_emb\.inv_freq"),
    ],
    ids=["in place", "storage", "replaced", "assigned", "buffer"],
)
def test_a_changed_frozen_tensor_is_noticed(change: Any, name: str) -> None:
    with pytest.warns(UserWarning, match=rf"{name}.* was changed; the stored hidden states are computed again"):
        cached = train_changing(change, PrefixCache())
    assert cached[0] == train_changing(change)[0]
    assert rates(cached[2]) == [0.0, 1.0, 0.0, 1.0]


def test_writing_the_same_values_into_a_buffer_is_no_change() -> None:
    cached = train_changing(lambda model: model.model.rotary_emb.inv_freq.mul_(1.0), PrefixCache())
    assert rates(cached[2]) == [0.0, 1.0, 1.0, 1.0]


def other_module(model: Any) -> None:
    model.model.layers[1].mlp = copy.deepcopy(model.model.layers[1].mlp)
    written(model)


def other_layer(model: Any) -> None:
    model.model.layers[1] = copy.deepcopy(model.model.layers[1])
    written(model)


def hooked(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda module, args, output: output * 1.1)


@pytest.mark.parametrize("change", [other_module, other_layer, hooked])
def test_modules_and_hooks_that_appear_below_the_scope_are_noticed(change: Any) -> None:
    with pytest.warns(UserWarning, match="because a module or a hook below layer 3 was added, removed or replaced"):
        cached = train_changing(change, PrefixCache())
    assert cached[0] == train_changing(change)[0]
    assert cached[2][-1]["edit/cache/bypassed"] == 2


def test_a_request_for_hidden_states_leaves_the_cache_unchanged() -> None:
    @torch.no_grad()
    def request(model: Any) -> None:
        assert len(model(**batch(), output_hidden_states=True).hidden_states) == 5

    cached = train_changing(request, PrefixCache())
    assert cached[0] == train_changing(request)[0]
    assert rates(cached[2]) == [0.0, 1.0, 1.0, 1.0]


def train_changing(change: Any, *more: Any, at: int = 2, steps: int = 4) -> tuple[Any, ...]:
    """Train, and change the model before one of the steps."""
    model, inputs, losses = build(), batch(), []
    with editing(model, [scope(), *more], log_every_n_steps=1) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=0.1)
        for step in range(steps):
            edit.before_step()
            if step == at:
                change(model)
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, [p.detach().clone() for p in model.parameters()], edit.history


def without_a_trace(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)


def test_a_change_without_a_trace_is_found_by_the_recheck_which_ends_caching() -> None:
    plain = train_changing(without_a_trace, steps=7)
    with pytest.warns(UserWarning, match="other hidden states than those stored for the same") as warned:
        cached = train_changing(without_a_trace, PrefixCache(recheck=3), steps=7)
    assert len(warned) == 1
    # The first batch is computed, three are served, the fifth is compared, and the rest is computed.
    assert [row.get("edit/cache/hit_rate") for row in cached[2][:5]] == [0.0, 1.0, 1.0, 1.0, 0.0]
    assert cached[2][-1]["edit/cache/bypassed"] == 2
    assert cached[2][-1]["edit/cache/sequences"] == 0
    assert cached[0][:2] == plain[0][:2]
    assert cached[0][2] != plain[0][2]


def test_caching_continues_after_a_recheck_without_a_difference_also_under_other_padding() -> None:
    batches = [batch(width=width) for width in (12, 20, 32, 15, 12, 27)]
    plain = train(build(), [scope()], batches, epochs=1)
    cached = train(build(), [scope(), PrefixCache(recheck=2)], batches, epochs=1)
    assert rates(cached[2]) == [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    torch.testing.assert_close(cached[0], plain[0], rtol=1e-5, atol=1e-6)


def test_noise_from_the_own_generator_of_a_hook_is_found_by_the_recheck() -> None:
    model, generator = build(), torch.Generator().manual_seed(0)

    def noise(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + 0.1 * torch.randn(output.shape, generator=generator) if module.training else output

    model.model.embed_tokens.register_forward_hook(noise)
    with pytest.warns(UserWarning, match="other hidden states than those stored for the same sequences"):
        train(model, [scope(), PrefixCache(recheck=1)], [batch()])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_eager_attention_gives_the_same_bits_and_served_batches_return_no_keys_and_values(family: str) -> None:
    def eager() -> Any:
        model = build(family)
        model.set_attn_implementation("eager")
        return model

    inputs = batch()
    batches = [batch(rows=half) for half in HALVES]
    plain, cached = (train(eager(), [scope(), *more], batches) for more in ([], [PrefixCache()]))
    assert same(plain, cached)
    assert rates(cached[2]) == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    model = eager()
    with editing(model, [scope(), PrefixCache()]) as edit:
        edit.before_step()
        first = getattr(model(**inputs), CACHE)
        # In transformers 4, Gemma 3 never returns keys and values in training mode.
        assert first is not None or (family == "gemma3" and older("transformers", "5"))
        # The keys and values of the skipped layers are missing, so none are returned.
        assert getattr(model(**inputs), CACHE) is None


def test_padding_without_labels_is_computed_in_full() -> None:
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    runs = []
    for more in ([], [PrefixCache()]):
        model, losses = build(), []
        with warnings.catch_warnings(record=True) as warned, editing(model, [scope(), *more]) as edit:
            warnings.simplefilter("always")
            optimizer = torch.optim.SGD(edit.parameters(), lr=0.1)
            for _ in range(3):
                edit.before_step()
                # This loss includes padding.
                loss = model(**inputs).logits.square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        runs.append((losses, [str(warning.message) for warning in warned]))
    assert runs[0][0] == runs[1][0]
    assert runs[0][1] == []
    assert len(runs[1][1]) == 1
    assert "the batch is padded and has no labels" in runs[1][1][0]


def test_labels_are_known_although_the_batch_anchor_runs_the_model_within_the_call() -> None:
    batches = [batch("left", rows=half) for half in HALVES]
    anchor = BatchAnchor(weight=3.0)
    plain = train(build(), [scope(), anchor], batches)
    cached = train(build(), [scope(), anchor, PrefixCache()], batches)
    assert same(plain, cached)
    assert rates(cached[2]) == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert cached[2][-1]["edit/cache/bypassed"] == 0


def test_reference_texts_of_several_lengths_are_served_although_they_have_no_labels(words: Any) -> None:
    texts = [" ".join(f"w{(7 * i + j) % 59}" for j in range(3 + i)) for i in range(4)]
    kl = KLLocality(texts, weight=10.0, batch_size=4)
    cached = train(build(), [scope(), kl, PrefixCache()], [batch()], tokenizer=words)
    assert rates(cached[2]) == [0.0, 1.0, 1.0]


def test_the_scale_of_a_frozen_adapter_is_part_of_the_key() -> None:
    from peft import LoraConfig, get_peft_model

    def train_with_another_scale(*more: Any) -> tuple[Any, ...]:
        config = LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        model, losses = get_peft_model(build(), config), []
        model.requires_grad_(False)
        top = [p.requires_grad_() for n, p in model.named_parameters() if "layers.3" in n and "lora" in n]
        with editing(model, [*more], log_every_n_steps=1) as edit:
            optimizer = torch.optim.SGD(top, lr=0.1)
            for step in range(4):
                edit.before_step()
                if step == 2:
                    below: Any = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
                    below.scaling["default"] *= 3
                loss = model(**batch()).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        return losses, edit.history

    cached = train_with_another_scale(TokenSmoothing(), PrefixCache())
    assert cached[0] == train_with_another_scale(TokenSmoothing())[0]
    assert rates(cached[1]) == [0.0, 1.0, 0.0, 1.0]


def test_invalid_arguments_are_errors() -> None:
    with pytest.raises(EditError, match=r"^PrefixCache: memory_limit must be a number of bytes above 0 or .* got"):
        PrefixCache("much")
    with pytest.raises(EditError, match=r"^PrefixCache: recheck must be an integer >= 0, got -1"):
        PrefixCache(recheck=-1)
    with pytest.raises(EditError, match="PrefixCache: there are two callbacks of this class on this model"):
        train(build(), [scope(), PrefixCache(), PrefixCache()], [batch()])
    with pytest.raises(EditError, match=r"^PrefixCache: cache_dir must be a directory, got the file"):
        train(build(), [scope(), PrefixCache(cache_dir=__file__)], [batch()])
